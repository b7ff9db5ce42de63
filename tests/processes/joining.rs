//! Joining, and failing to.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use farcall::device::Config;
use farcall::transport::{StoreError, TransferError};
use farcall::{Agent, DType, Device, JoinError, Options, Runtime, StoreServer, TensorMut, Transport};

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

/// A worker of the group of this store, over TCP, with what is changed in its options.
fn join_over_tcp(store: &StoreServer, world_size: u32, change: impl Fn(&mut Options)) -> Vec<Agent> {
    let joining: Vec<_> = (0..world_size)
        .map(|rank| {
            let mut options = options(store, rank, world_size);
            (options.join_timeout, options.transport) = (Duration::from_secs(20), Transport::Tcp);
            change(&mut options);
            std::thread::spawn(move || Agent::join_blocking(options).expect("joins"))
        })
        .collect();
    joining.into_iter().map(|joining| joining.join().expect("no panic")).collect()
}

/// A host without IPv4: what nobody sets follows the store.
#[test]
fn a_group_that_meets_on_ipv6_needs_no_ipv4() {
    bounded(|| {
        let store = StoreServer::bind("[::1]:0").expect("a store");
        let agents = join_over_tcp(&store, 2, |_| {});
        assert!(agents[0].workers().all(|worker| worker.address.ip().to_string() == "::1"));
        assert_eq!(agents[0].to("w1").call(crate::functions::add, (2, 3)).wait().expect("a sum"), 5);
    });
}

#[test]
fn an_interface_and_a_range_of_ports_are_kept_to() {
    bounded(|| {
        let store = StoreServer::bind("127.0.0.1:0").expect("a store");
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let first = taken.local_addr().expect("an address").port();
        let range = first..=first.saturating_add(50);
        let agents = join_over_tcp(&store, 3, |options| {
            (options.interface, options.ports) = (Some("=lo".parse().expect("a name")), Some(range.clone()));
        });
        let mut ports: Vec<u16> = agents[0].workers().map(|worker| worker.address.port()).collect();
        assert!(agents[0].workers().all(|worker| worker.address.ip().to_string() == "127.0.0.1"));
        assert!(ports.iter().all(|port| range.contains(port) && *port != first), "{ports:?} of {range:?}");
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 3);
        assert_eq!(agents[0].to("w1").call(crate::functions::add, (2, 3)).wait().expect("a sum"), 5);

        let mut options = options(&store, 0, 1);
        (options.group, options.ports, options.transport) = (unique("taken"), Some(first..=first), Transport::Tcp);
        let error = Agent::join_blocking(options).expect_err("its only port is taken").to_string();
        let expected =
            format!("FARCALL_PORTS: no port from {first} to {first} is free on 127.0.0.1; set a wider range");
        assert_eq!(error, expected);
    });
}

/// The workers' device runtime is made as their file says, before they make a tensor.
#[test]
fn devices_are_emulated_as_a_file_of_settings_says() {
    bounded(|| {
        let path = std::env::temp_dir().join(format!("{}.toml", unique("farcall-devices")));
        std::fs::write(&path, "devices = \"emulated:1\"\n").expect("a file");
        let (processes, agent) = {
            let file = path.to_str().expect("UTF-8");
            let processes = Processes::start(&[None, Some("serve")], &[("FARCALL_CONFIG", file)]);
            let config = Config { emulated_devices: 1, ..Config::default() };
            let runtime = Runtime::new(config).expect("an emulated device");
            let agent = processes.join(|options| options.device_runtime = Some(runtime));
            (processes, agent)
        };
        let stream = agent.runtime().stream(Device::Cuda(0)).expect("a stream");
        let x = TensorMut::from_storage(stream.alloc(4).expect("memory"), DType::F32, &[1]).expect("a tensor");
        let device =
            agent.to("w1").call(crate::functions::device_of, (x.freeze(&stream),)).wait().expect("w1's device");
        assert_eq!(device, "cuda:0");
        processes.shutdown(&agent);
        std::fs::remove_file(&path).expect("the file");
    });
}

/// Started as torchrun starts them, whose own store is at `MASTER_PORT`.
#[test]
fn workers_of_torchrun_meet_beside_its_store() {
    bounded(|| {
        let (torch, next) = loop {
            let torch = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = torch.local_addr().expect("an address").port();
            if let Some(next) = port.checked_add(1).filter(|next| TcpListener::bind(("127.0.0.1", *next)).is_ok()) {
                break (torch, next);
            }
        };
        let port = (next - 1).to_string();
        let workers = ["0", "1"].map(|rank| {
            let mut command = command("leave", &[("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", "2")]);
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
            Process::spawn(command)
        });
        for worker in workers {
            let ended = worker.end();
            assert_eq!(
                (ended.status.code(), ended.stdout.as_str()),
                (Some(0), "w0 answered 5\nw1 answered 5\n"),
                "{ended:?}"
            );
        }
        drop(torch);
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
        refused_environment(&[("FARCALL_RNAK", Some("1"))], &["FARCALL_RNAK", "the nearest is `FARCALL_RANK`"]);
        refused_environment(&[("FARCALL_LOG", Some("warn=loud"))], &["variable FARCALL_LOG: log = \"warn=loud\": "]);
        refused_environment(&[("FARCALL_RANK", Some("1"))], &["FARCALL_RANK", "rank 1 of 1 workers"]);
        refused_environment(&[("FARCALL_WORLD_SIZE", Some("0"))], &["FARCALL_RANK", "rank 0 of 0 workers"]);
    });
}

#[test]
fn a_bind_address_beyond_loopback_is_refused() {
    bounded(|| refused_environment(&[("FARCALL_BIND", Some("0.0.0.0:0"))], &["refusing to listen on 0.0.0.0:0"]));
}
