//! Names of devices: a kind and an index, three bytes on the wire.
//!
//! A name says nothing about presence: [`Runtime::stream`](crate::Runtime::stream) answers `Unavailable` for a device
//! that this process cannot use.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Where bytes live and work runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    /// Host memory; `Cpu(0)` is [`Device::HOST`].
    Cpu(u16),
    /// A CUDA device by its index in this process, real or emulated.
    Cuda(u16),
}

impl Device {
    /// The host: memory that the CPU reads directly.
    pub const HOST: Self = Self::Cpu(0);

    /// The device kind's code on the wire: 0 for `Cpu`, 1 for `Cuda`.
    #[must_use]
    pub const fn kind_code(self) -> u8 {
        match self {
            Self::Cpu(_) => 0,
            Self::Cuda(_) => 1,
        }
    }

    /// The index among the devices of its kind.
    #[must_use]
    pub const fn index(self) -> u16 {
        match self {
            Self::Cpu(index) | Self::Cuda(index) => index,
        }
    }

    /// The device of a wire code and an index; `None` for an unknown kind.
    #[must_use]
    pub const fn from_code(kind: u8, index: u16) -> Option<Self> {
        match kind {
            0 => Some(Self::Cpu(index)),
            1 => Some(Self::Cuda(index)),
            _ => None,
        }
    }

    /// Whether the CPU reads this device's memory directly.
    #[must_use]
    pub const fn is_host(self) -> bool {
        matches!(self, Self::Cpu(_))
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu(index) => write!(f, "cpu:{index}"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// The text names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no device: write cpu, cuda, cpu:N or cuda:N with N from 0 to 65535")]
pub struct ParseDeviceError {
    /// The text given.
    pub text: String,
}

impl FromStr for Device {
    type Err = ParseDeviceError;

    /// Reads "cpu:0" or "cuda:1"; without an index, index 0 is meant.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseDeviceError { text: text.to_owned() };
        let (kind, index) = text.split_once(':').unwrap_or((text, "0"));
        // `u16::from_str` takes a sign; a device name has none.
        if !index.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refused());
        }
        let index = index.parse().map_err(|_| refused())?;
        match kind {
            "cpu" => Ok(Self::Cpu(index)),
            "cuda" => Ok(Self::Cuda(index)),
            _ => Err(refused()),
        }
    }
}

impl Serialize for Device {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (self.kind_code(), self.index()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Device {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (kind, index) = <(u8, u16)>::deserialize(deserializer)?;
        Self::from_code(kind, index).ok_or_else(|| serde::de::Error::custom(format_args!("unknown device kind {kind}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_round_trip() {
        for (device, name, code) in [
            (Device::HOST, "cpu:0", 0),
            (Device::Cpu(2), "cpu:2", 0),
            (Device::Cuda(0), "cuda:0", 1),
            (Device::Cuda(65535), "cuda:65535", 1),
        ] {
            assert_eq!(device.to_string(), name);
            assert_eq!(name.parse(), Ok(device));
            assert_eq!(device.kind_code(), code);
            assert_eq!(Device::from_code(code, device.index()), Some(device));
        }
        assert_eq!("cpu".parse(), Ok(Device::HOST));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!(Device::from_code(2, 0), None);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:+1", "cuda:65536", "cuda:1:2", "CPU", " cpu"] {
            assert!(text.parse::<Device>().is_err(), "{text:?}");
        }
    }
}
