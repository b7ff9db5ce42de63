//! What a driver runs on: the operating system with its epoll set, clock and threads, or a host of a simulation.

use std::os::fd::OwnedFd;
use std::time::Instant;

use farcall_device::Kept;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

use super::{Driver, WAKE};
use crate::socket::Socket;
use crate::{TransferError, sim};

pub(super) enum Engine {
    System(System),
    /// No threads: the simulation steps the driver.
    Simulated(sim::Host),
}

pub(super) struct System {
    /// A forked child's copies are closed.
    _kept: [Kept; 3],
    pub(super) epoll: OwnedFd,
    pub(super) wake: OwnedFd,
    pub(super) watchdog: OwnedFd,
}

impl System {
    pub(super) fn new() -> Result<Self, TransferError> {
        let os = |call| move |errno: Errno| TransferError::os(call)(errno.into());
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(os("epoll_create"))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(os("eventfd"))?;
        let watchdog =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).map_err(os("timerfd_create"))?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN).map_err(os("epoll_ctl"))?;
        Ok(Self { _kept: [Kept::new(&epoll), Kept::new(&wake), Kept::new(&watchdog)], epoll, wake, watchdog })
    }
}

impl Engine {
    pub(super) fn now(&self) -> Instant {
        match self {
            Self::System(_) => Instant::now(),
            Self::Simulated(host) => host.now(),
        }
    }

    /// Watches a socket for `flags`; its events are named by `token`.
    pub(super) fn add(&self, token: u64, socket: &Socket, flags: EventFlags) -> Result<(), Errno> {
        match (self, socket) {
            (Self::System(system), Socket::System(socket)) => {
                epoll::add(&system.epoll, socket, EventData::new_u64(token), flags)
            }
            (_, Socket::Simulated(socket)) => {
                socket.watch(token, flags);
                Ok(())
            }
            _ => Err(Errno::BADF),
        }
    }

    /// Changes what a socket is watched for; [`Errno::NOENT`] if it is not.
    pub(super) fn modify(&self, token: u64, socket: &Socket, flags: EventFlags) -> Result<(), Errno> {
        match (self, socket) {
            (Self::System(system), Socket::System(socket)) => {
                epoll::modify(&system.epoll, socket, EventData::new_u64(token), flags)
            }
            (_, Socket::Simulated(socket)) => socket.rewatch(flags).then_some(()).ok_or(Errno::NOENT),
            _ => Err(Errno::BADF),
        }
    }

    /// Watches a socket no more; nothing if it is not watched.
    pub(super) fn delete(&self, socket: &Socket) {
        match (self, socket) {
            (Self::System(system), Socket::System(socket)) => drop(epoll::delete(&system.epoll, socket)),
            (_, Socket::Simulated(socket)) => socket.unwatch(),
            _ => {}
        }
    }
}

impl Driver {
    /// For the threads, which a simulated driver does not have.
    pub(super) fn system(&self) -> &System {
        match &self.engine {
            Engine::System(system) => system,
            Engine::Simulated(_) => unreachable!("a simulated driver has no threads"),
        }
    }
}
