//! What do the CPU's operators cost beside a copy of the same bytes, and `matmul` beside `gemm` called directly?
//!
//! Question: does an operator that is bound by memory take at most 1.5 times as long as `memcpy` of as many bytes, read and written;
//! does `matmul` of 1024 x 1024 `f32` reach 0.8 of `gemm`; from how many elements on do threads pay.
//! Method: 64 Mi elements, so that neither side is left in a cache; each round runs the copy and the operator one after the other, so that both see
//! the same machine; medians of the ratios over rounds, with the lowest and highest, and the ratio of
//! processor time, all threads', which others on the machine disturb least: there a thread is worth what it costs.
//! The copy is one thread's, of (bytes read + bytes
//! written) / 2, in one piece, between memory of the same kind: slabs, which have small pages. Operators use all processors
//! (`RAYON_NUM_THREADS` says otherwise). Results go back to the pool, so neither side pays for fresh pages.
//! Figures (2 processors of a Xeon of 2.8 GHz in a virtual machine, small pages; ratio of wall time, then cost; 2026-11-21, nothing else
//! running): fill 0.66 and 1.2, copy 0.77 and 1.1, rows of a view 0.91 and 1.7, transposed 1.14 and 1.9, f32 to bf16 1.07 and 2.1, back
//! 0.89 and 1.6, f32 to f16 1.11 and 1.9, back 1.15 and 2.0, u8 to f32 1.37 and 2.0, add 0.82 and 1.5, by a number 1.00 and 1.9, a row
//! to a matrix 1.32 and 2.3, div 1.04 and 1.9, neg 1.08 and 1.7, relu 1.06 and 1.9, sqrt 1.08 and 1.9, lt 1.03 and 1.9, where 0.93 and 1.7,
//! sum 1.20 and 2.1, of rows 1.22 to 1.90 in four runs and 2.2, of columns 1.23 and 2.3, max 1.46 to 1.66 in four runs and 2.4, norm 1.17
//! and 2.0, cat 0.88 and 1.7, SGD 0.71 and 1.3, Adam 0.77 and 1.4; matmul 1.04 of gemm, first transposed 0.90. Of those that arithmetic
//! bounds: f32 to f8e4m3 2.3, add of bf16 2.1, argmax of rows 8.0.
//! Run: `cargo run --release -p farcall-benches --bin ops`, with a word behind `--` for the operators that it is in. Wall time is for a quiet machine: read the ratios.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use farcall_device::{DType, Device, Param, Runtime, Stream, Tensor};
use farcall_ops::{self as ops, OpError};
use rayon::prelude::*;

const ELEMENTS: usize = 64 << 20;
const ROUNDS: usize = 15;
/// Of operators that arithmetic bounds, which take long.
const SLOW_ROUNDS: usize = 3;
const SIDE: usize = 1024;

/// The highest ratio that is asked for.
const COPY_RATIO_MAX: f64 = 1.5;
/// The lowest share of `gemm`'s speed that is asked for.
const MATMUL_SHARE_MIN: f64 = 0.8;

struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self { median: values[values.len() / 2], low: values[0], high: values[values.len() - 1] }
    }
}

/// Seconds of processor time that this process has had.
fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seconds that `work` takes.
fn seconds<T>(work: impl FnOnce() -> T) -> f64 {
    let started = Instant::now();
    black_box(work());
    started.elapsed().as_secs_f64()
}

type Run<'a> = Box<dyn FnMut() -> Result<(), OpError> + 'a>;

struct Row<'a> {
    name: &'static str,
    /// Read and written.
    bytes: usize,
    /// Whether memory bounds it; others are shown for what they are.
    bound: bool,
    run: Run<'a>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let stream = Runtime::global().stream(Device::HOST)?;
    println!("{} processors", std::thread::available_parallelism()?);
    let copies = memory_bound(&stream)?;
    let products = matmul(&stream)?;
    threads();
    let verdict = |met: bool| if met { "met" } else { "NOT met" };
    println!("\nat most {COPY_RATIO_MAX} of a copy: {}", verdict(copies));
    println!("at least {MATMUL_SHARE_MIN} of gemm: {}", verdict(products));
    Ok(())
}

