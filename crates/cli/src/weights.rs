//! `farcall demo --weights FILE`: a real checkpoint is published by one worker to the others, version after version.
//!
//! The publisher changes every tensor in place between versions, and sends all of them to all readers at once, packed once
//! ([`Agent::to_all`]); each reader gathers a version beside the one that it shows, compares the digest (XXH3-64) of each tensor as it
//! lies there, and shows it when all are right ([`shelf`]). All memory is used again: after the first round a page fault is a failure.

mod file;
mod progress;
mod shelf;
mod warm;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::{Param, TensorMut, WorkerId};
use xxhash_rust::xxh3::xxh3_64;

use crate::Failure;
pub(crate) use file::check;
use progress::Progress;
pub(crate) use warm::ALLOCATOR;

use shelf::{Digests, Problem, Shelf, Spec, differences, digest};

/// Tensors travel in calls of about so many bytes, so that a reader copies some while others come.
const BATCH_BYTES: usize = 16 << 20;
/// Threads of a reader beside those that copy parts of a version.
const SPARE_THREADS: usize = 6;
/// How often they are all held: another one reads the connections each time.
const WAVES: usize = 4;
/// How long publishing a version may take.
const ROUND_MAX: Duration = Duration::from_secs(60);

// ---- a reader's functions ----

static SHELF: LazyLock<Shelf> = LazyLock::new(Shelf::default);

/// Takes memory for the versions to come.
#[farcall::function(name = "demo::weights::prepare")]
fn prepare(cx: &Call, tensors: Vec<Spec>) -> farcall::Result<()> {
    SHELF.prepare(&tensors)?;
    warm::heap();
    warm::program()?;
    // Over sockets a version is received into memory of the pool first: there must be some of each size.
    let mut memories = Vec::new();
    for Spec { dtype, shape, .. } in &tensors {
        let layout = farcall::Layout::contiguous(dtype.parse()?, shape)?;
        let mut memory = cx.agent().runtime().alloc_host(layout.size_bytes())?;
        memory.as_bytes_mut()?.fill(0);
        memories.push(memory);
    }
    Ok(())
}

/// Holds a thread until so many are held, and touches what each of them will use. Whether so many came.
#[farcall::function(name = "demo::weights::hold_threads")]
fn hold_threads(threads: usize) -> bool {
    warm::threads(threads)
}

/// The same for the thread that reads this worker's connections.
#[farcall::function(name = "demo::weights::touch", inline)]
fn touch() {
    warm::stack();
}

/// Gathers tensors of a version; gives those that could not be.
#[farcall::function(name = "demo::weights::receive")]
fn receive(version: u64, tensors: BTreeMap<String, Tensor>) -> Vec<Problem> {
    SHELF.receive(version, &tensors)
}

/// Shows a version, unless there are tensors that are not as they should be.
#[farcall::function(name = "demo::weights::publish")]
fn publish(version: u64, digests: Digests) -> Vec<Problem> {
    SHELF.publish(version, &digests)
}

/// The version that is shown, and the digest of its tensors' digests.
#[farcall::function(name = "demo::weights::current")]
fn current() -> farcall::Result<(u64, u64)> {
    let (version, tensors) = SHELF.current();
    Ok((version, combined(&digests(&tensors)?)))
}

/// The tensors of the version that is shown.
#[farcall::function(name = "demo::weights::give_back")]
fn give_back() -> BTreeMap<String, Tensor> {
    SHELF.current().1
}

/// This process's page faults since it was last asked.
#[farcall::function(name = "demo::weights::faults")]
fn new_faults() -> farcall::Result<u64> {
    static BEFORE: Mutex<u64> = Mutex::new(0);
    let mut before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner);
    let now = page_faults()?;
    let since = now.saturating_sub(std::mem::replace(&mut *before, now));
    Ok(since)
}

/// Minor and major faults of all threads so far: fields 10 and 12 of proc_pid_stat(5).
fn page_faults() -> farcall::Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let field = |number: usize| fields.split(' ').nth(number - 3).and_then(|field| field.parse::<u64>().ok());
    let (Some(minor), Some(major)) = (field(10), field(12)) else {
        return Err(farcall::Error::msg("/proc/self/stat has no page faults"));
    };
    Ok(minor + major)
}

fn digests(tensors: &BTreeMap<String, Tensor>) -> Result<Digests, farcall::DeviceError> {
    tensors.iter().map(|(name, tensor)| Ok((name.clone(), digest(tensor)?))).collect()
}

fn combined(digests: &Digests) -> u64 {
    let bytes: Vec<u8> = digests.values().flat_map(|digest| digest.to_le_bytes()).collect();
    xxh3_64(&bytes)
}

// ---- the publisher ----

