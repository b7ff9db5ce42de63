//! What a reader holds of a checkpoint: the version that it shows, and the one that arrives.
//!
//! Two sets of parameters take turns. A version is written into the set that is not shown, and shown once all of it is there and
//! right; the next one is written over the set that was shown before.
//! Invariant V1: who looks sees one whole version, and keeps it, whatever arrives meanwhile.
//! Invariant V2: a version of which a tensor is missing or differs is not shown; each such tensor is named.
//! Invariant V3: memory is taken in [`Shelf::prepare`] alone, as long as nobody keeps an old version.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use farcall::prelude::*;
use farcall::{DeviceError, Param, TensorMut};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// How long a copy on a stream may take.
const COPY_MAX: Duration = Duration::from_secs(30);

type Set = BTreeMap<String, Param>;

/// XXH3-64 of tensors' bytes, by name.
pub(super) type Digests = BTreeMap<String, u64>;

/// A tensor that is not as it should be, and why.
pub(super) type Problem = (String, String);

/// A tensor to come.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Spec {
    pub(super) name: String,
    /// Its dtype's name.
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Shelf(Mutex<State>);

#[derive(Default)]
struct State {
    /// 0 before the first.
    version: u64,
    shown: Arc<Set>,
    arriving: Arc<Set>,
    /// The digest of each tensor of the next version that has arrived, as its bytes lie here.
    arrived: Digests,
}

impl Shelf {
    /// Takes memory for two sets of `tensors`, and touches all of it. No version is shown any more.
    pub(super) fn prepare(&self, tensors: &[Spec]) -> farcall::Result<()> {
        let set = || -> farcall::Result<Arc<Set>> {
            let params = tensors.iter().map(|Spec { name, dtype, shape }| {
                let mut tensor = TensorMut::empty(dtype.parse()?, shape)?;
                tensor.storage_mut().as_bytes_mut()?.fill(0);
                Ok((name.clone(), Param::new(tensor.freeze_ready())))
            });
            params.collect::<farcall::Result<Set>>().map(Arc::new)
        };
        *self.lock() = State { version: 0, shown: set()?, arriving: set()?, arrived: Digests::new() };
        Ok(())
    }

    /// Copies tensors of `version` to where it is gathered; gives those that could not be, and all if it is not the next version.
    pub(super) fn receive(&self, version: u64, tensors: &BTreeMap<String, Tensor>) -> Vec<Problem> {
        let set = match self.expect_next(version) {
            Ok(state) => Arc::clone(&state.arriving),
            Err(why) => return tensors.keys().map(|name| (name.clone(), why.clone())).collect(),
        };
        // Without the lock: other tensors arrive meanwhile, and somebody may look.
        let mut problems = Vec::new();
        let mut arrived = Digests::new();
        for (name, tensor) in tensors {
            let Some(param) = set.get(name) else {
                problems.push((name.clone(), "it is none of those that were announced".to_owned()));
                continue;
            };
            match param.copy_from(tensor).and_then(|()| digest(&param.value())) {
                Ok(digest) => drop(arrived.insert(name.clone(), digest)),
                Err(error) => problems.push((name.clone(), error.to_string())),
            }
        }
        match self.expect_next(version) {
            Ok(mut state) => state.arrived.append(&mut arrived),
            Err(why) => problems.extend(arrived.into_keys().map(|name| (name, why.clone()))),
        }
        problems
    }

    /// Shows `version` if each tensor is there with its expected digest; else gives those that are not, and the version may be sent
    /// again.
    pub(super) fn publish(&self, version: u64, expected: &Digests) -> Vec<Problem> {
        let mut state = match self.expect_next(version) {
            Ok(state) => state,
            Err(why) => return expected.keys().map(|name| (name.clone(), why.clone())).collect(),
        };
        let arrived = std::mem::take(&mut state.arrived);
        let problems = differences(expected, &arrived);
        if problems.is_empty() {
            let State { version: shown_version, shown, arriving, .. } = &mut *state;
            (*shown_version, _) = (version, std::mem::swap(shown, arriving));
        }
        problems
    }

    /// The version that is shown, and its tensors (V1).
    pub(super) fn current(&self) -> (u64, BTreeMap<String, Tensor>) {
        let state = self.lock();
        (state.version, state.shown.iter().map(|(name, param)| (name.clone(), param.value())).collect())
    }