/// Drops what an operator gives.
fn ran(result: Result<Tensor, OpError>) -> Result<(), OpError> {
    result.map(drop)
}

fn memory_bound(stream: &Stream) -> Result<bool, Box<dyn Error>> {
    let s = stream;
    let a = ops::rand(&[ELEMENTS], DType::F32, 1, s)?;
    let b = ops::rand(&[ELEMENTS], DType::F32, 2, s)?;
    let half = ops::cast(&a, DType::BF16, s)?;
    let f16 = ops::cast(&a, DType::F16, s)?;
    let bytes8 = ops::cast(&ops::mul(&a, 100.0, s)?, DType::U8, s)?;
    let matrix = a.reshape(&[ELEMENTS / 4096, 4096])?;
    let row = ops::rand(&[4096], DType::F32, 3, s)?;
    let condition = ops::lt(&a, 0.5, s)?;
    let columns = matrix.narrow(1, 0, 2048)?;
    let param = || -> Result<Param, OpError> { Ok(Param::new(ops::rand(&[ELEMENTS / 4], DType::F32, 4, s)?)) };
    let params = (0..4).map(|_| param()).collect::<Result<Vec<_>, _>>()?;
    let grads: Vec<_> =
        (0..4).map(|index| a.narrow(0, index * ELEMENTS / 4, ELEMENTS / 4).map(Some)).collect::<Result<_, _>>()?;
    let mut sgd = ops::Optimizer::new(params.clone(), ops::Sgd { momentum: 0.9, ..ops::Sgd::new(1e-3) });
    let mut adam = ops::Optimizer::new(params, ops::Adam::new(1e-3));
    let (n, word) = (ELEMENTS, 4);
    fn row_of<'a>(name: &'static str, bytes: usize, bound: bool, run: Run<'a>) -> Row<'a> {
        Row { name, bytes, bound, run }
    }
    let rows = vec![
        row_of("fill f32", n * word, true, Box::new(|| ran(ops::full(&[n], 1.5, DType::F32, s)))),
        row_of("copy f32", 2 * n * word, true, Box::new(|| ran(ops::copy(&a, s)))),
        row_of("copy f32, rows of a view", n * word, true, Box::new(|| ran(ops::copy(&columns, s)))),
        row_of("copy f32, transposed", 2 * n * word, true, Box::new(|| ran(ops::copy(&matrix.transpose(0, 1)?, s)))),
        row_of("cast f32 to bf16", n * 6, true, Box::new(|| ran(ops::cast(&a, DType::BF16, s)))),
        row_of("cast bf16 to f32", n * 6, true, Box::new(|| ran(ops::cast(&half, DType::F32, s)))),
        row_of("cast f32 to f16", n * 6, true, Box::new(|| ran(ops::cast(&a, DType::F16, s)))),
        row_of("cast f16 to f32", n * 6, true, Box::new(|| ran(ops::cast(&f16, DType::F32, s)))),
        row_of("cast f32 to f8e4m3", n * 5, false, Box::new(|| ran(ops::cast(&a, DType::F8E4M3, s)))),
        row_of("cast u8 to f32", n * 5, true, Box::new(|| ran(ops::cast(&bytes8, DType::F32, s)))),
        row_of("add f32", 3 * n * word, true, Box::new(|| ran(ops::add(&a, &b, s)))),
        row_of("mul f32 by a number", 2 * n * word, true, Box::new(|| ran(ops::mul(&a, 2.5, s)))),
        row_of("add f32, a row to a matrix", 2 * n * word, true, Box::new(|| ran(ops::add(&matrix, &row, s)))),
        row_of("add bf16", 3 * n * 2, false, Box::new(|| ran(ops::add(&half, &half, s)))),
        row_of("div f32", 3 * n * word, true, Box::new(|| ran(ops::div(&a, &b, s)))),
        row_of("neg f32", 2 * n * word, true, Box::new(|| ran(ops::neg(&a, s)))),
        row_of("relu f32", 2 * n * word, true, Box::new(|| ran(ops::relu(&a, s)))),
        row_of("sqrt f32", 2 * n * word, true, Box::new(|| ran(ops::sqrt(&a, s)))),
        row_of("lt f32", n * 9, true, Box::new(|| ran(ops::lt(&a, &b, s)))),
        row_of("where f32", n * 13, true, Box::new(|| ran(ops::choose(&condition, &a, &b, s)))),
        row_of("sum f32", n * word, true, Box::new(|| ran(ops::sum(&a, &[], false, s)))),
        row_of("sum f32 of rows", n * word, true, Box::new(|| ran(ops::sum(&matrix, &[1], false, s)))),
        row_of("sum f32 of columns", n * word, true, Box::new(|| ran(ops::sum(&matrix, &[0], false, s)))),
        row_of("max f32", n * word, true, Box::new(|| ran(ops::amax(&a, &[], false, s)))),
        row_of("norm f32", n * word, true, Box::new(|| ran(ops::norm(&a, 2.0, &[], false, s)))),
        row_of("argmax f32 of rows", n * word, false, Box::new(|| ran(ops::argmax(&matrix, Some(1), false, s)))),
        row_of("cat f32", 4 * n * word, true, Box::new(|| ran(ops::cat(&[&a, &b], 0, s)))),
        row_of("SGD with momentum, 4 parameters", 5 * n * word, true, Box::new(|| sgd.step(&grads, s))),
        row_of("Adam, 4 parameters", 7 * n * word, true, Box::new(|| adam.step(&grads, s))),
        row_of("exp f32", 2 * n * word, false, Box::new(|| ran(ops::exp(&a, s)))),
        row_of("tanh f32", 2 * n * word, false, Box::new(|| ran(ops::tanh(&a, s)))),
        row_of("gelu f32", 2 * n * word, false, Box::new(|| ran(ops::gelu(&a, ops::Gelu::Exact, s)))),
        row_of("softmax f32 of rows", 2 * n * word, false, Box::new(|| ran(ops::softmax(&matrix, 1, s)))),
        row_of("randn f32", n * word, false, Box::new(|| ran(ops::randn(&[n], DType::F32, 5, s)))),
    ];
    let longest = rows.iter().map(|row| row.bytes / 2).max().unwrap_or(0);
    let mut memory = [1, 2].map(|byte| -> Result<_, Box<dyn Error>> {
        let mut storage = Runtime::global().alloc_host(longest)?;
        // By all threads, as operators touch their results first: where pages lie decides what the TLB's misses cost.
        storage.as_bytes_mut()?.par_chunks_mut(256 << 10).for_each(|chunk| chunk.fill(byte));
        Ok(storage)
    });
    let [Ok(source), Ok(target)] = &mut memory else { return Err("no memory for the copy".into()) };
    let (source, target) = (source.as_bytes_mut()?, target.as_bytes_mut()?);
    println!(
        "\n{:<34} {:>10} {:>10} {:>7} {:>14} {:>9}",
        "operator, 64 Mi elements", "ms", "copy, ms", "ratio", "low to high", "cost"
    );
    let mut met = true;
    let word = std::env::args().nth(1).unwrap_or_default();
    for mut row in rows.into_iter().filter(|row| row.name.contains(&word)) {
        let len = row.bytes / 2;
        (row.run)()?;
        let (mut times, mut copies, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let mut costs = Vec::new();
        for _ in 0..if row.bound { ROUNDS } else { SLOW_ROUNDS } {
            let before = processor_seconds();
            let copy = seconds(|| black_box(&mut target[..len]).copy_from_slice(black_box(&source[..len])));
            let between = processor_seconds();
            let mut outcome = Ok(());
            let time = seconds(|| outcome = (row.run)());
            outcome?;
            costs.push((processor_seconds() - between) / (between - before));
            times.push(time * 1e3);
            copies.push(copy * 1e3);
            ratios.push(time / copy);
        }
        let (time, copy, ratio) = (Spread::of(times), Spread::of(copies), Spread::of(ratios));
        let cost = Spread::of(costs).median;
        let is_slow = row.bound && ratio.median > COPY_RATIO_MAX;
        met &= !is_slow;
        let note = match (row.bound, is_slow) {
            (false, _) => "  bound by arithmetic",
            (true, true) => "  TOO SLOW",
            (true, false) => "",
        };
        println!(
            "{:<34} {:>10.2} {:>10.2} {:>7.2} {:>6.2} to {:>4.2} {cost:>9.2}{note}",
            row.name, time.median, copy.median, ratio.median, ratio.low, ratio.high
        );
    }
    Ok(met)
}

fn matmul(stream: &Stream) -> Result<bool, Box<dyn Error>> {
    let a = ops::rand(&[SIDE, SIDE], DType::F32, 1, stream)?;
    let b = ops::rand(&[SIDE, SIDE], DType::F32, 2, stream)?;
    let mut target = vec![0.0_f32; SIDE * SIDE];
    let (left, right) = (a.as_slice::<f32>()?, b.as_slice::<f32>()?);
    let mut direct = || {
        let row = SIDE as isize;
        #[expect(unsafe_code, reason = "gemm takes matrices by pointer")]
        // SAFETY: all three are contiguous matrices of SIDE rows and columns, and the target overlaps neither factor.
        unsafe {
            gemm::gemm(
                SIDE,
                SIDE,
                SIDE,
                target.as_mut_ptr(),
                1,
                row,
                false,
                left.as_ptr(),
                1,
                row,
                right.as_ptr(),
                1,
                row,
                0.0_f32,
                1.0_f32,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    };
    let flop = 2.0 * (SIDE as f64).powi(3);
    println!("\n{:<34} {:>10} {:>12} {:>7} {:>14}", "1024 x 1024 x 1024", "GFLOP/s", "gemm's", "share", "low to high");
    let mut met = true;
    for (name, left) in [("matmul f32", a.clone()), ("matmul f32, first transposed", a.transpose(0, 1)?)] {
        let (mut ours, mut theirs, mut shares) = (Vec::new(), Vec::new(), Vec::new());
        direct();
        for _ in 0..2 * ROUNDS {
            let gemm = seconds(&mut direct);
            let mut outcome = Ok(());
            let time = seconds(|| outcome = ran(ops::matmul(&left, &b, stream)));
            outcome?;
            ours.push(flop / time / 1e9);
            theirs.push(flop / gemm / 1e9);
            shares.push(gemm / time);
        }
        let (ours, theirs, share) = (Spread::of(ours), Spread::of(theirs), Spread::of(shares));
        met &= share.median >= MATMUL_SHARE_MIN;
        println!(
            "{name:<34} {:>10.1} {:>12.1} {:>7.2} {:>6.2} to {:>4.2}",
            ours.median, theirs.median, share.median, share.low, share.high
        );
    }
    Ok(met)
}

/// From where on several threads pay: one addition by one thread, and in chunks as the crate hands them out, but for any size.
fn threads() {
    println!("\nthreads: an addition of f32, microseconds by one thread and by all");
    for shift in [14, 15, 16, 17, 18, 19, 20, 22] {
        let elements = 1_usize << shift;
        let (a, b, mut sum) = (vec![1.0_f32; elements], vec![2.0_f32; elements], vec![0.0_f32; elements]);
        let add = |sum: &mut [f32], first: usize| {
            let range = first..first + sum.len();
            for ((sum, a), b) in sum.iter_mut().zip(&a[range.clone()]).zip(&b[range]) {
                *sum = a + b;
            }
        };
        let chunk = (elements / 2).min(1 << 16);
        let (mut single, mut shared) = (Vec::new(), Vec::new());
        for _ in 0..20 * ROUNDS {
            single.push(1e6 * seconds(|| add(black_box(&mut sum), 0)));
            let chunks = |sum: &mut [f32]| {
                sum.par_chunks_mut(chunk).enumerate().for_each(|(index, part)| add(part, index * chunk));
            };
            shared.push(1e6 * seconds(|| chunks(black_box(&mut sum))));
        }
        println!("{elements:>10} elements: {:>9.1} {:>9.1}", Spread::of(single).median, Spread::of(shared).median);
    }
}