/// The first worker's part.
pub(crate) fn tell(agent: &Agent, file: &Path, rounds: u64) -> Result<(), Failure> {
    let started = Instant::now();
    let weights = file::load(file)?;
    let others = agent.workers().map(|worker| worker.id.clone()).filter(|id| id != agent.worker());
    let mut publisher = Publisher::new(agent, weights, others.collect());
    println!(
        "{}: {} tensors, {} bytes, loaded in {:.1?}",
        file.display(),
        publisher.weights.len(),
        publisher.bytes,
        started.elapsed()
    );
    let specs: Vec<Spec> = publisher.weights.iter().map(|(name, param)| spec(name, param)).collect();
    agent.to_all(&publisher.readers).call(prepare, (&specs,)).wait().into_values()?;
    publisher.warm()?;
    let mut faulty = None;
    for round in 1..=rounds {
        let Round { rate, faults } = publisher.round(round, rounds)?;
        let readers = publisher.readers.len();
        let of = readers * publisher.weights.len();
        let total: u64 = faults.iter().map(|(_, faults)| faults).sum();
        println!(
            "  round {round}/{rounds}: {rate:.2} GB/s to all {readers} readers together, {of}/{of} digests equal, \
             {total} page faults"
        );
        if round > 1 && faulty.is_none() && total > 0 {
            faulty = Some((round, faults));
        }
    }
    publisher.fetch_back()?;
    let Some((round, faults)) = faulty else { return Ok(()) };
    let each: Vec<String> = faults.iter().map(|(worker, faults)| format!("{worker} {faults}")).collect();
    Err(format!("page faults after the first round, first in round {round}: {}", each.join(", ")).into())
}

fn spec(name: &str, param: &Param) -> Spec {
    Spec { name: name.to_owned(), dtype: param.dtype().to_string(), shape: param.shape().to_vec() }
}

struct Publisher<'a> {
    agent: &'a Agent,
    weights: BTreeMap<String, Param>,
    bytes: usize,
    readers: Vec<WorkerId>,
    /// What readers are to show now: the version, and the digest of its digests.
    shown: Option<(u64, u64)>,
    digests: Digests,
}

/// What a round has come to.
struct Round {
    /// In GB/s, all readers together.
    rate: f64,
    /// Of each reader.
    faults: Vec<(String, u64)>,
}

impl<'a> Publisher<'a> {
    fn new(agent: &'a Agent, weights: BTreeMap<String, Param>, readers: Vec<WorkerId>) -> Self {
        let bytes = weights.values().map(|param| param.value().storage().len()).sum();
        Self { agent, weights, bytes, readers, shown: None, digests: Digests::new() }
    }

    /// Has every reader start the threads that it will need, and touch their memory.
    fn warm(&self) -> Result<(), Failure> {
        let tensors = self.weights.iter().map(|(name, param)| (name.clone(), param.value()));
        let threads = batches(tensors.collect()).len() + SPARE_THREADS;
        let to_all = || self.agent.to_all(&self.readers);
        for wave in 1..=WAVES {
            let calls: Vec<_> = (0..threads).map(|_| to_all().call(hold_threads, (wave * threads,))).collect();
            for replies in calls {
                replies.wait().into_values()?;
            }
            // Who reads the connections was not held.
            to_all().call(touch, ()).wait().into_values()?;
        }
        Ok(())
    }

    /// Publishes a version: the first is the file's, each later one differs from it in every byte.
    fn round(&mut self, version: u64, rounds: u64) -> Result<Round, Failure> {
        if version > 1 {
            self.change(version)?;
        }
        let tensors: BTreeMap<String, Tensor> =
            self.weights.iter().map(|(name, param)| (name.clone(), param.value())).collect();
        self.digests = digests(&tensors)?;
        let batches = batches(tensors);
        let to_all = || self.agent.to_all(&self.readers).deadline(ROUND_MAX);
        let mut progress = Progress::new(version, rounds, batches.len());
        let started = Instant::now();
        let sent: Vec<_> = batches.iter().map(|batch| to_all().call(receive, (version, batch))).collect();
        // Readers are asked for what they show while the next version arrives.
        let meanwhile = self.shown.map(|shown| (shown, to_all().call(current, ())));
        drop(batches);
        let mut problems = Vec::new();
        for replies in sent {
            for (worker, found) in replies.wait().into_values()? {
                problems.extend(found.into_iter().map(|problem| (worker.to_string(), problem)));
            }
            progress.advance();
        }
        for (worker, found) in to_all().call(publish, (version, &self.digests)).wait().into_values()? {
            problems.extend(found.into_iter().map(|problem| (worker.to_string(), problem)));
        }
        let rate = (self.readers.len() * self.bytes) as f64 / started.elapsed().as_secs_f64() / 1e9;
        drop(progress);
        expect_none(version, &problems)?;
        if let Some((shown, replies)) = meanwhile {
            expect_shown(shown, replies.wait())?;
        }
        let shown = (version, combined(&self.digests));
        expect_shown(shown, to_all().call(current, ()).wait())?;
        self.shown = Some(shown);
        let faults = to_all().call(new_faults, ()).wait().into_values()?;
        let faults = faults.into_iter().map(|(worker, faults)| (worker.to_string(), faults));
        Ok(Round { rate, faults: faults.collect() })
    }

