//! Which channel takes bytes from one worker to another, and why each of the others does not.
//!
//! Pure: what both ends are goes in, a [`Decision`] comes out. The driver dials what it says, and people read it
//! (`farcall explain`), so that the two cannot differ.
//! Invariant N1: a channel is kept out by an [`Obstacle`], or it could be taken; of those that could, the first of
//! [`Channel::ALL`] is taken.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use farcall_device::Device;

use crate::{LENT_BYTES_MIN, Limits, LocalAddress, NoSlabs, Transport};

/// A way for a tensor's bytes to another worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Channel {
    /// Memory of a device, opened by the other process.
    CudaIpc,
    /// Host memory that both processes map.
    Shm,
    /// RDMA and what else UCX drives.
    Ucx,
    /// A Unix socket on this host.
    Unix,
    /// A TCP connection.
    Tcp,
}

impl Channel {
    /// All of them, the one that is taken before the others first.
    pub const ALL: [Self; 5] = [Self::CudaIpc, Self::Shm, Self::Ucx, Self::Unix, Self::Tcp];

    /// Its name in settings, on command lines and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CudaIpc => "cuda_ipc",
            Self::Shm => "shm",
            Self::Ucx => "ucx",
            Self::Unix => "unix",
            Self::Tcp => "tcp",
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Channel {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|channel| channel.name() == text);
        named.ok_or("cuda_ipc, shm, ucx, unix or tcp is expected")
    }
}

/// One end of a connection.
#[derive(Clone, Debug)]
pub struct End<'a> {
    /// Where its Unix socket is, if it listens on one.
    pub local: Option<&'a LocalAddress>,
    /// Where the bytes are, or are to be.
    pub device: Device,
    /// Why it passes no slabs to anyone, if that is known.
    pub no_slabs: Option<&'a NoSlabs>,
}

/// Why a channel cannot be taken. Each text says what to do about it, where something can be done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Obstacle {
    /// Not in this version.
    #[error("this version of farcall has no such channel yet")]
    NotBuilt,
    /// A setting of this side leaves it out.
    #[error("left out by the setting of this side: FARCALL_TRANSPORT={setting}")]
    Setting { setting: Transport },
    /// This side listens on no Unix socket, though its settings want one.
    #[error("this side has no Unix socket: the system refused it, a warning in the log says why")]
    NoSocketHere,
    /// The other side does not.
    #[error("the other side has no Unix socket: FARCALL_TRANSPORT=tcp there, or its system refused one")]
    NoSocketThere,
    /// Another boot of another kernel.
    #[error("the other side is on another host: its boot id is {there}, this one's {here}")]
    OtherHost { here: Arc<str>, there: Arc<str> },
    /// Abstract names are not known there.
    #[error(
        "the other side is in another network namespace ({there}, this one is in {here}): start both in one, containers with \
         --network=host"
    )]
    OtherNetwork { here: u64, there: u64 },
    /// One of the sides passes no slabs.
    #[error(transparent)]
    NoSlabs(NoSlabs),
    /// It would not be believed.
    #[error("the other side runs as user {there}, this one as {here}: run both as one user")]
    OtherUser { here: u32, there: u32 },
}

/// What became of a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the one.
    Taken,
    /// It would do, but another one is taken before it.
    Behind(Channel),
    /// It cannot be taken.
    Refused(Obstacle),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken => f.write_str("taken"),
            Self::Behind(channel) => write!(f, "possible, but {channel} is taken before it"),
            Self::Refused(obstacle) => obstacle.fmt(f),
        }
    }
}

/// How the bytes of a tensor travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carriage {
    /// Not at all: they are read where they lie.
    Slab,
    /// In the frame of the call, if all its tensors together have room there.
    Inline,
    /// On a second connection, in chunks, so that other frames can pass.
    Bulk {
        /// How many.
        chunks: u64,
    },
}

/// What [`negotiate`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Every channel, in the order of [`Channel::ALL`], and what became of it.
    pub verdicts: Vec<(Channel, Verdict)>,
    /// How the bytes travel there.
    pub carriage: Carriage,
    /// Which copies are made beside the sending, in their order: from a device to the host, and on to a device.
    pub copies: Vec<(Device, Device)>,
}

