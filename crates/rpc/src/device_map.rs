//! Which device of a peer stands for which of this worker's: tensors leave for the one, results come back to the other.
//!
//! Invariant M1: a map is one to one, and the host always maps to the host, so that a result finds its way back.

use std::fmt;

use farcall_device::{Device, Runtime, Tensor};

/// The devices of one peer, by the devices here. Without entries: the device of the same kind and index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceMap {
    /// (here, there)
    pairs: Vec<(Device, Device)>,
}

impl fmt::Display for DeviceMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pairs.is_empty() {
            return write!(f, "none, so that each device stands for its own index");
        }
        let pairs: Vec<String> = self.pairs.iter().map(|(here, there)| format!("{here} → {there}")).collect();
        write!(f, "{}", pairs.join(", "))
    }
}

impl DeviceMap {
    /// A map of these pairs: (device here, device there).
    ///
    /// # Errors
    /// Text that names the pair: a device twice on either side, or the host.
    pub fn new(pairs: impl IntoIterator<Item = (Device, Device)>) -> Result<Self, String> {
        let mut map = Self::default();
        for (here, there) in pairs {
            if here == Device::HOST || there == Device::HOST {
                return Err(format!("{here} → {there}: the host always stands for the host"));
            }
            if map.pairs.iter().any(|(known, _)| *known == here) {
                return Err(format!("{here} → {there}: {here} is mapped already"));
            }
            if map.pairs.iter().any(|(_, known)| *known == there) {
                return Err(format!("{here} → {there}: {there} stands for another device already"));
            }
            map.pairs.push((here, there));
        }
        Ok(map)
    }

    /// That each of its devices here exists.
    pub(crate) fn check(&self, runtime: &Runtime) -> Result<(), String> {
        let devices = runtime.devices();
        match self.pairs.iter().find(|(here, _)| !devices.contains(here)) {
            Some((here, there)) => Err(format!("{here} → {there}: this worker has {}", list(devices))),
            None => Ok(()),
        }
    }

    /// Where a tensor of `here` goes at the peer.
    pub(crate) fn there(&self, here: Device) -> Option<Device> {
        self.find(here, |(here, there)| (*here, *there))
    }

    /// Where a result of the peer's device `there` belongs here.
    pub(crate) fn here(&self, there: Device) -> Option<Device> {
        self.find(there, |(here, there)| (*there, *here))
    }

    fn find(&self, device: Device, direction: impl Fn(&(Device, Device)) -> (Device, Device)) -> Option<Device> {
        if device == Device::HOST || self.pairs.is_empty() {
            return Some(device);
        }
        self.pairs.iter().map(direction).find(|(from, _)| *from == device).map(|(_, to)| to)
    }
}

/// Moves received tensors from the host to their devices, on streams: their fences tell when they are there.
///
/// # Errors
/// Text that names the device which is not here, or the device's error.
pub(crate) fn place(runtime: &Runtime, tensors: &mut [Tensor], devices: &[Device]) -> Result<(), String> {
    for (tensor, device) in tensors.iter_mut().zip(devices).filter(|(_, device)| **device != Device::HOST) {
        if !runtime.devices().contains(device) {
            return Err(format!("a tensor is for {device}, there is {}", list(runtime.devices())));
        }
        let placed = runtime.stream(*device).and_then(|stream| stream.pack(tensor, *device));
        *tensor = placed.map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn list(devices: &[Device]) -> String {
    devices.iter().map(Device::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use Device::Cuda;

    #[test]
    fn a_map_is_its_own_inverse_and_the_host_stays_the_host() {
        let map = DeviceMap::new([(Cuda(0), Cuda(1)), (Cuda(1), Cuda(0))]).expect("one to one");
        assert_eq!((map.there(Cuda(0)), map.here(Cuda(1))), (Some(Cuda(1)), Some(Cuda(0))));
        assert_eq!((map.there(Device::HOST), map.here(Device::HOST)), (Some(Device::HOST), Some(Device::HOST)));
        assert_eq!((map.there(Cuda(2)), map.here(Cuda(2))), (None, None), "unmapped");
        assert_eq!(DeviceMap::default().there(Cuda(7)), Some(Cuda(7)), "no map: the same index");
    }

    /// M1
    #[test]
    fn maps_that_are_not_one_to_one_are_refused() {
        for pairs in [
            [(Cuda(0), Cuda(0)), (Cuda(0), Cuda(1))],
            [(Cuda(0), Cuda(1)), (Cuda(2), Cuda(1))],
            [(Cuda(0), Device::HOST), (Cuda(1), Cuda(1))],
        ] {
            assert!(DeviceMap::new(pairs).is_err(), "{pairs:?}");
        }
    }
}
