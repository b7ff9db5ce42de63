//! Which sockets a call takes: Unix sockets between near workers, TCP else, or what was asked for.

use std::time::Duration;

use farcall::prelude::*;
use farcall::transport::TransferError;
use farcall::{CloseCause, Route, Transport};

use crate::functions::{add, hash, pattern};
use crate::harness::{Group, bounded};

const BIG: usize = 3 << 20;

/// Calls, small and with tensors of the bulk connection, both ways.
fn works(group: &Group) {
    group.answers();
    for (agent, other) in [(&group.agents[0], "w1"), (&group.agents[1], "w0")] {
        let tensor = agent.to(other).call(pattern, (BIG, 7)).wait().expect("a tensor");
        let expected = hash::run(pattern::run(BIG, 7).expect("memory")).expect("bytes");
        assert_eq!(agent.to(other).call(hash, (&tensor,)).wait().expect("its hash"), expected);
    }
}

fn group(transports: [Transport; 2]) -> Group {
    Group::with(2, move |options| (options.transport, options.tls) = (transports[options.rank as usize], None))
}

#[test]
fn near_workers_use_unix_sockets_and_others_are_told_apart() {
    use Transport::{Auto, Tcp, Unix};
    bounded(|| {
        for (transports, by_unix) in [
            ([Auto, Auto], true),
            ([Unix, Unix], true),
            ([Auto, Unix], true),
            ([Auto, Tcp], false),
            ([Tcp, Tcp], false),
        ] {
            let group = group(transports);
            works(&group);
            let route = group.agents[0].to("w1").dialed().expect("w0 called first");
            assert_eq!(matches!(route, Route::Unix(_)), by_unix, "{transports:?}: {route}");
            group.shutdown();
        }
    });
}

/// PEERS: without a TCP socket there is nothing for other users or hosts to dial. (A bound one would have a port.)
#[test]
fn a_worker_of_unix_sockets_alone_listens_on_no_port() {
    bounded(|| {
        let group = group([Transport::Unix; 2]);
        assert!(group.agents[0].workers().all(|worker| worker.address.port() == 0 && worker.local.is_some()));
        works(&group);
        group.shutdown();
    });
}

#[test]
fn a_worker_elsewhere_is_a_typed_error_where_unix_sockets_are_required() {
    bounded(|| {
        let group = group([Transport::Unix, Transport::Tcp]);
        let error = group.agents[0].to("w1").call(add, (2, 3)).wait().expect_err("w1 has no Unix socket");
        assert!(matches!(&error, CallError::Send { source: TransferError::Elsewhere { .. }, .. }), "{error}");
        let text = "w1 cannot be reached by a Unix socket: it runs on another host or in another container";
        assert!(error.to_string().contains(text), "{error}");
        // The other way there is no port to dial.
        let error = group.agents[1].to("w0").call(add, (2, 3)).wait().expect_err("w0 has no TCP socket");
        let CallError::PeerLost { cause, .. } = &error else { panic!("{error}") };
        assert!(matches!(**cause, CloseCause::Connect { .. }), "{cause}");
        group.agents.iter().for_each(Agent::abort);
    });
}

/// A Unix socket that is gone (here with its worker) is no reason to fail: TCP is tried, and says what is the matter.
#[test]
fn a_dead_workers_unix_socket_falls_back_to_tcp() {
    bounded(|| {
        let group = group([Transport::Auto; 2]);
        group.answers();
        group.agents[1].abort();
        let error = group.agents[0].to("w1").deadline(Duration::from_secs(10)).call(add, (2, 3)).wait();
        let Err(CallError::PeerLost { cause, .. }) = &error else { panic!("{error:?}") };
        if let CloseCause::Connect { route, .. } = &**cause {
            assert!(matches!(route, Route::Tcp(_)), "{route}");
        }
        group.agents[0].abort();
    });
}