impl Decision {
    /// The channel that is taken; `None` if nothing leads there.
    #[must_use]
    pub fn taken(&self) -> Option<Channel> {
        let taken = |(channel, verdict): &(Channel, Verdict)| (*verdict == Verdict::Taken).then_some(*channel);
        self.verdicts.iter().find_map(taken)
    }
}

/// Decides which channel takes `bytes` from this side, whose setting is `transport`, to another.
#[must_use]
pub fn negotiate(transport: Transport, here: &End<'_>, there: &End<'_>, bytes: u64, limits: &Limits) -> Decision {
    let mut taken = None;
    let verdict = |channel| match (obstacle(channel, transport, here, there), taken) {
        (Some(obstacle), _) => (channel, Verdict::Refused(obstacle)),
        (None, Some(first)) => (channel, Verdict::Behind(first)),
        (None, None) => {
            taken = Some(channel);
            (channel, Verdict::Taken)
        }
    };
    let verdicts = Channel::ALL.into_iter().map(verdict).collect();
    // Frames pass in shared memory, too (`shm::ring`): what is not worth a lease travels there.
    let carriage = if taken == Some(Channel::Shm) && bytes >= LENT_BYTES_MIN {
        Carriage::Slab
    } else if bytes <= limits.inline_bytes_max {
        Carriage::Inline
    } else {
        Carriage::Bulk { chunks: bytes.div_ceil(limits.chunk_bytes_max.max(1)) }
    };
    let copies = [(here.device, Device::HOST), (Device::HOST, there.device)];
    Decision { verdicts, carriage, copies: copies.into_iter().filter(|(from, to)| from != to).collect() }
}

