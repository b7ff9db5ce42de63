//! Who is not let in yet, and who of them has to go when there are too many.
//!
//! Pure state, for the driver and the store's server. Whoever dials in a flood must not keep others out: the oldest
//! connection of the address that has most of them makes room for the newest. An honest dialer needs a few round trips to
//! be let in, so it is done before its turn comes; a flood displaces itself.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv6Addr};

/// Connections that have not proven themselves, by where they come from.
#[derive(Debug)]
pub(crate) struct Strangers {
    max: usize,
    origins: HashMap<u64, Origin>,
    /// No set is empty. Ids grow, so the first is the oldest.
    by_origin: HashMap<Origin, BTreeSet<u64>>,
}

/// An IPv4 address, or the network of an IPv6 one: a host has all of a /64. `None` is this host, by a Unix socket.
type Origin = Option<IpAddr>;

impl Strangers {
    pub(crate) fn new(max: usize) -> Self {
        Self { max, origins: HashMap::new(), by_origin: HashMap::new() }
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Adds the newest; gives who has to go for it.
    pub(crate) fn enter(&mut self, id: u64, from: Option<IpAddr>) -> Option<u64> {
        let gone = if self.origins.len() >= self.max { self.displace() } else { None };
        let origin = from.map(|address| match address {
            IpAddr::V4(_) => address,
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                address.to_ipv4_mapped().map_or(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into(), IpAddr::V4)
            }
        });
        self.origins.insert(id, origin);
        self.by_origin.entry(origin).or_default().insert(id);
        gone
    }

    /// It was let in, or has ended. Others are not known here.
    pub(crate) fn leave(&mut self, id: u64) {
        let Some(origin) = self.origins.remove(&id) else { return };
        if let Some(ids) = self.by_origin.get_mut(&origin) {
            ids.remove(&id);
            if ids.is_empty() {
                self.by_origin.remove(&origin);
            }
        }
    }

    /// Takes out the oldest of those who are most.
    pub(crate) fn displace(&mut self) -> Option<u64> {
        let crowd = self.by_origin.values().max_by_key(|ids| (ids.len(), std::cmp::Reverse(ids.first())))?;
        let oldest = *crowd.first()?;
        self.leave(oldest);
        Some(oldest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn the_oldest_makes_room() {
        let mut strangers = Strangers::new(3);
        let entered: Vec<_> = (1..=6).map(|id| strangers.enter(id, from("10.0.0.1"))).collect();
        assert_eq!(entered, [None, None, None, Some(1), Some(2), Some(3)]);
        strangers.leave(5);
        strangers.leave(99);
        assert_eq!(strangers.enter(7, from("10.0.0.1")), None);
        assert_eq!(strangers.enter(8, from("10.0.0.1")), Some(4));
    }

    #[test]
    fn a_flood_from_one_address_displaces_nobody_elses() {
        let mut strangers = Strangers::new(8);
        assert_eq!(strangers.enter(0, from("10.0.0.1")), None);
        assert_eq!(strangers.enter(1, None), None);
        for id in 2..1000 {
            let gone = strangers.enter(id, from("10.0.0.2"));
            assert_eq!(gone, (id >= 8).then(|| id - 6), "the flood's own");
        }
        assert_eq!(strangers.origins.len(), 8);
        assert!(strangers.origins.contains_key(&0) && strangers.origins.contains_key(&1));
    }

    #[test]
    fn addresses_of_one_network_count_as_one() {
        let mut strangers = Strangers::new(3);
        strangers.enter(1, from("2001:db8::1"));
        strangers.enter(2, from("2001:db8:0:1::1"));
        strangers.enter(3, from("2001:db8:0:1::2"));
        assert_eq!(strangers.enter(4, from("10.0.0.1")), Some(2));
        // IPv4 in IPv6's clothes is itself.
        let mut strangers = Strangers::new(3);
        strangers.enter(1, from("::1"));
        strangers.enter(2, from("::ffff:10.0.0.1"));
        strangers.enter(3, from("10.0.0.1"));
        assert_eq!(strangers.enter(4, from("::1")), Some(2));
    }

    #[test]
    fn when_there_is_one_of_each_the_oldest_goes() {
        let mut strangers = Strangers::new(2);
        strangers.enter(1, from("10.0.0.2"));
        strangers.enter(2, from("10.0.0.1"));
        assert_eq!(strangers.enter(3, from("10.0.0.3")), Some(1));
        assert_eq!(strangers.displace(), Some(2));
        assert_eq!(strangers.displace(), Some(3));
        assert_eq!((strangers.displace(), strangers.by_origin.len()), (None, 0));
    }
}
