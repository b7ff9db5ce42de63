//! A call with a tensor: to another process, and back.
//!
//! Run: `cargo build --release && cargo run --release -- run -n 2 -- cargo run --release -p farcall --example 01_hello`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use farcall::prelude::*;

/// Multiplies each element by `k`.
#[farcall::function]
fn scale(x: Tensor, k: f32) -> farcall::Result<Tensor> {
    let scaled: Vec<f32> = x.as_slice::<f32>()?.iter().map(|element| element * k).collect();
    Ok(Tensor::from_slice(&scaled, x.shape())?)
}

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let agent = Agent::join_blocking(Options::from_env()?)?;
    if agent.worker().rank > 0 {
        return Ok(agent.serve_blocking()?); // answers calls until the others are done
    }
    let x = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2])?;
    let y = agent.to("w1").call(scale, (&x, 10.0)).wait()?;
    println!("w1 gave {y:?} = {:?}", y.as_slice::<f32>()?);
    assert_eq!(y.as_slice::<f32>()?, [10.0, 20.0, 30.0, 40.0]);
    Ok(agent.shutdown_blocking()?)
}
