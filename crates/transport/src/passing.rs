//! Which way host tensors take to a peer, and why not the better one.

use crate::{LocalAddress, Transport};

/// How payload above a few kilobytes reaches a peer, as a connection has found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Passing {
    /// In slabs that both processes have mapped: nothing is copied.
    Slabs,
    /// Through sockets, for this reason.
    Sockets(NoSlabs),
}

/// Why tensors are copied through sockets instead of passed in slabs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum NoSlabs {
    /// The greeting is not over.
    #[error("the peer has not been reached yet")]
    Connecting,
    /// This worker has no Unix socket.
    #[error("this worker uses TCP alone: set FARCALL_TRANSPORT=auto")]
    TcpHere,
    /// The peer has no Unix socket.
    #[error("the peer uses TCP alone: set FARCALL_TRANSPORT=auto there")]
    TcpThere,
    /// The peer runs under another kernel.
    #[error("the peer runs on another host")]
    OtherHost,
    /// Another user's process.
    #[error("the peer runs as user {theirs}, this worker as {ours}: memory is shared between processes of one user")]
    OtherUser { ours: u32, theirs: u32 },
    /// Another network namespace, as of a container.
    #[error("the peer is in another network namespace: let the containers share one, such as the host's")]
    OtherNamespace,
    /// A Unix socket would lead there, but failed when it was dialed.
    #[error("the Unix socket to the peer failed, so TCP was dialed")]
    Fallback,
    /// Switched off.
    #[error("it is switched off: set FARCALL_SHM=auto")]
    Off,
    /// The system refuses memory that can be shared.
    #[error("{reason}")]
    Refused { reason: String },
    /// The peer does not.
    #[error("the peer shares no memory: FARCALL_SHM=off there, or its system refuses it (its log says so)")]
    RefusedThere,
}

/// Why there is no Unix socket between two workers, as far as their addresses tell.
pub(crate) fn no_socket(transport: Transport, ours: Option<&LocalAddress>, theirs: Option<&LocalAddress>) -> NoSlabs {
    let Some(ours) = ours.filter(|_| transport != Transport::Tcp) else { return NoSlabs::TcpHere };
    let Some(theirs) = theirs else { return NoSlabs::TcpThere };
    if ours.boot != theirs.boot {
        NoSlabs::OtherHost
    } else if ours.user != theirs.user {
        NoSlabs::OtherUser { ours: ours.user, theirs: theirs.user }
    } else if ours.network != theirs.network {
        NoSlabs::OtherNamespace
    } else {
        NoSlabs::Fallback
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_obstacle_is_named() {
        let here = LocalAddress { name: "a".into(), boot: "b".into(), network: 1, user: 2, life: None };
        let why = |change: fn(&mut LocalAddress)| {
            let mut there = here.clone();
            change(&mut there);
            no_socket(Transport::Auto, Some(&here), Some(&there))
        };
        assert_eq!(why(|there| there.boot = "c".into()), NoSlabs::OtherHost);
        assert_eq!(why(|there| there.user = 3), NoSlabs::OtherUser { ours: 2, theirs: 3 });
        assert_eq!(why(|there| there.network = 3), NoSlabs::OtherNamespace);
        assert_eq!(why(|_| {}), NoSlabs::Fallback);
        assert_eq!(no_socket(Transport::Auto, Some(&here), None), NoSlabs::TcpThere);
        assert_eq!(no_socket(Transport::Auto, None, Some(&here)), NoSlabs::TcpHere);
        assert_eq!(no_socket(Transport::Tcp, Some(&here), Some(&here)), NoSlabs::TcpHere);
    }
}
