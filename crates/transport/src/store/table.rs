//! A store's keys and who waits for them. Pure: calls in, clients to answer out.
//!
//! `C` is how the owner answers a client; the table only hands it back. See the invariants in [`super`].

use std::collections::HashMap;
use std::sync::Arc;

use super::{Refusal, StoreLimits, gone_key};

/// Names one wait of one client for as long as it is unanswered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct WaitId(u64);

/// What became of a request to wait.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// Every group has a key.
    Over,
    /// `C` comes back from the call that completes it, or by [`Table::withdraw`].
    For(WaitId),
}

#[derive(Debug)]
pub(super) struct Table<C> {
    limits: StoreLimits,
    values: HashMap<Box<str>, Arc<[u8]>>,
    /// What `values` costs, with the room kept for a `gone/` key of each client.
    bytes: usize,
    waits: HashMap<WaitId, Wait<C>>,
    /// For each key that does not exist and is waited for: the waits and their group.
    watchers: HashMap<Box<str>, Vec<(WaitId, u32)>>,
    next_wait: u64,
}

#[derive(Debug)]
struct Wait<C> {
    client: C,
    /// Each group's keys, emptied once one of them exists.
    groups: Vec<Vec<Box<str>>>,
    unmet: usize,
}

impl<C> Table<C> {
    pub(super) fn new(limits: StoreLimits) -> Self {
        Self { limits, values: HashMap::new(), bytes: 0, waits: HashMap::new(), watchers: HashMap::new(), next_wait: 0 }
    }

    /// A client arrives: keeps room for its `gone/` key, so that a full store still learns of its end.
    pub(super) fn enter(&mut self, identity: &str) -> Result<(), Refusal> {
        let key = gone_key(identity);
        self.check_key(&key)?;
        self.charge(entry_bytes(&key, &[]))
    }

    /// A client ends: in good order, or leaving its `gone/` key. Returns the clients whose waits are over.
    pub(super) fn end(&mut self, identity: &str, in_order: bool) -> Vec<C> {
        let key = gone_key(identity);
        self.bytes -= entry_bytes(&key, &[]);
        if in_order {
            return Vec::new();
        }
        match self.set(&key, &[]) {
            Ok(woken) => woken,
            Err(refusal) => unreachable!("room was kept for {key:?}: {refusal}"),
        }
    }

    /// Stores a value and returns the clients whose waits are over.
    pub(super) fn set(&mut self, key: &str, value: &[u8]) -> Result<Vec<C>, Refusal> {
        self.check_key(key)?;
        if value.len() > self.limits.value_bytes {
            let (bytes, limit_bytes) = (value.len() as u64, self.limits.value_bytes as u64);
            return Err(Refusal::Value { bytes, limit_bytes });
        }
        let replaced = self.values.get(key).map_or(0, |old| entry_bytes(key, old));
        self.bytes -= replaced;
        if let Err(refusal) = self.charge(entry_bytes(key, value)) {
            self.bytes += replaced;
            return Err(refusal);
        }
        self.values.insert(key.into(), value.into());
        Ok(self.wake(key))
    }

    pub(super) fn get(&self, key: &str) -> Option<Arc<[u8]>> {
        self.values.get(key).map(Arc::clone)
    }

    /// Adds to the decimal number at `key`; returns the sum and the clients whose waits are over.
    pub(super) fn add(&mut self, key: &str, amount: i64) -> Result<(i64, Vec<C>), Refusal> {
        let old = match self.values.get(key) {
            None => Some(0),
            Some(text) => str::from_utf8(text).ok().and_then(|text| text.parse::<i64>().ok()),
        };
        let Some(sum) = old.and_then(|old| old.checked_add(amount)) else {
            return Err(Refusal::NotANumber { key: key.to_owned() });
        };
        let woken = self.set(key, sum.to_string().as_bytes())?;
        Ok((sum, woken))
    }

    /// Waits for a key of each group, on behalf of `client`.
    pub(super) fn wait(&mut self, groups: &[Vec<&str>], client: C) -> Result<Waiting, Refusal> {
        let keys: usize = groups.iter().map(Vec::len).sum();
        if keys > self.limits.wait_keys {
            return Err(Refusal::WaitKeys { keys: keys as u64, limit: self.limits.wait_keys as u64 });
        }
        if groups.iter().any(Vec::is_empty) {
            return Err(Refusal::EmptyGroup);
        }
        groups.iter().flatten().try_for_each(|key| self.check_key(key))?;

        let is_met = |group: &Vec<&str>| group.iter().any(|key| self.values.contains_key(*key));
        let groups: Vec<Vec<Box<str>>> = groups
            .iter()
            .map(|group| if is_met(group) { Vec::new() } else { group.iter().map(|key| Box::from(*key)).collect() })
            .collect();
        let unmet = groups.iter().filter(|group| !group.is_empty()).count();
        if unmet == 0 {
            return Ok(Waiting::Over);
        }
        let id = WaitId(self.next_wait);
        self.next_wait += 1;
        for (index, key) in keys_of(&groups) {
            self.watchers.entry(key.clone()).or_default().push((id, index));
        }
        self.waits.insert(id, Wait { client, groups, unmet });
        Ok(Waiting::For(id))
    }

