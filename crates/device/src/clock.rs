//! Vector clocks: for each stream, how many of its operations lie before a point.
//!
//! Pure. Two things are read off them: whether a wait is redundant, and whether two uses of a storage are ordered at all.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::{Event, StreamId};

/// Entries of a stream's clock from which on those that the host knows to be over are dropped.
const ENTRIES_MAX: usize = 64;
/// Streams that the host's clock remembers.
const KNOWN_MAX: usize = 4096;

/// What lies before a point of a stream, besides that stream's own operations. Sorted by stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Clock(Vec<(StreamId, u64)>);

impl Clock {
    pub(crate) fn covers(&self, stream: StreamId, ticket: u64) -> bool {
        ticket == 0 || self.0.binary_search_by_key(&stream, |entry| entry.0).is_ok_and(|at| self.0[at].1 >= ticket)
    }

    pub(crate) fn advance(&mut self, stream: StreamId, ticket: u64) {
        match self.0.binary_search_by_key(&stream, |entry| entry.0) {
            Ok(at) => self.0[at].1 = self.0[at].1.max(ticket),
            Err(at) => self.0.insert(at, (stream, ticket)),
        }
    }

    /// Adds all that lies before `event`, and its own stream up to it.
    pub(crate) fn join(&mut self, event: &Event) {
        for &(stream, ticket) in event.clock().map_or(&[][..], |clock| &clock.0) {
            self.advance(stream, ticket);
        }
        self.advance(event.stream(), event.ticket());
    }

    /// Drops what the host knows to be over, once there is much: coverage is asked of both.
    pub(crate) fn prune(&mut self, host: &HostClock) {
        if self.0.len() > ENTRIES_MAX {
            self.0.retain(|&(stream, ticket)| !host.covers(stream, ticket));
        }
    }
}

/// What the host knows to be over: all that lies before an event it has seen complete. One for the whole runtime, so what one
/// task has learned counts for all: lenient.
#[derive(Debug, Default)]
pub(crate) struct HostClock {
    known: HashMap<StreamId, u64>,
    /// Streams that are leased now.
    live: HashSet<StreamId>,
    /// Streams below it whose lease ended are forgotten: what bounds the memory of a long run.
    floor: StreamId,
}

impl HostClock {
    /// Whether the operation is over: what waits are left out by.
    pub(crate) fn knows(&self, stream: StreamId, ticket: u64) -> bool {
        ticket == 0 || self.known.get(&stream).is_some_and(|known| *known >= ticket)
    }

    /// Whether the host may have known: what races are judged by, so that nothing forgotten is a false alarm.
    pub(crate) fn covers(&self, stream: StreamId, ticket: u64) -> bool {
        self.knows(stream, ticket) || (stream < self.floor && !self.live.contains(&stream))
    }

    pub(crate) fn begin(&mut self, stream: StreamId) {
        self.live.insert(stream);
    }

    pub(crate) fn end(&mut self, stream: StreamId) {
        self.live.remove(&stream);
    }

    /// An event was seen complete, before which `clock` lies.
    pub(crate) fn learn(&mut self, stream: StreamId, ticket: u64, clock: Option<&Clock>) {
        if self.knows(stream, ticket) {
            return;
        }
        let before = clock.into_iter().flat_map(|clock| clock.0.iter().copied());
        for (stream, ticket) in before.chain([(stream, ticket)]) {
            let known = self.known.entry(stream).or_default();
            *known = ticket.max(*known);
        }
        if self.known.len() > KNOWN_MAX {
            let mut ended: Vec<_> = self.known.keys().copied().filter(|stream| !self.live.contains(stream)).collect();
            ended.sort_unstable();
            if let Some(middle) = ended.get(ended.len() / 2) {
                self.floor = self.floor.max(*middle);
                let Self { known, live, floor } = self;
                known.retain(|stream, _| *stream >= *floor || live.contains(stream));
            }
        }
    }
}

/// Adds to a clock that is shared with the events recorded so far.
pub(crate) fn join_shared(clock: &mut Option<Arc<Clock>>, event: &Event, host: &HostClock) {
    let clock = Arc::make_mut(clock.get_or_insert_default());
    clock.join(event);
    clock.prune(host);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_covers_what_was_joined_and_no_more() {
        let [first, second] = [StreamId::fresh(), StreamId::fresh()];
        let mut clock = Clock::default();
        assert!(clock.covers(first, 0) && !clock.covers(first, 1));
        clock.join(&Event::complete_at(second, 4));
        clock.join(&Event::complete_at(first, 2));
        clock.join(&Event::complete_at(second, 3));
        assert!(clock.covers(first, 2) && clock.covers(second, 4));
        assert!(!clock.covers(first, 3) && !clock.covers(second, 5));
    }

    #[test]
    fn the_hosts_memory_is_bounded_and_forgets_no_live_stream() {
        let mut host = HostClock::default();
        let live = StreamId::fresh();
        host.begin(live);
        host.learn(live, 1, None);
        let pending = StreamId::fresh();
        let ended: Vec<_> = (0..2 * KNOWN_MAX).map(|_| StreamId::fresh()).collect();
        for stream in &ended {
            host.learn(*stream, 1, None);
        }
        assert!(host.known.len() <= KNOWN_MAX + 1);
        assert!(ended.iter().all(|stream| host.covers(*stream, 1)), "no false alarm for any");
        assert!(host.covers(live, 1) && !host.covers(live, 2));
        assert!(!host.knows(pending, 1), "work that may be pending is waited for");
        assert!(!host.covers(StreamId::fresh(), 1));
    }
}
