//! Unix sockets between workers of one user on one host, and how to tell that a peer is such a one.
//!
//! Names are in the abstract namespace: no file, nothing left behind by a process that dies, and known only to processes of
//! the same network namespace. A name is random and published with the worker's address.
//! Invariant PEERS: both sides ask the kernel whose process the other is, and go on only if it is the same user's: the same
//! effective user id, root included. That is no proof of the job's key, which is still asked for where there is one.

use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::sync::Arc;

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::error::AuthError;
use crate::key::fresh;
use crate::negotiate::Obstacle;
use crate::{LifeAddress, life};

const LISTEN_BACKLOG: i32 = 1024;
/// Longer is no name of ours.
const NAME_BYTES_MAX: usize = 64;

/// Which sockets a worker uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// Unix sockets between workers of one user on one host, else TCP.
    #[default]
    Auto,
    /// TCP alone.
    Tcp,
    /// Unix sockets alone: a worker elsewhere, or of another user, cannot be reached and cannot reach this one.
    Unix,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        })
    }
}

impl FromStr for Transport {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "tcp" => Ok(Self::Tcp),
            "unix" => Ok(Self::Unix),
            _ => Err("auto, tcp or unix is expected"),
        }
    }
}

/// Where a worker's Unix socket is: whoever shares all but the name can dial it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalAddress {
    /// In the abstract namespace, without its leading zero byte.
    pub name: Arc<str>,
    /// The kernel's id of its boot.
    pub boot: Arc<str>,
    /// The network namespace: abstract names are known in one.
    pub network: u64,
    /// The effective user.
    pub user: u32,
    /// What tells that the process lives.
    pub life: Option<LifeAddress>,
}

impl LocalAddress {
    /// An address of this process, with a name that nobody can guess and that nobody listens to yet.
    ///
    /// # Errors
    /// The system does not tell its boot or this thread's network namespace, or gives no random bytes.
    pub fn new() -> io::Result<Self> {
        let random: String = fresh()?[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self {
            name: format!("farcall-{random}").into(),
            boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_ascii().into(),
            network: std::fs::metadata("/proc/thread-self/ns/net")?.ino(),
            user: geteuid().as_raw(),
            life: life::own(),
        })
    }

    /// Whether a process at this address can dial `other`, as far as the two can tell.
    pub(crate) fn is_near(&self, other: &Self) -> bool {
        self.distance(other).is_none()
    }

    /// What keeps a process at this address from dialing `other`, as far as the two can tell.
    pub(crate) fn distance(&self, other: &Self) -> Option<Obstacle> {
        if self.boot != other.boot {
            let (here, there) = (Arc::clone(&self.boot), Arc::clone(&other.boot));
            return Some(Obstacle::OtherHost { here, there });
        }
        if self.network != other.network {
            return Some(Obstacle::OtherNetwork { here: self.network, there: other.network });
        }
        (self.user != other.user).then_some(Obstacle::OtherUser { here: self.user, there: other.user })
    }

    fn socket_address(&self) -> io::Result<SockAddr> {
        if self.name.is_empty() || self.name.len() > NAME_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        SockAddr::unix(OsStr::from_bytes(&[b"\0", self.name.as_bytes()].concat()))
    }
}

impl fmt::Display for LocalAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{}", self.name)
    }
}

fn socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)
}

pub(crate) fn listen() -> io::Result<(Socket, LocalAddress)> {
    let (socket, address) = (socket()?, LocalAddress::new()?);
    socket.bind(&address.socket_address()?)?;
    socket.listen(LISTEN_BACKLOG)?;
    Ok((socket, address))
}

/// Connects, or fails, at once.
pub(crate) fn connect(address: &LocalAddress) -> io::Result<Socket> {
    let socket = socket()?;
    socket.connect(&address.socket_address()?)?;
    match other_user(&socket)? {
        None => Ok(socket),
        Some(peer) => Err(io::Error::new(io::ErrorKind::PermissionDenied, AuthError::OtherUser { peer })),
    }
}

/// The process at the other end, as this one's namespace numbers it; `None` if that is another namespace's.
pub(crate) fn peer_process(socket: &Socket) -> Option<u32> {
    let peer = rustix::net::sockopt::socket_peercred(socket.as_fd()).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

/// A description of the process at the other end if it is another user's.
pub(crate) fn other_user(socket: &Socket) -> io::Result<Option<String>> {
    let peer = rustix::net::sockopt::socket_peercred(socket.as_fd())?;
    let is_own = peer.uid == geteuid();
    Ok((!is_own).then(|| format!("process {} of user {}", peer.pid.as_raw_nonzero(), peer.uid.as_raw())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_dialed_by_its_own_user_and_ends_with_its_socket() {
        let (listener, address) = listen().unwrap();
        let dialer = connect(&address).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert_eq!([&dialer, &accepted].map(|socket| other_user(socket).unwrap()), [None, None]);
        drop((listener, accepted));
        assert_eq!(connect(&address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn near_is_the_same_boot_network_and_user() {
        let (_socket, here) = listen().unwrap();
        let (_other, other) = listen().unwrap();
        assert_ne!(here.name, other.name);
        assert!(here.is_near(&other));
        for change in [
            (|far: &mut LocalAddress| far.boot = "another boot".into()) as fn(&mut LocalAddress),
            |far| far.network += 1,
            |far| far.user += 1,
        ] {
            let mut far = other.clone();
            change(&mut far);
            assert!(!here.is_near(&far), "{far:?}");
        }
    }

    /// The kernel says who listens: the name of another user's process is not trusted, whatever that process has published.
    #[test]
    fn a_listener_of_another_user_is_not_dialed() {
        // The credentials of a thread are its own as far as the kernel is concerned.
        let listening = std::thread::spawn(|| {
            let nobody = rustix::process::Uid::from_raw(65534);
            rustix::thread::set_thread_res_uid(None, nobody, None).ok().map(|()| listen().unwrap())
        });
        let Some((_listener, mut address)) = listening.join().unwrap() else {
            println!("skipped: 1 check that needs root");
            return;
        };
        address.user = geteuid().as_raw();
        let error = connect(&address).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert!(error.to_string().contains("of user 65534 is another user's"), "{error}");
    }

    #[test]
    fn names_that_no_worker_has_are_refused() {
        let (_socket, address) = listen().unwrap();
        for name in [String::new(), "x".repeat(65), "x".repeat(4096)] {
            let address = LocalAddress { name: name.into(), ..address.clone() };
            assert_eq!(connect(&address).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
