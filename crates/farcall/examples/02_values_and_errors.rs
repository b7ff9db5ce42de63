//! Values of your own types with tensors anywhere inside, and errors that keep their type.
//!
//! Run: as `01_hello`.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::HashMap;
use std::time::Duration;

use farcall::prelude::*;
use serde::{Deserialize, Serialize};

/// Any serde type travels; tensors inside it are taken out and sent as bytes of their own.
#[derive(Serialize, Deserialize)]
struct Batch {
    inputs: Vec<Tensor>,
    labels: HashMap<String, Tensor>,
}

/// How many elements a batch has in all.
#[farcall::function]
fn count(batch: Batch) -> usize {
    batch.inputs.iter().chain(batch.labels.values()).map(Tensor::numel).sum()
}

/// Fails with an error of the standard library when `text` is no number.
#[farcall::function]
fn parse(text: String) -> farcall::Result<f64> {
    Ok(text.parse()?)
}

/// Never answers in time.
#[farcall::function]
fn nap(cx: &Call, time: Duration) -> String {
    std::thread::sleep(time);
    format!("{} is awake", cx.agent().worker())
}

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let agent = Agent::join_blocking(Options::from_env()?)?;
    if agent.worker().rank > 0 {
        return Ok(agent.serve_blocking()?);
    }
    let w1 = agent.to("w1").deadline(Duration::from_secs(5));

    let row = Tensor::from_slice(&[1_i64, 2, 3], &[3])?;
    let labels = HashMap::from([("mask".to_owned(), Tensor::from_slice(&[true, false], &[2])?)]);
    let batch = Batch { inputs: vec![row.clone(), row.broadcast_to(&[4, 3])?], labels };
    let elements = w1.call(count, (&batch,)).wait()?;
    println!("the batch has {elements} elements");
    assert_eq!(elements, 3 + 12 + 2);

    match w1.call(parse, ("one half",)).wait() {
        Err(CallError::Remote { error, .. }) => println!("{}: {}", error.type_name, error.message),
        other => return Err(format!("{other:?} instead of the handler's error").into()),
    }
    match w1.deadline(Duration::from_millis(20)).call(nap, (Duration::from_millis(200),)).wait() {
        Err(error @ CallError::Deadline { .. }) => println!("{error}"),
        other => return Err(format!("{other:?} instead of a passed deadline").into()),
    }
    Ok(agent.shutdown_blocking()?)
}
