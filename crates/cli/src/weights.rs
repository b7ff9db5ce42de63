//! `farcall demo --weights FILE`: a real checkpoint goes from one worker to the others and back.
//!
//! The file is mapped; each tensor is copied once into memory that farcall recycles. The digests are XXH3-64 of each
//! tensor's bytes, made by the worker that holds them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use farcall::TensorMut;
use farcall::prelude::*;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use xxhash_rust::xxh3::xxh3_64;

use crate::Failure;

type Weights = BTreeMap<String, Tensor>;

/// The checkpoint a worker was given.
static KEPT: Mutex<Weights> = Mutex::new(Weights::new());

/// Keeps a checkpoint in this worker.
#[farcall::function(name = "demo::weights::keep")]
fn keep(weights: Weights) {
    *KEPT.lock().unwrap_or_else(PoisonError::into_inner) = weights;
}

/// The digest of each tensor as this worker holds it.
#[farcall::function(name = "demo::weights::digests")]
fn kept_digests() -> farcall::Result<BTreeMap<String, u64>> {
    Ok(digests(&KEPT.lock().unwrap_or_else(PoisonError::into_inner))?)
}

/// Gives the checkpoint back.
#[farcall::function(name = "demo::weights::give_back")]
fn give_back() -> Weights {
    std::mem::take(&mut *KEPT.lock().unwrap_or_else(PoisonError::into_inner))
}

fn digests(weights: &Weights) -> Result<BTreeMap<String, u64>, farcall::DeviceError> {
    weights.iter().map(|(name, tensor)| Ok((name.clone(), xxh3_64(tensor.storage().as_bytes()?)))).collect()
}

fn dtype(dtype: Dtype) -> Result<DType, Failure> {
    Ok(match dtype {
        Dtype::BOOL => DType::Bool,
        Dtype::U8 => DType::U8,
        Dtype::I8 => DType::I8,
        Dtype::U16 => DType::U16,
        Dtype::I16 => DType::I16,
        Dtype::U32 => DType::U32,
        Dtype::I32 => DType::I32,
        Dtype::U64 => DType::U64,
        Dtype::I64 => DType::I64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::F8_E5M2 => DType::F8E5M2,
        other => return Err(format!("dtype {other:?} is not one of farcall's").into()),
    })
}

fn map(file: &Path) -> Result<Mmap, Failure> {
    let opened = File::open(file).map_err(|error| format!("cannot open {}: {error}", file.display()))?;
    #[expect(unsafe_code, reason = "memmap2 cannot know that nobody truncates the file meanwhile")]
    // SAFETY: the file is only read; who truncates a checkpoint while it is loaded ends this demo with SIGBUS.
    let mapped = unsafe { Mmap::map(&opened) };
    Ok(mapped.map_err(|error| format!("cannot map {}: {error}", file.display()))?)
}

fn parse<'a>(file: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>, Failure> {
    SafeTensors::deserialize(bytes)
        .map_err(|error| format!("{} is not a valid safetensors file: {error}", file.display()).into())
}

/// Whether `file` can be sent, found out before any worker starts.
pub(crate) fn check(file: &Path) -> Result<(), Failure> {
    let bytes = map(file)?;
    for (name, view) in parse(file, &bytes)?.tensors() {
        dtype(view.dtype()).map_err(|error| format!("tensor {name}: {error}"))?;
    }
    Ok(())
}

fn load(file: &Path) -> Result<Weights, Failure> {
    let bytes = map(file)?;
    let mut weights = Weights::new();
    for (name, view) in parse(file, &bytes)?.tensors() {
        let mut tensor = TensorMut::empty(dtype(view.dtype())?, view.shape())?;
        tensor.storage_mut().as_bytes_mut()?.copy_from_slice(view.data());
        weights.insert(name, tensor.freeze_ready());
    }
    Ok(weights)
}

/// The first worker's part.
pub(crate) fn tell(agent: &Agent, file: &Path) -> Result<(), Failure> {
    let started = Instant::now();
    let weights = load(file)?;
    let bytes: usize = weights.values().map(|tensor| tensor.storage().len()).sum();
    let expected = digests(&weights)?;
    println!("{}: {} tensors, {bytes} bytes, loaded in {:.1?}", file.display(), weights.len(), started.elapsed());
    let rate = |started: Instant, times: usize| (times * bytes) as f64 / started.elapsed().as_secs_f64() / 1e9;
    let others: Vec<_> = agent.workers().map(|worker| worker.id.clone()).filter(|id| id != agent.worker()).collect();
    for id in &others {
        let started = Instant::now();
        agent.to(id).call(keep, (&weights,)).wait()?;
        let there = rate(started, 1);
        let digests = agent.to(id).call(kept_digests, ()).wait()?;
        compare(&format!("on {id}"), &expected, &digests)?;
        let started = Instant::now();
        let back = agent.to(id).call(give_back, ()).wait()?;
        let home = rate(started, 1);
        compare(&format!("back from {id}"), &expected, &self::digests(&back)?)?;
        println!(
            "  {id}: {there:.2} GB/s there, {home:.2} GB/s back, {} of {} digests equal both ways",
            digests.len(),
            expected.len()
        );
    }
    let started = Instant::now();
    let replies: Vec<_> = others.iter().map(|id| agent.to(id).call(keep, (&weights,))).collect();
    for reply in replies {
        reply.wait()?;
    }
    println!("  all {} at once: {:.2} GB/s together", others.len(), rate(started, others.len()));
    for id in &others {
        compare(&format!("on {id}"), &expected, &agent.to(id).call(kept_digests, ()).wait()?)?;
    }
    println!("  all digests equal");
    Ok(())
}

fn compare(place: &str, expected: &BTreeMap<String, u64>, found: &BTreeMap<String, u64>) -> Result<(), Failure> {
    let differs = expected.iter().find(|(name, digest)| found.get(*name) != Some(digest));
    match differs {
        Some((name, digest)) => {
            let found = found.get(name).map_or_else(|| "missing".to_owned(), |found| format!("{found:#018x}"));
            Err(format!("tensor {name} {place}: digest {found}, expected {digest:#018x}").into())
        }
        None if found.len() != expected.len() => {
            Err(format!("{} tensors {place}, {} were sent", found.len(), expected.len()).into())
        }
        None => Ok(()),
    }
}
