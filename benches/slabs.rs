//! What does a tensor cost between two workers of one host?
//!
//! Question: `sink` of a tensor in a slab from 8 B to 1 GiB beside the same call with 8 B; `read` of it beside a read of memory
//! that is mapped already; `sink` of foreign memory beside one warm copy into a slab; `echo`; page faults per call once warm.
//! Method: two processes, left to the scheduler; what is compared alternates within one run; medians over blocks, with the
//! lowest and highest. Read the ratios: wall time is for a quiet machine.
//! Run: `cargo run --release -p farcall-benches --bin slabs`.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]
#![expect(unsafe_code, reason = "wraps foreign memory")]

use std::hint::black_box;
use std::process::{Command, Stdio};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farcall::device::{Release, copy};
use farcall::prelude::*;
use farcall::{Layout, Storage, StoreServer, TensorMut};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const BLOCKS: usize = 9;
const MIB: usize = 1 << 20;

/// Takes a tensor, gives its length.
#[farcall::function(name = "bench::sink")]
fn sink(x: Tensor) -> u64 {
    x.numel() as u64
}

/// Adds all words of a tensor.
#[farcall::function(name = "bench::read")]
fn read(x: Tensor) -> farcall::Result<u64> {
    Ok(sum(x.as_slice::<u8>()?))
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let words = words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_le_bytes(*word)));
    words.wrapping_add(rest.iter().map(|byte| u64::from(*byte)).sum())
}

/// Gives a tensor back.
#[farcall::function(name = "bench::echo")]
fn echo(x: Tensor) -> Tensor {
    x
}

/// This process's minor page faults so far.
#[farcall::function(name = "bench::faults")]
fn faults() -> farcall::Result<u64> {
    page_faults().map_err(farcall::Error::msg)
}

fn page_faults() -> Result<u64, String> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|error| error.to_string())?;
    // The fields after the command's name, which may hold spaces: state is field 3, minflt field 10.
    let fields = stat.rsplit_once(") ").ok_or("malformed stat")?.1;
    fields.split(' ').nth(7).ok_or("short stat")?.parse().map_err(|_| "malformed minflt".to_owned())
}

/// Microseconds of one of `count` runs.
fn time_us(count: usize, mut run: impl FnMut() -> Outcome) -> Outcome<f64> {
    let started = Instant::now();
    for _ in 0..count {
        run()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / count as f64)
}

/// Times several things in turn, a block each, and prints them beside the first; the first block is warm-up.
fn compare(len: usize, count: usize, rows: &mut [(&str, &mut dyn FnMut() -> Outcome)]) -> Outcome {
    let mut columns = vec![Vec::new(); rows.len()];
    for block in 0..=BLOCKS {
        for ((_, run), column) in rows.iter_mut().zip(&mut columns) {
            let took = time_us(count, run)?;
            if block > 0 {
                column.push(took);
            }
        }
    }
    let mut base = 0.0;
    for ((name, _), mut column) in rows.iter().zip(columns) {
        column.sort_by(f64::total_cmp);
        let (median, low, high) = (column[BLOCKS / 2], column[0], column[BLOCKS - 1]);
        if base == 0.0 {
            base = median;
        }
        println!(
            "{:<42} {median:>11.1} {low:>11.1} {high:>11.1} {:>7.2}",
            format!("{} {name}", size(len)),
            median / base
        );
    }
    Ok(())
}

fn size(len: usize) -> String {
    match len {
        0..1024 => format!("{len} B"),
        1024..MIB => format!("{} KiB", len >> 10),
        _ => format!("{} MiB", len / MIB),
    }
}

fn main() -> Outcome {
    if std::env::args().nth(1).as_deref() == Some("serve") {
        return Ok(Agent::join_blocking(Options::from_env()?)?.serve_blocking()?);
    }
    let store = StoreServer::bind("127.0.0.1:0")?;
    let mut server = Command::new(std::env::current_exe()?)
        .arg("serve")
        .env("FARCALL_RANK", "1")
        .env("FARCALL_WORLD_SIZE", "2")
        .env("FARCALL_STORE", store.address().to_string())
        .stdin(Stdio::null())
        .spawn()?;
    let measured = measure(&store);
    if measured.is_err() {
        server.kill()?;
    }
    server.wait()?;
    measured
}

