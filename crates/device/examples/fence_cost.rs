//! What does the bookkeeping of fences cost a small operation?
//!
//! Medians of 200 batches of 1,000 on one core, in nanoseconds an operation, each mode in a runtime of its own. A kernel that does
//! nothing is launched over 0 to 2 reads, so what is left is the stream's work. Inline and unchecked is what production runs.
//! Run it with `cargo run --release -p farcall-device --example fence_cost`.
#![expect(clippy::print_stdout, reason = "an example prints what it shows")]

use std::hint::black_box;
use std::time::Instant;

use farcall_device::{Check, Config, CpuMode, Device, DeviceError, Runtime, Storage, Stream};

const BATCHES: usize = 200;
const BATCH: usize = 1000;

/// The median cost of one call, in nanoseconds. What piles up is waited for between the batches, out of the measurement.
fn median_ns(stream: &Stream, mut call: impl FnMut() -> Result<(), DeviceError>) -> Result<f64, DeviceError> {
    let mut batches = Vec::with_capacity(BATCHES);
    for _ in 0..BATCHES {
        let start = Instant::now();
        for _ in 0..BATCH {
            call()?;
        }
        batches.push(start.elapsed().as_nanos() as f64 / BATCH as f64);
        stream.synchronize(std::time::Duration::from_secs(60))?;
    }
    batches.sort_by(f64::total_cmp);
    Ok(batches[BATCHES / 2])
}

fn source(stream: &Stream) -> Result<Storage, DeviceError> {
    let mut bytes = stream.alloc(64)?;
    stream.fill(&mut bytes, 1)?;
    Ok(bytes.freeze(stream))
}

fn main() -> Result<(), DeviceError> {
    println!(
        "{:<24} {:>9} {:>9} {:>9} {:>13} {:>15}",
        "ns each, median", "0 reads", "1 read", "2 reads", "other stream", "alloc to bytes"
    );
    for (name, cpu, check) in [
        ("inline", CpuMode::Inline, Check::Off),
        ("inline, checked", CpuMode::Inline, Check::Panic),
        ("chaos, enqueue", CpuMode::Chaos { seed: 1 }, Check::Off),
        ("chaos, checked, enqueue", CpuMode::Chaos { seed: 1 }, Check::Panic),
    ] {
        let runtime = Runtime::new(Config { cpu, check, ..Config::default() })?;
        let [stream, other] = [runtime.stream(Device::HOST)?, runtime.stream(Device::HOST)?];
        let (first, second, foreign) = (source(&stream)?, source(&stream)?, source(&other)?);
        let mut target = stream.alloc(64)?;
        let mut launch = |reads: &[&Storage]| {
            median_ns(&stream, || {
                stream.launch(reads, &mut target, |reads, write| {
                    black_box((reads, write));
                })
            })
        };
        let costs = [launch(&[])?, launch(&[&first])?, launch(&[&first, &second])?, launch(&[&foreign])?];
        // What a receiver does for each small tensor.
        let host = median_ns(&stream, || {
            let storage = black_box(runtime.alloc_host(64)?).freeze_ready();
            black_box(storage.as_bytes()?);
            Ok(())
        })?;
        println!("{name:<24} {:>9.0} {:>9.0} {:>9.0} {:>13.0} {host:>15.0}", costs[0], costs[1], costs[2], costs[3]);
    }
    Ok(())
}