    fn expect_next(&self, version: u64) -> Result<MutexGuard<'_, State>, String> {
        let state = self.lock();
        match state.version + 1 {
            next if next == version => Ok(state),
            next => Err(format!("it is of version {version}, and version {next} is next")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What of `found` is not as expected, tensor by tensor.
pub(super) fn differences(expected: &Digests, found: &Digests) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (name, digest) in expected {
        match found.get(name) {
            Some(found) if found == digest => {}
            Some(found) => problems.push((name.clone(), format!("digest {found:#018x}, expected {digest:#018x}"))),
            None => problems.push((name.clone(), "it did not arrive".to_owned())),
        }
    }
    let unexpected = found.keys().filter(|name| !expected.contains_key(*name));
    problems.extend(unexpected.map(|name| (name.clone(), "it was not expected".to_owned())));
    problems
}

/// Of a tensor's bytes, once they are there.
pub(super) fn digest(tensor: &Tensor) -> Result<u64, DeviceError> {
    tensor.storage().ready_event().block(COPY_MAX)?;
    Ok(xxh3_64(&tensor.storage().as_bytes()?[tensor.layout().byte_span()]))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use super::*;

    const LEN: usize = 50_000;
    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn shelf() -> Shelf {
        let shelf = Shelf::default();
        let specs = NAMES.map(|name| Spec { name: name.into(), dtype: "u8".into(), shape: vec![LEN] });
        shelf.prepare(&specs).expect("memory");
        shelf
    }

    /// Each tensor's bytes are all the version's number.
    fn tensors(version: u64) -> BTreeMap<String, Tensor> {
        let tensor = || Tensor::full(version as u8, &[LEN]).expect("memory");
        NAMES.iter().map(|name| ((*name).to_owned(), tensor())).collect()
    }

    fn digests(tensors: &BTreeMap<String, Tensor>) -> Digests {
        tensors.iter().map(|(name, tensor)| (name.clone(), digest(tensor).expect("ready"))).collect()
    }

    /// V1, with three threads that look all the time, some of which keep what they saw for a while.
    #[test]
    fn v1_who_looks_sees_one_whole_version() {
        let shelf = shelf();
        let (stop, looks) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for looker in 0..3 {
                let (shelf, stop, looks) = (&shelf, &stop, &looks);
                scope.spawn(move || {
                    let (mut last, mut kept) = (0, Vec::new());
                    while !stop.load(Ordering::Acquire) {
                        let (version, tensors) = shelf.current();
                        assert!(version >= last, "versions go on");
                        kept.push((version, tensors));
                        for (version, tensors) in &kept {
                            for tensor in tensors.values() {
                                assert!(tensor.to_vec::<u8>().expect("u8").iter().all(|byte| *byte == *version as u8));
                            }
                        }
                        if kept.len() > looker {
                            kept.clear();
                        }
                        last = version;
                        looks.fetch_add(1, Ordering::AcqRel);
                    }
                });
            }
            for version in 1..=60 {
                let seen = looks.load(Ordering::Acquire);
                let tensors = tensors(version);
                for (name, tensor) in &tensors {
                    let one = BTreeMap::from([(name.clone(), tensor.clone())]);
                    assert_eq!(shelf.receive(version, &one), []);
                }
                assert_eq!(shelf.publish(version, &digests(&tensors)), []);
                // At least one looks in between, in most rounds while the next version arrives.
                while looks.load(Ordering::Acquire) == seen {
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Release);
        });
        assert_eq!(shelf.current().0, 60);
    }

    /// V2.
    #[test]
    fn v2_what_is_missing_or_differs_is_named_and_not_shown() {
        let shelf = shelf();
        let (first, second) = (tensors(1), tensors(2));
        assert_eq!(shelf.receive(1, &first), []);
        assert_eq!(shelf.publish(1, &digests(&first)), []);
        let mut part = second.clone();
        part.remove("c");
        part.insert("b".to_owned(), Tensor::full(9_u8, &[LEN]).expect("memory"));
        part.insert("d".to_owned(), Tensor::full(9_u8, &[LEN]).expect("memory"));
        let problems = shelf.receive(2, &part);
        assert_eq!(problems, [("d".to_owned(), "it is none of those that were announced".to_owned())]);
        let problems = shelf.publish(2, &digests(&second));
        assert_eq!(problems.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), ["b", "c"]);
        assert!(problems[0].1.starts_with("digest 0x") && problems[1].1 == "it did not arrive", "{problems:?}");
        assert_eq!((shelf.current().0, digests(&shelf.current().1)), (1, digests(&first)), "as before");
        // A tensor of another shape is named, and the version may be sent again.
        let mut wrong = second.clone();
        wrong.insert("a".to_owned(), Tensor::full(2_u8, &[LEN + 1]).expect("memory"));
        let problems = shelf.receive(2, &wrong);
        assert!(problems.len() == 1 && problems[0].0 == "a", "{problems:?}");
        assert_eq!(shelf.receive(2, &second), []);
        assert_eq!(shelf.publish(2, &digests(&second)), []);
        assert_eq!(shelf.current().0, 2);
        let late = shelf.receive(2, &second);
        assert!(late.len() == 3 && late[0].1 == "it is of version 2, and version 3 is next", "{late:?}");
        assert_eq!(shelf.publish(4, &digests(&second)).len(), 3);
    }

    /// V3: the same memory, version after version.
    #[test]
    fn v3_versions_take_turns_in_two_sets_of_memory() {
        let shelf = shelf();
        let mut addresses = Vec::new();
        for version in 1..=6 {
            let tensors = tensors(version);
            assert_eq!(shelf.receive(version, &tensors), []);
            assert_eq!(shelf.publish(version, &digests(&tensors)), []);
            addresses.push(shelf.current().1["b"].storage().as_ptr());
        }
        assert_eq!((addresses[0], addresses[1]), (addresses[2], addresses[3]));
        assert_eq!((addresses[2], addresses[3]), (addresses[4], addresses[5]));
        assert_ne!(addresses[0], addresses[1]);
    }
}