fn measure(store: &StoreServer) -> Outcome {
    let mut options = Options::new(0, 2, store.address().to_string());
    options.host_store = false;
    options.slabs = std::env::var("FARCALL_SHM").as_deref() != Ok("off");
    let agent = Agent::join_blocking(options)?;
    let to = agent.to("w1").deadline(Duration::from_secs(60));
    used(to.call(sink, (&warm(8)?,)).wait()?)?;
    println!("tensors pass: {:?}", agent.to("w1").passing());
    println!("{:<42} {:>11} {:>11} {:>11} {:>7}", "", "median us", "lowest", "highest", "ratio");

    println!("\nsink of a tensor in a slab, beside one of 8 B");
    let small = warm(8)?;
    for len in [8, 1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 64 << 10, MIB, 16 * MIB, 256 * MIB, 1024 * MIB] {
        let tensor = warm(len)?;
        let mut base = || used(to.call(sink, (&small,)).wait()?);
        let mut run = || used(to.call(sink, (&tensor,)).wait()?);
        compare(len, 400, &mut [("(8 B)", &mut base), ("sink", &mut run)])?;
    }

    println!("\nread of a tensor in a slab, beside a read of mapped memory");
    for (len, count) in [(MIB, 100), (16 * MIB, 10), (256 * MIB, 1)] {
        let tensor = warm(len)?;
        let bytes = tensor.as_slice::<u8>()?;
        let mut base = || used(sum(bytes));
        let mut run = || used(to.call(read, (&tensor,)).wait()?);
        compare(len, count, &mut [("(mapped memory)", &mut base), ("read", &mut run)])?;
    }

    println!("\nsink of foreign memory, beside one warm copy into a slab");
    for (len, count) in [(64 << 10, 200), (MIB, 100), (16 * MIB, 10), (256 * MIB, 1)] {
        let foreign = Arc::new(Foreign(vec![1; len]));
        let mut slab = agent.runtime().alloc_host(len)?;
        slab.as_bytes_mut()?.fill(1);
        let mut base = || {
            slab.as_bytes_mut()?.copy_from_slice(&foreign.0);
            Ok(())
        };
        let mut run = || used(to.call(sink, (foreign.tensor()?,)).wait()?);
        compare(len, count, &mut [("(one copy)", &mut base), ("sink", &mut run)])?;
        let mut target = agent.runtime().alloc_host(len)?;
        let mut helped = || {
            copy(target.as_bytes_mut()?, &foreign.0);
            Ok(())
        };
        compare(len, count, &mut [("`copy`", &mut helped)])?;
    }

    println!("\nminor page faults per call once warm (caller, callee)");
    for (len, calls) in [(8, 500), (64 << 10, 200), (MIB, 100), (16 * MIB, 20), (256 * MIB, 5)] {
        let tensor = warm(len)?;
        let foreign = Arc::new(Foreign(vec![1; len]));
        let rows: [(&str, &mut dyn FnMut() -> Outcome); 3] = [
            ("read", &mut || used(to.call(read, (&tensor,)).wait()?)),
            ("foreign read", &mut || used(to.call(read, (foreign.tensor()?,)).wait()?)),
            ("echo", &mut || used(to.call(echo, (&tensor,)).wait()?)),
        ];
        for (name, run) in rows {
            let mut count = |calls: usize| -> Outcome<(f64, f64)> {
                let before = (page_faults()?, to.call(faults, ()).wait()?);
                for _ in 0..calls {
                    run()?;
                }
                let after = (page_faults()?, to.call(faults, ()).wait()?);
                Ok(((after.0 - before.0) as f64 / calls as f64, (after.1 - before.1) as f64 / calls as f64))
            };
            count(calls)?;
            let (here, there) = count(calls)?;
            println!("{:<42} {here:>11.3} {there:>11.3}", format!("{} {name}, {calls} calls", size(len)));
        }
    }
    Ok(agent.shutdown_blocking()?)
}

/// Keeps the optimiser from dropping what computed `value`.
fn used<T>(value: T) -> Outcome {
    black_box(value);
    Ok(())
}

fn warm(len: usize) -> Outcome<Tensor> {
    let mut tensor = TensorMut::empty(DType::U8, &[len])?;
    tensor.as_mut_slice::<u8>()?.fill(7);
    Ok(tensor.freeze_ready())
}

/// Memory that this library did not make.
struct Foreign(Vec<u8>);

impl Release for Foreign {
    fn release(&self) {}
}

impl Foreign {
    fn tensor(self: &Arc<Self>) -> Outcome<Tensor> {
        let (start, len) = (NonNull::from(self.0.as_slice()).cast(), self.0.len());
        // SAFETY: the owner holds the memory until the storage is gone, and nobody writes it.
        let storage = unsafe { Storage::external(start, len, Device::HOST, self.clone()) };
        Ok(Tensor::from_storage(storage, Layout::contiguous(DType::U8, &[len])?)?)
    }
}
