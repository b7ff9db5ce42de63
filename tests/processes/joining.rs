//! Joining, and failing to.

use std::time::{Duration, Instant};

use farcall::transport::{StoreError, TransferError};
use farcall::{Agent, JoinError, Options, StoreServer};

use crate::harness::{bounded, unique};

use super::spawn::{Process, Processes, command};

fn options(store: &StoreServer, rank: u32, world_size: u32) -> Options {
    let mut options = Options::new(rank, world_size, store.address().to_string());
    options.host_store = false;
    options.join_timeout = Duration::from_millis(500);
    options
}

#[test]
fn a_join_without_all_ranks_names_the_missing_in_time() {
    bounded(|| {
        let store = StoreServer::bind("127.0.0.1:0").expect("a store");
        let group = unique("missing");
        let started = Instant::now();
        let joining = [0, 2].map(|rank| {
            let mut options = options(&store, rank, 4);
            options.group = group.clone();
            std::thread::spawn(move || Agent::join_blocking(options))
        });
        for joining in joining {
            let error = joining.join().expect("no panic").expect_err("ranks 1 and 3 do not come");
            let JoinError::Store(StoreError::Missing { missing, .. }) = &error else { panic!("{error}") };
            assert_eq!(*missing, [format!("{group}/worker/1"), format!("{group}/worker/3")]);
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    });
}

#[test]
fn a_process_that_joins_alone_fails_with_the_missing_rank() {
    bounded(|| {
        let mut processes = Processes::start(&[None, Some("serve")], &[("TEST_JOIN_MS", "300")]);
        let ended = processes.workers[1].take().expect("a process").end();
        assert_eq!(ended.status.code(), Some(1));
        assert!(ended.stderr.contains("still misses") && ended.stderr.contains("/worker/0"), "{}", ended.stderr);
    });
}

#[test]
fn a_join_without_a_store_says_where_it_looked() {
    bounded(|| {
        // A port that was free a moment ago.
        let address = StoreServer::bind("127.0.0.1:0").expect("a store").address().to_string();
        let mut options = Options::new(1, 2, address.clone());
        options.join_timeout = Duration::from_millis(300);
        let error = Agent::join_blocking(options).expect_err("nobody is there").to_string();
        assert!(error.contains(&format!("no store answers at {address}")), "{error}");
    });
}

#[test]
fn two_workers_of_one_name_are_refused() {
    bounded(|| {
        let store = StoreServer::bind("127.0.0.1:0").expect("a store");
        let joining = [0, 1].map(|rank| {
            let mut options = options(&store, rank, 2);
            options.name = Some("twin".to_owned());
            std::thread::spawn(move || Agent::join_blocking(options))
        });
        for joining in joining {
            let error = joining.join().expect("no panic").expect_err("one name, two workers");
            assert!(matches!(error, JoinError::DuplicateWorker { ranks: [0, 1], .. }), "{error}");
        }
    });
}

#[test]
fn binding_beyond_loopback_is_refused_with_the_remedy() {
    bounded(|| {
        let store = StoreServer::bind("127.0.0.1:0").expect("a store");
        let mut options = options(&store, 0, 1);
        options.bind = Some("0.0.0.0:0".parse().expect("an address"));
        let error = Agent::join_blocking(options).expect_err("not authenticated");
        assert!(matches!(error, JoinError::Transport(TransferError::NotLoopback { .. })), "{error}");
        assert!(error.to_string().contains("bind to 127.0.0.1"), "{error}");
    });
}

#[test]
fn the_loopback_of_ipv6_will_do() {
    bounded(|| {
        let store = StoreServer::bind("127.0.0.1:0").expect("a store");
        let joining = [0, 1].map(|rank| {
            let mut options = options(&store, rank, 2);
            options.join_timeout = Duration::from_secs(20);
            options.bind = Some("[::1]:0".parse().expect("an address"));
            std::thread::spawn(move || Agent::join_blocking(options).expect("joins"))
        });
        let agents = joining.map(|joining| joining.join().expect("no panic"));
        assert!(agents[0].workers().all(|worker| worker.address.is_ipv6()));
        assert_eq!(agents[0].to("w1").call(crate::functions::add, (2, 3)).wait().expect("a sum"), 5);
    });
}

/// A process with these variables besides a complete set; what it says of it, and that it fails.
fn refused_environment(variables: &[(&str, Option<&str>)], expected: &[&str]) {
    let mut command = command("serve", &[("FARCALL_RANK", "0"), ("FARCALL_WORLD_SIZE", "1")]);
    command.env("FARCALL_STORE", "127.0.0.1:0");
    for (name, value) in variables {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let ended = Process::spawn(command).end();
    assert_eq!(ended.status.code(), Some(1), "{variables:?}: {ended:?}");
    for expected in expected {
        assert!(ended.stderr.contains(expected), "{variables:?}: {:?}", ended.stderr);
    }
}

#[test]
fn a_complete_environment_is_joined_with() {
    bounded(|| {
        let mut command = command("leave", &[("FARCALL_RANK", "0"), ("FARCALL_WORLD_SIZE", "1")]);
        command.env("FARCALL_STORE", "127.0.0.1:0").env("FARCALL_NAME", "alone");
        let ended = Process::spawn(command).end();
        assert_eq!((ended.status.code(), ended.stdout.as_str()), (Some(0), "alone answered 5\n"), "{ended:?}");
    });
}

#[test]
fn missing_variables_are_named_with_the_remedy() {
    bounded(|| {
        for variable in ["FARCALL_RANK", "FARCALL_WORLD_SIZE", "FARCALL_STORE"] {
            refused_environment(&[(variable, None)], &[variable, "not set", "farcall run"]);
        }
    });
}

#[test]
fn wrong_variables_are_named_with_their_values() {
    bounded(|| {
        for (variable, value) in [
            ("FARCALL_RANK", "first"),
            ("FARCALL_RANK", "-1"),
            ("FARCALL_RANK", ""),
            ("FARCALL_WORLD_SIZE", "two"),
            ("FARCALL_BIND", "localhost"),
            ("FARCALL_HOST_STORE", "yes"),
        ] {
            refused_environment(&[(variable, Some(value))], &[variable, &format!("{value:?}")]);
        }
    });
}

#[test]
fn a_rank_beyond_the_group_is_refused() {
    bounded(|| {
        refused_environment(&[("FARCALL_RANK", Some("1"))], &["FARCALL_RANK", "rank 1 of 1 workers"]);
        refused_environment(&[("FARCALL_WORLD_SIZE", Some("0"))], &["FARCALL_RANK", "rank 0 of 0 workers"]);
    });
}

#[test]
fn a_bind_address_beyond_loopback_is_refused() {
    bounded(|| refused_environment(&[("FARCALL_BIND", Some("0.0.0.0:0"))], &["refusing to listen on 0.0.0.0:0"]));
}
