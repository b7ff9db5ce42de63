//! Many calls at once, async handlers that call on, and results ordered on a stream.
//!
//! Run: as `01_hello`.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use farcall::device::join_all;
use farcall::prelude::*;

/// Halves even elements by asking the caller to do it: a call in a call, that holds no thread while it waits.
#[farcall::function]
async fn halve(cx: Call, x: Tensor) -> farcall::Result<Tensor> {
    let back = cx.caller().clone();
    Ok(cx.agent().to(&back).call(halve_here, (x,)).await?)
}

/// Halves each element.
#[farcall::function]
fn halve_here(x: Tensor) -> farcall::Result<Tensor> {
    let halves: Vec<i64> = x.as_slice::<i64>()?.iter().map(|element| element / 2).collect();
    Ok(Tensor::from_slice(&halves, x.shape())?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let agent = Agent::join(Options::from_env()?).await?;
    if agent.worker().rank > 0 {
        return Ok(agent.serve().await?);
    }
    let w1 = agent.to("w1");
    let xs = (0..100_i64).map(|i| Tensor::from_slice(&[2 * i, 4 * i], &[2])).collect::<Result<Vec<_>, _>>()?;

    // Sent at once, answered in any order; the future resolves when every tensor is complete.
    let ys = join_all(xs.iter().map(|x| w1.call(halve, (x,)).future())).await?;
    let sum: i64 = ys.iter().map(|y| y.as_slice::<i64>().map(|y| y[0] + y[1])).sum::<Result<i64, _>>()?;
    println!("the halves of 100 tensors sum to {sum}");
    assert_eq!(sum, (0..100).map(|i| 3 * i).sum());

    // Ordered on a stream instead: nothing waits for the device, work enqueued on `stream` runs after the value is there.
    let stream = agent.runtime().stream(Device::HOST)?;
    let y = w1.call(halve, (&xs[7],)).on(&stream).await?;
    let row = y.transpose(0, 0)?.contiguous(&stream)?;
    assert_eq!(row.as_slice::<i64>()?, [7, 14]);
    Ok(agent.shutdown().await?)
}
