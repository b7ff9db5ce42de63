//! Groups of agents on a simulated network: what a seed decides is done to them, and what must hold all the same.
//!
//! [`run`] makes a group of a few workers, has them make some hundred calls of all kinds, breaks the network, the processes and
//! their clocks meanwhile, heals everything, and looks at what came of it. The agents are those of every program, on
//! [`farcall_transport::sim`]. A failure is replayed by its seed: the same seed gives the same trace, to the last event.
//!
//! - `plan`: what happens when, drawn from the seed.
//! - `functions`: what the workers serve.
//! - `cluster`: the workers, the calls they make, the faults as they are done.
//! - `model`: what is known of each call, and the invariants.
//!
//! Checked: BOUNDED (a call has its outcome by its deadline; a lost peer is noticed in 2 s; an error fits what was done), ONCE
//! (a function runs at most once per call, and did if there is a value), values, LIMITS (windows and bytes are never exceeded),
//! and that nothing is left over: once all is healed every worker reaches every other, and no call, frame, transfer, key or
//! connection stays behind.

mod cluster;
mod functions;
mod model;
mod plan;

use std::collections::BTreeMap;

pub use cluster::{Print, run};
#[cfg(feature = "planted")]
pub use farcall_transport::planted;

/// What came of one seed.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The hash of everything that happened, in order.
    pub hash: u64,
    /// Events of the network and of the processes.
    pub events: u64,
    /// Calls by their outcome.
    pub calls: BTreeMap<&'static str, u64>,
    /// Faults that were done, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// What must not be: empty, or the simulation has found a bug.
    pub violations: Vec<String>,
}

impl Report {
    /// Adds another seed's numbers to these.
    pub fn add(&mut self, other: &Self) {
        self.events += other.events;
        for (to, from) in [(&mut self.calls, &other.calls), (&mut self.faults, &other.faults)] {
            from.iter().for_each(|(name, count)| *to.entry(name).or_default() += count);
        }
        self.violations.extend(other.violations.iter().cloned());
    }
}
