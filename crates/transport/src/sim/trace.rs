//! What happened in a world: a hash over all of it, and a line for each event if somebody reads them.

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

type Print = Box<dyn FnMut(&str) + Send>;

#[derive(Default)]
pub(super) struct Trace {
    hash: Xxh3,
    events: u64,
    print: Option<Print>,
}

impl Trace {
    pub(super) fn record(&mut self, now_ns: u64, name: &'static str, host: usize, a: u64, b: u64) {
        let mut entry = [0; 40];
        entry[..8].copy_from_slice(&now_ns.to_le_bytes());
        entry[8..16].copy_from_slice(&(host as u64).to_le_bytes());
        entry[16..24].copy_from_slice(&a.to_le_bytes());
        entry[24..32].copy_from_slice(&b.to_le_bytes());
        let tag = name.as_bytes().get(..8).unwrap_or(name.as_bytes());
        entry[32..32 + tag.len()].copy_from_slice(tag);
        self.hash.update(&entry);
        self.events += 1;
        if let Some(print) = &mut self.print {
            print(&format!("{} p{host} {name} {a} {b:#x}", time(now_ns)));
        }
    }

    pub(super) fn note(&mut self, now_ns: u64, text: &str) {
        self.hash.update(&now_ns.to_le_bytes());
        self.hash.update(text.as_bytes());
        self.events += 1;
        if let Some(print) = &mut self.print {
            print(&format!("{} {text}", time(now_ns)));
        }
    }

    pub(super) fn print_with(&mut self, print: Print) {
        self.print = Some(print);
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash.digest()
    }

    pub(super) fn events(&self) -> u64 {
        self.events
    }
}

/// Of what was sent.
pub(super) fn hash_of(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

fn time(now_ns: u64) -> String {
    format!("{:4}.{:06}", now_ns / 1_000_000_000, now_ns / 1000 % 1_000_000)
}
