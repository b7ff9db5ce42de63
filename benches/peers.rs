//! What idle peers cost the calls of an active one: the latency of a call alone, and beside so many connections that say nothing.
//!
//! All workers live in this process, each with threads, sockets and rings of its own, as if they did not.
//! Run: `cargo run --release -p farcall-benches --bin peers -- 1000`.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::time::{Duration, Instant};

use farcall::StoreServer;
use farcall::prelude::*;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Of a round, which is long enough for threads to settle.
const CALLS: usize = 20_000;
const ROUNDS: usize = 5;

/// Adds one.
#[farcall::function(name = "bench::next", inline)]
fn next(x: u64) -> u64 {
    x + 1
}

/// A group of `n` workers.
fn join(n: u32) -> Result<(StoreServer, Vec<Agent>), Failure> {
    let store = StoreServer::bind("127.0.0.1:0")?;
    let address = store.address().to_string();
    let joining: Vec<_> = (0..n)
        .map(|rank| {
            let mut options = Options::new(rank, n, address.clone());
            options.host_store = false;
            std::thread::spawn(move || Agent::join_blocking(options))
        })
        .collect();
    let agents = joining.into_iter().map(|agent| Ok(agent.join().map_err(|_| "a worker panicked")??));
    Ok((store, agents.collect::<Result<_, Failure>>()?))
}

/// The median of a call of the second worker on the first, in microseconds: of each round.
fn measure(agents: &[Agent]) -> Result<Vec<f64>, Failure> {
    let mut medians = Vec::new();
    for _ in 0..ROUNDS {
        let mut times = Vec::with_capacity(CALLS);
        for at in 0..CALLS as u64 {
            let began = Instant::now();
            agents[1].to(0).call(next, (at,)).wait()?;
            times.push(began.elapsed());
        }
        times.sort_unstable();
        medians.push(times[CALLS / 2].as_secs_f64() * 1e6);
    }
    medians.sort_by(f64::total_cmp);
    Ok(medians)
}

fn main() -> Result<(), Failure> {
    let idle: u32 = std::env::args().nth(1).map_or(Ok(1000), |text| text.parse())?;
    let began = Instant::now();
    let (_store, agents) = join(idle + 2)?;
    println!("{} workers joined in {:.2} s", idle + 2, began.elapsed().as_secs_f64());
    let alone = measure(&agents)?;
    let began = Instant::now();
    for agent in &agents[2..] {
        agent.to(0).call(next, (1,)).wait()?;
    }
    println!("{idle} have called once in {:.2} s, and are silent", began.elapsed().as_secs_f64());
    std::thread::sleep(Duration::from_secs(1));
    let among = measure(&agents)?;
    let (one, other) = (alone[ROUNDS / 2], among[ROUNDS / 2]);
    println!("a call alone: {one:.2} us ({:.2} to {:.2})", alone[0], alone[ROUNDS - 1]);
    println!(
        "among {idle} silent peers: {other:.2} us ({:.2} to {:.2}), {:.2} x",
        among[0],
        among[ROUNDS - 1],
        other / one
    );
    let leaving: Vec<_> =
        agents.into_iter().map(|agent| std::thread::spawn(move || agent.shutdown_blocking())).collect();
    for agent in leaving {
        agent.join().map_err(|_| "a worker panicked")??;
    }
    Ok(())
}
