//! A listener, or one end of a connection: the operating system's, or a simulated network's.
//!
//! What is above sees this type alone, so that the same driver and the same endpoints run on both. Beside a system call, the
//! branch costs nothing that can be measured (`cargo xtask callgrind`).

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::SockAddr;

use crate::tcp::{self, Progress, Wait};
use crate::{local, sim};

/// See the module. The methods are those of `tcp` and of `socket2`.
pub(crate) enum Socket {
    System(socket2::Socket),
    Simulated(sim::Socket),
}

impl From<socket2::Socket> for Socket {
    fn from(socket: socket2::Socket) -> Self {
        Self::System(socket)
    }
}

impl Socket {
    pub(crate) fn accept(&self) -> io::Result<(Self, SockAddr)> {
        match self {
            Self::System(socket) => socket.accept().map(|(socket, from)| (Self::System(socket), from)),
            Self::Simulated(socket) => socket.accept().map(|(socket, from)| (Self::Simulated(socket), from.into())),
        }
    }

    /// Settings of a connected socket.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        match self {
            Self::System(socket) => tcp::prepare(socket),
            Self::Simulated(_) => Ok(()),
        }
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::System(socket) => socket.try_clone().map(Self::System),
            Self::Simulated(socket) => Ok(Self::Simulated(socket.clone())),
        }
    }

    pub(crate) fn take_error(&self) -> io::Result<Option<io::Error>> {
        match self {
            Self::System(socket) => socket.take_error(),
            Self::Simulated(socket) => Ok(socket.take_error()),
        }
    }

    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        match self {
            Self::System(socket) => socket.shutdown(how),
            Self::Simulated(socket) => {
                socket.shutdown(how);
                Ok(())
            }
        }
    }

    /// A description of the process at the other end if it is another user's.
    pub(crate) fn other_user(&self) -> io::Result<Option<String>> {
        match self {
            Self::System(socket) => local::other_user(socket),
            Self::Simulated(_) => Ok(None),
        }
    }

    /// The process at the other end of a Unix socket; `None` if it is another namespace's, or elsewhere.
    pub(crate) fn peer_process(&self) -> Option<u32> {
        match self {
            Self::System(socket) => local::peer_process(socket),
            Self::Simulated(_) => None,
        }
    }

    /// Reads into `buffer`'s spare room and gives the bytes read. A simulated socket never sleeps.
    #[inline]
    pub(crate) fn recv<'a>(
        &self,
        buffer: &'a mut [MaybeUninit<u8>],
        wait: Wait,
    ) -> Result<(Progress, &'a mut [u8]), Errno> {
        match self {
            Self::System(socket) => tcp::recv(socket, buffer, wait),
            Self::Simulated(socket) => socket.recv(buffer),
        }
    }

    /// Reads into `buffer`, which is not empty.
    #[inline]
    pub(crate) fn recv_into(&self, buffer: &mut [u8]) -> Result<Progress, Errno> {
        match self {
            Self::System(socket) => tcp::recv_into(socket, buffer),
            Self::Simulated(socket) => socket.recv_into(buffer),
        }
    }

    /// Writes the start of `parts` without blocking.
    #[inline]
    pub(crate) fn send(&self, parts: &[IoSlice<'_>]) -> Result<Progress, Errno> {
        match self {
            Self::System(socket) => tcp::send(socket, parts),
            Self::Simulated(socket) => socket.send(parts),
        }
    }

    /// Bytes that have come and are not read.
    pub(crate) fn unread_bytes(&self) -> Result<u64, Errno> {
        match self {
            Self::System(socket) => rustix::io::ioctl_fionread(socket),
            Self::Simulated(socket) => Ok(socket.unread_bytes()),
        }
    }

    /// As [`Self::send`], with a descriptor that goes with the first byte. Over a Unix socket only.
    pub(crate) fn send_with(&self, bytes: &[u8], descriptor: BorrowedFd<'_>) -> Result<Progress, Errno> {
        match self {
            Self::System(socket) => tcp::send_with(socket, bytes, descriptor),
            Self::Simulated(socket) => socket.send(&[IoSlice::new(bytes)]),
        }
    }

    /// Reads into `buffer`, which is not empty, with the descriptor that came with one of the bytes.
    pub(crate) fn recv_with(&self, buffer: &mut [u8], wait: Wait) -> Result<(Progress, Option<OwnedFd>), Errno> {
        match self {
            Self::System(socket) => tcp::recv_with(socket, buffer, wait),
            Self::Simulated(socket) => Ok((socket.recv_into(buffer)?, None)),
        }
    }

    /// Whether it is a Unix socket to another worker: descriptors can be passed. A TLS session's is not; that has no name at
    /// either end.
    pub(crate) fn is_unix(&self) -> bool {
        let is_named = |address: io::Result<SockAddr>| address.is_ok_and(|address| !address.is_unnamed());
        match self {
            Self::System(socket) => {
                socket.domain().is_ok_and(|domain| domain == socket2::Domain::UNIX)
                    && (is_named(socket.local_addr()) || is_named(socket.peer_addr()))
            }
            Self::Simulated(_) => false,
        }
    }

    /// Whether something can be read, now or within `timeout`.
    pub(crate) fn poll_readable(&self, timeout: Duration) -> Result<bool, Errno> {
        match self {
            Self::System(socket) => {
                let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
                poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)).map(|ready| ready > 0)
            }
            Self::Simulated(socket) => Ok(socket.is_readable()),
        }
    }
}