    /// Changes every byte of every tensor, in place: no reader borrows them any more.
    fn change(&self, version: u64) -> Result<(), Failure> {
        let stream = self.agent.runtime().stream(Device::HOST)?;
        for param in self.weights.values() {
            let mask = if param.dtype() == DType::Bool { 1 } else { (version as u8).wrapping_mul(2) | 1 };
            let mut step = param.write(&stream)?;
            let flip = move |_: &[&[u8]], bytes: &mut [u8]| bytes.iter_mut().for_each(|byte| *byte ^= mask);
            stream.launch(&[], step.tensor_mut().storage_mut(), flip)?;
        }
        Ok(())
    }

    /// The first reader gives back what it shows, into memory of this worker.
    fn fetch_back(&self) -> Result<(), Failure> {
        let Some(first) = self.readers.first() else { return Ok(()) };
        let empty = |param: &Param| -> Result<Param, Failure> {
            Ok(Param::new(TensorMut::empty(param.dtype(), param.shape())?.freeze_ready()))
        };
        let names: Vec<&String> = self.weights.keys().collect();
        let params = self.weights.values().map(empty).collect::<Result<Vec<_>, _>>()?;
        let started = Instant::now();
        drop(self.agent.to(first).deadline(ROUND_MAX).call(give_back, ()).into_each(&params).wait()?);
        let rate = self.bytes as f64 / started.elapsed().as_secs_f64() / 1e9;
        let found = names.into_iter().zip(&params).map(|(name, param)| Ok((name.clone(), digest(&param.value())?)));
        let found = found.collect::<Result<Digests, farcall::DeviceError>>()?;
        let problems = differences(&self.digests, &found).into_iter().map(|problem| (first.name.to_string(), problem));
        expect_none(self.shown.map_or(0, |(version, _)| version), &problems.collect::<Vec<_>>())?;
        println!(
            "  back from {first} into this worker's own memory: {rate:.2} GB/s, {0}/{0} digests equal",
            found.len()
        );
        Ok(())
    }
}

/// In calls of about [`BATCH_BYTES`], in the order of their names.
fn batches(tensors: BTreeMap<String, Tensor>) -> Vec<BTreeMap<String, Tensor>> {
    let mut batches: Vec<BTreeMap<String, Tensor>> = Vec::new();
    let mut room = 0_usize;
    for (name, tensor) in tensors {
        let bytes = tensor.storage().len();
        if room < bytes || batches.is_empty() {
            batches.push(BTreeMap::new());
            room = BATCH_BYTES;
        }
        room = room.saturating_sub(bytes);
        if let Some(last) = batches.last_mut() {
            last.insert(name, tensor);
        }
    }
    batches
}

/// Fails with every tensor that is not as it should be, and where.
fn expect_none(version: u64, problems: &[(String, Problem)]) -> Result<(), Failure> {
    if problems.is_empty() {
        return Ok(());
    }
    let each: Vec<String> =
        problems.iter().map(|(worker, (name, why))| format!("tensor {name} on {worker}: {why}")).collect();
    Err(format!("version {version} is not whole: {}", each.join("; ")).into())
}

fn expect_shown(shown: (u64, u64), found: farcall::Outcomes<(u64, u64)>) -> Result<(), Failure> {
    for (worker, found) in found.into_values()? {
        if found != shown {
            let ((version, digest), (found_version, found_digest)) = (shown, found);
            return Err(format!(
                "{worker} shows version {found_version} with digest {found_digest:#018x}, expected version {version} with \
                 {digest:#018x}"
            )
            .into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_tensor_once_and_none_is_much_too_large() {
        let lens = [0, 10, BATCH_BYTES, BATCH_BYTES + 1, 5, BATCH_BYTES / 2, BATCH_BYTES / 2, 1];
        let tensor = |len| TensorMut::empty(DType::U8, &[len]).expect("memory").freeze_ready();
        let tensors: BTreeMap<_, _> =
            lens.iter().enumerate().map(|(index, len)| (format!("{index}"), tensor(*len))).collect();
        let batches = batches(tensors);
        let names: Vec<_> = batches.iter().flat_map(BTreeMap::keys).cloned().collect();
        assert_eq!(names, ["0", "1", "2", "3", "4", "5", "6", "7"]);
        for batch in &batches {
            let bytes: usize = batch.values().map(|tensor| tensor.storage().len()).sum();
            assert!(bytes <= BATCH_BYTES || batch.len() == 1, "{bytes} bytes of {}", batch.len());
        }
    }

    #[test]
    fn faults_are_counted() {
        let before = page_faults().expect("a counter");
        let touched = vec![1_u8; 8 << 20];
        let after = page_faults().expect("a counter");
        assert!(touched.iter().all(|byte| *byte == 1) && after > before, "{before} {after}");
    }
}
