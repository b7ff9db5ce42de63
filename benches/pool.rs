//! What does host memory cost that storages are cut from?
//!
//! Question: warm memory beside fresh, how many slabs it comes from, and what it costs to give it back.
//! Method: one thread, a pool of its own; warm: the median of 31 blocks of 10,000 allocations, each given back at once; fresh: 256 MiB.
//! Run: `cargo run --release -p farcall-benches --bin pool`.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::time::Instant;

use farcall::device::{DeviceError, HostPool};

const MIB: usize = 1 << 20;
const FRESH_BYTES: usize = 256 * MIB;
const ALLOCATIONS: u128 = 10_000;

fn main() -> Result<(), DeviceError> {
    println!("{:>12} {:>10} {:>12} {:>8} {:>14}", "bytes", "warm, ns", "fresh, ns", "slabs", "given back, ns");
    for len in [64 << 10, 2 * MIB, 8 * MIB] {
        let pool = HostPool::new(None);
        drop(pool.alloc(len)?);
        let mut warm = Vec::new();
        for _ in 0..31 {
            let start = Instant::now();
            for _ in 0..ALLOCATIONS {
                drop(pool.alloc(len)?);
            }
            warm.push(start.elapsed().as_nanos() / ALLOCATIONS);
        }
        warm.sort_unstable();
        pool.trim();
        let start = Instant::now();
        let blocks = (0..FRESH_BYTES / len).map(|_| pool.alloc(len)).collect::<Result<Vec<_>, _>>()?;
        let count = blocks.len() as u128;
        let fresh = start.elapsed().as_nanos() / count;
        let slabs = pool.stats().slabs;
        let start = Instant::now();
        drop(blocks);
        let back = start.elapsed().as_nanos() / count;
        println!("{len:>12} {:>10} {fresh:>12} {slabs:>8} {back:>14}", warm[warm.len() / 2]);
    }
    Ok(())
}
