//! Which of this host's network interfaces a worker listens on.
//!
//! Names are chosen as `NCCL_SOCKET_IFNAME` chooses them. The choice is pure; [`addresses`] asks the system.
//! Loopback is chosen only by name, and link-local addresses of IPv6 never: they mean nothing without an interface's number,
//! which is another one on each host.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::str::FromStr;

/// A choice of network interfaces: `eth0`, `eth,ib` (beginnings of names), `=eth0` (that name alone), `^docker,lo` (all but
/// those), `^=docker0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceChoice {
    text: String,
    exclude: bool,
    exact: bool,
    names: Vec<String>,
}

impl FromStr for InterfaceChoice {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (exclude, rest) = text.strip_prefix('^').map_or((false, text), |rest| (true, rest));
        let (exact, rest) = rest.strip_prefix('=').map_or((false, rest), |rest| (true, rest));
        let names: Vec<String> = rest.split(',').map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            return Err("names or beginnings of names of network interfaces are expected");
        }
        Ok(Self { text: text.to_owned(), exclude, exact, names })
    }
}

impl fmt::Display for InterfaceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// One address of a network interface that is up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// The interface.
    pub name: String,
    /// The address.
    pub address: IpAddr,
}

impl fmt::Display for InterfaceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.address)
    }
}

/// Why no interface could be chosen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum InterfaceError {
    /// None is chosen by the names given.
    #[error("no network interface matches `{choice}`; this host has {}", listed(.found))]
    NoMatch { choice: InterfaceChoice, found: Vec<InterfaceAddress> },
    /// The system does not tell.
    #[error("cannot list the network interfaces: {source}")]
    List { source: io::Error },
}

fn listed(found: &[InterfaceAddress]) -> String {
    let found: Vec<String> = found.iter().map(InterfaceAddress::to_string).collect();
    if found.is_empty() { "none that is up and has an address".to_owned() } else { found.join(", ") }
}

impl InterfaceChoice {
    /// The address to listen on: of the interfaces chosen, in the order of the names and then of the system, the first
    /// with one of the same family as `like`, else the first.
    ///
    /// # Errors
    /// [`InterfaceError`] lists what there is.
    pub fn find(&self, like: Option<IpAddr>) -> Result<InterfaceAddress, InterfaceError> {
        let found = addresses().map_err(|source| InterfaceError::List { source })?;
        match self.choose(&found, like) {
            Some(chosen) => Ok(chosen.clone()),
            None => Err(InterfaceError::NoMatch { choice: self.clone(), found }),
        }
    }

    fn choose<'a>(&self, found: &'a [InterfaceAddress], like: Option<IpAddr>) -> Option<&'a InterfaceAddress> {
        let mut chosen: Vec<(usize, &InterfaceAddress)> =
            found.iter().filter_map(|found| Some((self.place(found)?, found))).collect();
        chosen.sort_by_key(|(place, found)| {
            let other_family = like.is_some_and(|like| like.is_ipv4() != found.address.is_ipv4());
            (other_family, *place)
        });
        chosen.first().map(|(_, found)| *found)
    }

    /// Where an interface stands in the order of preference; `None` if it is not chosen.
    fn place(&self, found: &InterfaceAddress) -> Option<usize> {
        let is_named = |name: &String| found.name == *name || (!self.exact && found.name.starts_with(name.as_str()));
        let named = self.names.iter().position(is_named);
        if self.exclude {
            return (named.is_none() && !found.address.is_loopback()).then_some(0);
        }
        // The name itself comes before names that begin with it.
        let is_whole = self.names.contains(&found.name);
        named.map(|place| 2 * place + usize::from(!is_whole))
    }
}

/// The addresses of this host's network interfaces that others can dial.
///
/// # Errors
/// The system call's.
pub fn addresses() -> io::Result<Vec<InterfaceAddress>> {
    let usable = |interface: &if_addrs::Interface| {
        // Loopback, tunnels and others do not know whether they are up.
        use if_addrs::IfOperStatus::{Dormant, Unknown, Up};
        matches!(interface.oper_status, Up | Unknown | Dormant)
            && !(interface.ip().is_ipv6() && interface.is_link_local())
    };
    let all = if_addrs::get_if_addrs()?;
    let address = |interface: if_addrs::Interface| InterfaceAddress { address: interface.ip(), name: interface.name };
    Ok(all.into_iter().filter(usable).map(address).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<InterfaceAddress> {
        [
            ("lo", "127.0.0.1"),
            ("docker0", "172.17.0.1"),
            ("eth01", "10.1.0.4"),
            ("eth0", "fd00::4"),
            ("eth0", "10.0.0.4"),
            ("ib0", "fd00:1::4"),
            ("lo", "::1"),
        ]
        .map(|(name, address)| InterfaceAddress { name: name.into(), address: address.parse().unwrap() })
        .to_vec()
    }

    fn chosen(choice: &str, like: Option<&str>) -> Option<String> {
        let choice: InterfaceChoice = choice.parse().unwrap();
        let like = like.map(|like| like.parse().unwrap());
        choice.choose(&host(), like).map(InterfaceAddress::to_string)
    }

    #[test]
    fn names_are_chosen_as_nccl_chooses_them() {
        for (choice, like, expected) in [
            ("eth0", Some("10.0.0.9"), Some("eth0 10.0.0.4")),
            ("eth0", Some("fd00::9"), Some("eth0 fd00::4")),
            ("eth0", None, Some("eth0 fd00::4")),
            ("=eth0", Some("10.0.0.9"), Some("eth0 10.0.0.4")),
            ("eth", Some("10.0.0.9"), Some("eth01 10.1.0.4")),
            ("=eth", Some("10.0.0.9"), None),
            ("ib,eth0", Some("fd00::9"), Some("ib0 fd00:1::4")),
            // IPv4 is wanted, ib0 has none.
            ("ib,eth0", Some("10.0.0.9"), Some("eth0 10.0.0.4")),
            ("ib", Some("10.0.0.9"), Some("ib0 fd00:1::4")),
            ("^docker", Some("10.0.0.9"), Some("eth01 10.1.0.4")),
            ("^docker,eth,ib", None, None),
            ("^=eth01,docker0", Some("10.0.0.9"), Some("eth0 10.0.0.4")),
            ("lo", Some("10.0.0.9"), Some("lo 127.0.0.1")),
            ("lo", Some("::1"), Some("lo ::1")),
            ("wlan", None, None),
        ] {
            assert_eq!(chosen(choice, like).as_deref(), expected, "{choice} {like:?}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", "^", "=", "^=", "eth0,", ",", "a,,b"] {
            assert!(text.parse::<InterfaceChoice>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn an_unknown_interface_is_answered_with_those_there_are() {
        let choice: InterfaceChoice = "=no-such-interface".parse().unwrap();
        let error = choice.find(None).unwrap_err().to_string();
        assert!(error.starts_with("no network interface matches `=no-such-interface`; this host has "), "{error}");
        assert!(error.contains("lo 127.0.0.1"), "{error}");
        let loopback: InterfaceChoice = "lo".parse().unwrap();
        let like: IpAddr = "127.0.0.1".parse().unwrap();
        assert_eq!(loopback.find(Some(like)).unwrap().address, like);
    }
}