fn obstacle(channel: Channel, transport: Transport, here: &End<'_>, there: &End<'_>) -> Option<Obstacle> {
    match (channel, transport) {
        (Channel::CudaIpc | Channel::Ucx, _) => Some(Obstacle::NotBuilt),
        (Channel::Unix | Channel::Shm, Transport::Tcp) | (Channel::Tcp, Transport::Unix) => {
            Some(Obstacle::Setting { setting: transport })
        }
        (Channel::Unix, _) => match (here.local, there.local) {
            (None, _) => Some(Obstacle::NoSocketHere),
            (_, None) => Some(Obstacle::NoSocketThere),
            (Some(here), Some(there)) => here.distance(there),
        },
        // Its memory is passed over a Unix socket.
        (Channel::Shm, _) => obstacle(Channel::Unix, transport, here, there)
            .or_else(|| here.no_slabs.or(there.no_slabs).cloned().map(Obstacle::NoSlabs)),
        (Channel::Tcp, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> LocalAddress {
        LocalAddress { name: "a".into(), boot: "boot-1".into(), network: 4, user: 1000, life: None }
    }

    fn decide(transport: Transport, here: Option<&LocalAddress>, there: Option<&LocalAddress>) -> Decision {
        let off = NoSlabs::Off;
        let end = |local| End { local, device: Device::HOST, no_slabs: Some(&off) };
        negotiate(transport, &end(here), &end(there), 8, &Limits::default())
    }

    fn verdict(decision: &Decision, channel: Channel) -> Verdict {
        decision.verdicts.iter().find(|(known, _)| *known == channel).expect("every channel").1.clone()
    }

    /// N1, for each thing that differs between two ends.
    #[test]
    fn of_the_possible_channels_the_first_is_taken_and_each_other_one_says_why() {
        let here = local();
        let near = decide(Transport::Auto, Some(&here), Some(&here));
        assert_eq!(near.taken(), Some(Channel::Unix));
        assert_eq!(verdict(&near, Channel::Tcp), Verdict::Behind(Channel::Unix));
        let far = |change: fn(&mut LocalAddress)| {
            let mut there = local();
            change(&mut there);
            let decision = decide(Transport::Auto, Some(&here), Some(&there));
            assert_eq!(decision.taken(), Some(Channel::Tcp));
            // Who must not use TCP cannot get there.
            assert_eq!(decide(Transport::Unix, Some(&here), Some(&there)).taken(), None);
            verdict(&decision, Channel::Unix).to_string()
        };
        for (says, expected) in [
            (far(|there| there.boot = "boot-2".into()), "on another host: its boot id is boot-2, this one's boot-1"),
            (far(|there| there.network = 5), "another network namespace (5, this one is in 4)"),
            (far(|there| there.user = 0), "runs as user 0, this one as 1000"),
        ] {
            assert!(says.contains(expected), "{says}");
        }
    }

    #[test]
    fn settings_and_missing_sockets_are_told_apart() {
        let here = local();
        let refused = |transport, here, there| match verdict(&decide(transport, here, there), Channel::Unix) {
            Verdict::Refused(obstacle) => obstacle,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            refused(Transport::Tcp, None, Some(&here)),
            Obstacle::Setting { setting: Transport::Tcp },
            "what was set, not what follows from it"
        );
        assert_eq!(refused(Transport::Auto, None, Some(&here)), Obstacle::NoSocketHere);
        assert_eq!(refused(Transport::Auto, Some(&here), None), Obstacle::NoSocketThere);
        let alone = decide(Transport::Unix, Some(&here), Some(&here));
        assert_eq!(alone.taken(), Some(Channel::Unix));
        let setting = Obstacle::Setting { setting: Transport::Unix };
        assert_eq!(verdict(&alone, Channel::Tcp), Verdict::Refused(setting));
    }

    #[test]
    fn carriage_and_copies_follow_from_size_and_devices() {
        let (here, limits) = (local(), Limits::default());
        let decide = |from, to, bytes| {
            let off = NoSlabs::Off;
            let end = |device| End { local: Some(&here), device, no_slabs: Some(&off) };
            let decision = negotiate(Transport::Auto, &end(from), &end(to), bytes, &limits);
            (decision.carriage, decision.copies)
        };
        let (host, device) = (Device::HOST, Device::Cuda(1));
        assert_eq!(decide(host, host, 64 << 10), (Carriage::Inline, vec![]));
        assert_eq!(decide(host, host, (64 << 10) + 1), (Carriage::Bulk { chunks: 1 }, vec![]));
        assert_eq!(decide(host, device, 9 << 20), (Carriage::Bulk { chunks: 3 }, vec![(host, device)]));
        assert_eq!(decide(device, device, 0), (Carriage::Inline, vec![(device, host), (host, device)]));
    }

    #[test]
    fn memory_is_shared_between_processes_that_both_share_it() {
        let (here, limits, off) = (local(), Limits::default(), NoSlabs::Off);
        let decide = |here_off, there_off, bytes| {
            let end = |no_slabs| End { local: Some(&here), device: Device::HOST, no_slabs };
            negotiate(Transport::Auto, &end(here_off), &end(there_off), bytes, &limits)
        };
        let shared = decide(None, None, 1 << 30);
        assert_eq!((shared.taken(), shared.carriage), (Some(Channel::Shm), Carriage::Slab));
        assert_eq!(verdict(&shared, Channel::Unix), Verdict::Behind(Channel::Shm));
        for decision in [decide(Some(&off), None, 1 << 30), decide(None, Some(&off), 1 << 30)] {
            assert_eq!(decision.taken(), Some(Channel::Unix));
            assert_eq!(verdict(&decision, Channel::Shm), Verdict::Refused(Obstacle::NoSlabs(off.clone())));
        }
        let small = decide(None, None, LENT_BYTES_MIN - 1);
        assert_eq!((small.taken(), small.carriage), (Some(Channel::Shm), Carriage::Inline), "frames pass there, too");
        assert_eq!(decide(None, None, LENT_BYTES_MIN).carriage, Carriage::Slab);
    }

    #[test]
    fn every_channel_is_found_by_its_name() {
        for channel in Channel::ALL {
            assert_eq!(channel.name().parse(), Ok(channel));
        }
        assert!("rdma".parse::<Channel>().is_err());
    }
}