    /// Takes a wait back: the groups still without a key, or `None` if it was over before.
    pub(super) fn withdraw(&mut self, id: WaitId) -> Option<Vec<u32>> {
        let wait = self.waits.remove(&id)?;
        for (_, key) in keys_of(&wait.groups) {
            if let Some(watchers) = self.watchers.get_mut(key) {
                watchers.retain(|(watcher, _)| *watcher != id);
                if watchers.is_empty() {
                    self.watchers.remove(key);
                }
            }
        }
        let mut missing: Vec<u32> = keys_of(&wait.groups).map(|(index, _)| index).collect();
        missing.dedup();
        Some(missing)
    }

    /// How many waits are unanswered.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.waits.len()
    }

    /// `key` exists now: meets the groups that watch it and returns the clients with none left.
    fn wake(&mut self, key: &str) -> Vec<C> {
        let mut woken = Vec::new();
        for (id, index) in self.watchers.remove(key).unwrap_or_default() {
            let Some(wait) = self.waits.get_mut(&id) else { continue };
            let met = std::mem::take(&mut wait.groups[index as usize]);
            // Empty when the group names this key twice.
            wait.unmet -= usize::from(!met.is_empty());
            let over = wait.unmet == 0;
            for other in met.iter().filter(|other| ***other != *key) {
                self.forget(other, id, index);
            }
            if over {
                woken.extend(self.waits.remove(&id).map(|wait| wait.client));
            }
        }
        woken
    }

    /// A group was met by another of its keys: it watches this one no more.
    fn forget(&mut self, key: &str, id: WaitId, index: u32) {
        if let Some(watchers) = self.watchers.get_mut(key) {
            watchers.retain(|watcher| *watcher != (id, index));
            if watchers.is_empty() {
                self.watchers.remove(key);
            }
        }
    }

    fn check_key(&self, key: &str) -> Result<(), Refusal> {
        if key.is_empty() || key.len() > self.limits.key_bytes {
            return Err(Refusal::Key { bytes: key.len() as u64, limit_bytes: self.limits.key_bytes as u64 });
        }
        Ok(())
    }

    fn charge(&mut self, bytes: usize) -> Result<(), Refusal> {
        if self.bytes + bytes > self.limits.total_bytes {
            return Err(Refusal::Full { limit_bytes: self.limits.total_bytes as u64 });
        }
        self.bytes += bytes;
        Ok(())
    }
}

fn entry_bytes(key: &str, value: &[u8]) -> usize {
    key.len() + value.len() + StoreLimits::ENTRY_BYTES
}

