//! How many instructions is a call, both ends in one process?
//!
//! Runs the given number of calls between two agents; `cargo xtask callgrind` counts two numbers of calls and divides
//! the difference, so that start and end cancel out. User space only: the kernel's share is in `calls`.
//! With a second number, calls of integers, that many outstanding: what a call costs that shares its wake-ups with others. With a
//! third, calls with a tensor of so many bytes.
//! Run: `cargo run --release -p farcall-benches --bin instructions -- 1000 [64 [8192]]`.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::collections::VecDeque;
use std::hint::black_box;

use farcall::prelude::*;
use farcall::{Spin, StoreServer};

/// Gives the first element.
#[farcall::function(name = "bench::first", inline)]
fn first(x: Tensor) -> farcall::Result<f32> {
    Ok(x.as_slice::<f32>()?[0])
}

/// Gives the bytes.
#[farcall::function(name = "bench::len", inline)]
fn len(x: Tensor) -> u64 {
    x.numel() as u64
}

/// Adds one.
#[farcall::function(name = "bench::next", inline)]
fn next(x: u64) -> u64 {
    x + 1
}

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let calls: usize = std::env::args().nth(1).ok_or("how many calls?")?.parse()?;
    let outstanding = std::env::args().nth(2).map_or(Ok(0), |text| text.parse())?;
    let bytes = std::env::args().nth(3).map_or(Ok(0), |text| text.parse())?;
    let store = StoreServer::bind("127.0.0.1:0")?;
    let address = store.address().to_string();
    let join = move |rank| {
        let mut options = Options::new(rank, 2, address.clone());
        options.host_store = false;
        // Looking for work is no work.
        options.spin = Spin::Off;
        Agent::join_blocking(options)
    };
    let other = join.clone();
    let callee = std::thread::spawn(move || other(1));
    let caller = join(0)?;
    let callee = callee.join().map_err(|_| "the callee panicked")??;
    let x = Tensor::from_slice(&[1.5_f32, 2.0, 3.0, 4.0], &[4])?;
    let large = Tensor::zeros(DType::U8, &[bytes])?;
    if outstanding == 0 {
        for _ in 0..calls {
            black_box(caller.to("w1").call(first, (&x,)).wait()?);
        }
    } else {
        let mut waiting = VecDeque::new();
        for at in 0..calls as u64 {
            let to = caller.to(1);
            waiting.push_back(if bytes > 0 { to.call(len, (&large,)) } else { to.call(next, (at,)) });
            if waiting.len() == outstanding
                && let Some(oldest) = waiting.pop_front()
            {
                black_box(oldest.wait()?);
            }
        }
        for reply in waiting {
            black_box(reply.wait()?);
        }
    }
    println!("{calls} calls");
    let leaving = std::thread::spawn(move || callee.shutdown_blocking());
    caller.shutdown_blocking()?;
    leaving.join().map_err(|_| "the callee panicked")??;
    Ok(())
}
