//! What is to be measured, as it is given on the command line and told to the process that measures.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use farcall::Device;
use farcall::device::units::parse_bytes;
use serde::{Deserialize, Serialize};

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Op {
    /// A number there and back
    Call,
    /// A tensor there, a number back; the target does not read the tensor
    Sink,
    /// A tensor there, a number back; the target reads every byte
    Read,
    /// A tensor there and back
    Echo,
    /// Numbers there and back, with many calls outstanding
    Rate,
}

impl Op {
    /// Whether it is measured once for each size.
    pub(crate) fn has_sizes(self) -> bool {
        matches!(self, Self::Sink | Self::Read | Self::Echo)
    }

    /// How often a tensor crosses the wire in a call.
    pub(crate) fn crossings(self) -> u64 {
        match self {
            Self::Call | Self::Rate => 0,
            Self::Sink | Self::Read => 1,
            Self::Echo => 2,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Call => "call",
            Self::Sink => "sink",
            Self::Read => "read",
            Self::Echo => "echo",
            Self::Rate => "rate",
        })
    }
}

/// Where the caller's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Memory {
    /// A tensor that farcall allocated
    Slab,
    /// Memory of the program's own: each call copies it into a tensor first
    Foreign,
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Slab => "slab",
            Self::Foreign => "foreign",
        })
    }
}

/// A number of bytes as nccl-tests and farcall write it: `8`, `64K`, `1G`, `64MiB`, `4GB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let short = text.strip_suffix(['K', 'M', 'G', 'k', 'm', 'g']);
        let bytes = match short {
            Some(_) => parse_bytes(&format!("{}iB", text.to_ascii_uppercase())),
            None => parse_bytes(text),
        };
        bytes.map(Self).ok_or_else(|| "a size such as 8, 64K, 16M, 1G, 64MiB or 4GB is expected".to_owned())
    }
}

impl fmt::Display for Size {
    /// With the largest unit of which it is a multiple.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(shift, _)| self.0 > 0 && self.0.is_multiple_of(1 << shift)) {
            Some((shift, unit)) => f.pad(&format!("{} {unit}", self.0 >> shift)),
            None => f.pad(&format!("{} B", self.0)),
        }
    }
}

/// All that a measuring process is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) ops: Vec<Op>,
    pub(crate) sizes: Vec<u64>,
    /// Calls measured; without it, as many as half a second takes, within bounds.
    pub(crate) iterations: Option<u32>,
    /// Calls before; without it, a few and for some time.
    pub(crate) warmup: Option<u32>,
    /// Calls in flight of [`Op::Rate`].
    pub(crate) outstanding: u32,
    pub(crate) memory: Memory,
    /// Where the tensors are, see [`device`].
    pub(crate) device: String,
    pub(crate) check: bool,
    /// Measure what the machine can do without farcall, too.
    pub(crate) limits: bool,
    /// Threads look for work all the time.
    pub(crate) spins: bool,
    /// The workers are on one host, as far as the launcher knows.
    pub(crate) same_host: bool,
    /// The path that must be taken.
    pub(crate) require: Option<String>,
    /// A byte of every tensor is wrong: what checking the data must find.
    pub(crate) plant: bool,
}

impl Plan {
    /// What is measured, in this order.
    pub(crate) fn cells(&self) -> impl Iterator<Item = (Op, u64)> {
        let sizes = |op: Op| if op.has_sizes() { self.sizes.as_slice() } else { &[8] };
        self.ops.iter().flat_map(move |op| sizes(*op).iter().map(|size| (*op, *size)))
    }
}

/// A device as people name it: `host`, or as [`Device`] is written.
pub(crate) fn device(text: &str) -> Result<Device, String> {
    let device = if text == "host" { Ok(Device::HOST) } else { text.parse() };
    device.map_err(|error| format!("{error}, or host"))
}

/// From `first` to `last`, each `factor` times the one before.
pub(crate) fn sizes(first: Size, last: Size, factor: u64) -> Result<Vec<u64>, String> {
    if factor < 2 {
        return Err(format!("-f {factor}: a factor of at least 2 is expected"));
    }
    if first.0 == 0 || first.0 > last.0 {
        return Err(format!("-b {first} -e {last}: sizes from 1 byte on, the first at most the last, are expected"));
    }
    Ok(std::iter::successors(Some(first.0), |size| size.checked_mul(factor))
        .take_while(|size| *size <= last.0)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_in_nccl_tests_and_as_settings_have_them() {
        for (text, bytes) in
            [("8", 8), ("64K", 65_536), ("1G", 1 << 30), ("16m", 16 << 20), ("64MiB", 64 << 20), ("3kB", 3000)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "K", "1.5M", "-8", "8X", "64MM"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for (bytes, text) in [(8, "8 B"), (1 << 16, "64 KiB"), (3 << 20, "3 MiB"), (1 << 30, "1 GiB"), (1025, "1025 B")]
        {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn sizes_go_up_by_the_factor_and_end_in_time() {
        let list = |first, last, factor| sizes(Size(first), Size(last), factor);
        assert_eq!(list(8, 64, 2), Ok(vec![8, 16, 32, 64]));
        assert_eq!(list(8, 63, 2), Ok(vec![8, 16, 32]));
        assert_eq!(list(u64::MAX - 1, u64::MAX, 2), Ok(vec![u64::MAX - 1]));
        for (first, last, factor) in [(8, 64, 1), (0, 64, 2), (65, 64, 2)] {
            assert!(list(first, last, factor).is_err(), "{first} {last} {factor}");
        }
    }
}