/// The keys of all groups, each with its group's position.
fn keys_of(groups: &[Vec<Box<str>>]) -> impl Iterator<Item = (u32, &Box<str>)> {
    groups.iter().zip(0..).flat_map(|(group, index)| group.iter().map(move |key| (index, key)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table<&'static str> {
        Table::new(StoreLimits::default())
    }

    /// The id of a wait that is not over yet.
    fn pending(waiting: Result<Waiting, Refusal>) -> WaitId {
        match waiting {
            Ok(Waiting::For(id)) => id,
            other => panic!("not waiting: {other:?}"),
        }
    }

    /// S4, by a set: the one that completes the last group answers, and nothing of the wait stays behind.
    #[test]
    fn a_wait_is_answered_once_by_the_set_that_completes_it() {
        let mut table = table();
        let id = pending(table.wait(&[vec!["done/0", "gone/0"], vec!["done/1", "gone/1"]], "waiter"));
        assert!(table.set("done/0", b"").unwrap().is_empty());
        assert!(table.set("gone/0", b"").unwrap().is_empty(), "its group was met already");
        assert_eq!(table.set("gone/1", b"").unwrap(), ["waiter"]);
        assert_eq!(table.withdraw(id), None);
        assert!(table.set("done/1", b"").unwrap().is_empty());
        assert!(table.waits.is_empty() && table.watchers.is_empty());
    }

    /// S4, by a deadline or an end: the missing groups are named, later sets wake nobody.
    #[test]
    fn a_withdrawn_wait_names_what_was_missing_and_is_never_answered() {
        let mut table = table();
        let other = pending(table.wait(&[vec!["b"]], "other"));
        let id = pending(table.wait(&[vec!["a"], vec!["b", "c"], vec!["d"]], "waiter"));
        assert!(table.set("a", b"").unwrap().is_empty());
        assert_eq!(table.withdraw(id), Some(vec![1, 2]));
        assert_eq!(table.set("b", b"").unwrap(), ["other"]);
        assert_eq!(table.withdraw(other), None);
        assert!(table.waits.is_empty() && table.watchers.is_empty());
    }

    #[test]
    fn keys_may_repeat_within_and_across_groups() {
        let mut table = table();
        pending(table.wait(&[vec!["a", "a"], vec!["a", "b"]], "waiter"));
        assert_eq!(table.set("a", b"").unwrap(), ["waiter"]);
        assert!(table.waits.is_empty() && table.watchers.is_empty());
        assert_eq!(table.wait(&[vec!["x", "a"]], "late"), Ok(Waiting::Over));
        assert_eq!(table.wait(&[], "nothing"), Ok(Waiting::Over));
    }

    /// S3: also when the store is full.
    #[test]
    fn an_end_out_of_order_leaves_a_key_even_in_a_full_store() {
        let total_bytes = 2 * StoreLimits::ENTRY_BYTES + "gone/r1".len() + "k".len();
        let mut table = Table::new(StoreLimits { total_bytes, ..StoreLimits::default() });
        table.enter("r1").unwrap();
        table.set("k", b"").unwrap();
        assert_eq!(table.set("k", b"x"), Err(Refusal::Full { limit_bytes: total_bytes as u64 }));
        assert_eq!(table.get("k").as_deref(), Some(&b""[..]), "a refused value changes nothing");
        pending(table.wait(&[vec!["gone/r1"]], "waiter"));
        assert_eq!(table.end("r1", false), ["waiter"]);
        assert_eq!(table.bytes, total_bytes);
    }

    #[test]
    fn an_end_in_order_leaves_nothing() {
        let mut table = table();
        table.enter("r1").unwrap();
        assert!(table.end("r1", true).is_empty());
        assert_eq!((table.get("gone/r1"), table.bytes), (None, 0));
    }

    /// Two connections of one identity share its key, and the room is accounted for once.
    #[test]
    fn one_identity_may_end_twice() {
        let mut table = table();
        for _ in 0..2 {
            table.enter("r1").unwrap();
        }
        table.end("r1", false);
        table.end("r1", false);
        assert_eq!(table.bytes, entry_bytes("gone/r1", &[]));
    }

    #[test]
    fn sums_are_decimal_text_and_stay_in_range() {
        let mut table = table();
        pending(table.wait(&[vec!["n"]], "waiter"));
        assert_eq!(table.add("n", -3), Ok((-3, vec!["waiter"])));
        assert_eq!(table.add("n", 45), Ok((42, vec![])));
        assert_eq!(table.get("n").as_deref(), Some(&b"42"[..]));
        assert_eq!(table.add("n", i64::MAX), Err(Refusal::NotANumber { key: "n".into() }));
        table.set("text", b"4x").unwrap();
        assert_eq!(table.add("text", 1), Err(Refusal::NotANumber { key: "text".into() }));
    }

    /// S6: what is beyond a limit is refused, and nothing is kept of it.
    #[test]
    fn limits_hold_for_keys_values_and_waits() {
        let limits = StoreLimits { key_bytes: 8, value_bytes: 4, wait_keys: 3, ..StoreLimits::default() };
        let mut table = Table::new(limits);
        assert_eq!(table.set("", b""), Err(Refusal::Key { bytes: 0, limit_bytes: 8 }));
        assert_eq!(table.set("123456789", b""), Err(Refusal::Key { bytes: 9, limit_bytes: 8 }));
        assert_eq!(table.set("k", b"12345"), Err(Refusal::Value { bytes: 5, limit_bytes: 4 }));
        assert_eq!(table.enter("1234"), Err(Refusal::Key { bytes: 9, limit_bytes: 8 }));
        assert_eq!(table.wait(&[vec!["a"; 4]], "c"), Err(Refusal::WaitKeys { keys: 4, limit: 3 }));
        assert_eq!(table.wait(&[vec!["a"], vec![]], "c"), Err(Refusal::EmptyGroup));
        assert_eq!(table.wait(&[vec!["a", ""]], "c"), Err(Refusal::Key { bytes: 0, limit_bytes: 8 }));
        assert!(table.values.is_empty() && table.waits.is_empty() && table.watchers.is_empty());
        assert_eq!(table.bytes, 0);
    }
}
