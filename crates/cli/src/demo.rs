//! `farcall demo`: four worker processes on this machine, and a story told by the first of them.
//!
//! Everything is real: processes, sockets, a handler that panics, a worker that is killed by its id.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use farcall::device::{bf16, f16};
use farcall::prelude::*;
use farcall::settings::Settings;
use farcall::{Error, Runtime, TensorMut};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::launch::{Workers, this_program};
use crate::{Failure, weights};

const WORKERS: u32 = 4;
/// The worker that is killed.
const VICTIM: &str = "w3";
const BIG_BYTES: usize = 64 << 20;
const BIG_ROUNDS: usize = 5;

// ---- the functions served by every worker ----

/// Multiplies each element.
#[farcall::function(name = "demo::scale")]
fn scale(x: Tensor, k: f32) -> farcall::Result<Tensor> {
    let scaled: Vec<f32> = x.to_vec::<f32>()?.iter().map(|element| element * k).collect();
    Ok(Tensor::from_slice(&scaled, x.shape())?)
}

/// What arrived, in words.
#[farcall::function(name = "demo::describe")]
fn describe(x: Tensor) -> farcall::Result<String> {
    let sum: f64 = match x.dtype() {
        DType::Bool => x.to_vec::<bool>()?.iter().map(|&element| f64::from(u8::from(element))).sum(),
        DType::I64 => x.to_vec::<i64>()?.iter().map(|&element| element as f64).sum(),
        DType::F16 => x.to_vec::<f16>()?.iter().map(|element| element.to_f64()).sum(),
        DType::BF16 => x.to_vec::<bf16>()?.iter().map(|element| element.to_f64()).sum(),
        DType::F32 => x.to_vec::<f32>()?.iter().map(|&element| f64::from(element)).sum(),
        DType::F64 => x.to_vec::<f64>()?.iter().sum(),
        other => return Err(Error::msg(format_args!("no sum for {other}"))),
    };
    Ok(format!("{} {:?}, strides {:?}, sum {sum}", x.dtype(), x.shape(), x.strides()))
}

/// A value as programs have them: tensors anywhere inside.
#[derive(Serialize, Deserialize)]
struct Batch {
    step: u64,
    inputs: Vec<Tensor>,
    named: BTreeMap<String, Tensor>,
    note: Option<String>,
}

/// Gives a batch back with its step advanced; the tensors are not touched.
#[farcall::function(name = "demo::advance")]
fn advance(batch: Batch) -> Batch {
    Batch { step: batch.step + 1, ..batch }
}

/// Calls on: this worker asks the next, and holds no thread while it waits.
#[farcall::function(name = "demo::relay")]
async fn relay(cx: Call, through: Vec<String>, x: Tensor) -> farcall::Result<Tensor> {
    match through.split_first() {
        None => Ok(x),
        Some((next, rest)) => Ok(cx.agent().to(next).call(relay, (rest, x)).await?),
    }
}

/// Fails with an error of the standard library.
#[farcall::function(name = "demo::parse")]
fn parse(text: String) -> farcall::Result<i32> {
    Ok(text.parse()?)
}

/// Panics.
#[farcall::function(name = "demo::head_of")]
fn head_of(elements: Vec<i32>) -> i32 {
    elements[0]
}

/// Takes its time.
#[farcall::function(name = "demo::think")]
fn think(millis: u64) {
    std::thread::sleep(Duration::from_millis(millis));
}

/// Gives a tensor back as it came.
#[farcall::function(name = "demo::echo")]
fn echo(x: Tensor) -> Tensor {
    x
}

/// Doubles each element on the tensor's device: enqueued behind the tensor's arrival, not waited for.
#[farcall::function(name = "demo::double")]
fn double(cx: &Call, x: Tensor) -> farcall::Result<Tensor> {
    let stream = cx.stream(x.device())?;
    let mut doubled = stream.alloc(x.numel() * size_of::<f32>())?;
    stream.launch(&[x.storage()], &mut doubled, |reads, bytes| {
        for (source, target) in reads[0].chunks_exact(4).zip(bytes.chunks_exact_mut(4)) {
            let element = f32::from_le_bytes([source[0], source[1], source[2], source[3]]);
            target.copy_from_slice(&(2.0 * element).to_le_bytes());
        }
    })?;
    Ok(TensorMut::from_storage(doubled, x.dtype(), x.shape())?.freeze(&stream))
}

/// Calls a worker that will die, and reports what it was told and when (milliseconds after the epoch).
#[farcall::function(name = "demo::watch")]
async fn watch(cx: Call, worker: String) -> (String, u64) {
    let outcome = cx.agent().to(&worker).call(think, (60_000,)).await;
    let text = outcome.err().map_or_else(|| "no error".to_owned(), |error| error.to_string());
    (text, epoch_ms())
}

fn epoch_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |age| age.as_millis() as u64)
}

// ---- processes ----

/// The launcher: starts the workers, lets the first tell the story, and checks how each one ended.
pub(crate) fn launch(
    weights: Option<&Path>,
    rounds: u64,
    devices: Option<String>,
    streams: Option<String>,
) -> Result<ExitCode, Failure> {
    if let Some(file) = weights {
        // Refused here, in one voice, before four workers start.
        weights::check(file)?;
    }
    let program = this_program()?;
    let mut workers = Workers::start(WORKERS, |_| {
        let mut command = std::process::Command::new(program.get_program());
        command.arg("demo-worker").stdin(Stdio::piped());
        // The worker that is killed is part of the story.
        if std::env::var_os("FARCALL_LOG").is_none() {
            command.env("FARCALL_LOG", "error");
        }
        command.envs(devices.iter().map(|devices| ("FARCALL_DEVICES", devices)));
        command.envs(streams.iter().map(|streams| ("FARCALL_CPU_STREAMS", streams)));
        if let Some(file) = weights {
            command.envs(weights::ALLOCATOR);
            command.arg("--weights").arg(file).arg("--rounds").arg(rounds.to_string());
        }
        command
    })?;
    let mut failed = false;
    loop {
        match workers.next() {
            Ok(None) => return Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }),
            Ok(Some(ended)) => {
                use std::os::unix::process::ExitStatusExt;
                if ended.status.signal() == Some(Signal::INT.as_raw()) {
                    // A terminal's Ctrl-C goes to every process of it.
                    workers.end();
                    return Ok(ExitCode::from(128 + Signal::INT.as_raw() as u8));
                }
                let killed = ended.status.signal() == Some(Signal::KILL.as_raw());
                let expected = if weights.is_none() && format!("w{}", ended.rank) == VICTIM {
                    killed
                } else {
                    ended.status.success()
                };
                if !expected {
                    eprintln!("farcall demo: w{} ended with {}", ended.rank, ended.status);
                    failed = true;
                    workers.end();
                }
            }
            Err(interrupted) => {
                workers.end();
                return Ok(ExitCode::from(interrupted.exit_code()));
            }
        }
    }
}

/// One worker. It ends when its standard input does, so that none outlives the launcher.
pub(crate) fn work(weights: Option<&Path>, rounds: u64) -> Result<(), Failure> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    // The demo's panic is part of the story; the caller prints it.
    std::panic::set_hook(Box::new(|_| {}));
    let started = Instant::now();
    let settings = Settings::from_env()?;
    let options = settings.options()?;
    // One voice for a device that cannot be had, before anything uses the process's runtime.
    drop(Runtime::new(settings.device()?)?.set_global());
    let agent = Agent::join_blocking(options)?;
    let told = match (agent.worker().rank, weights) {
        (0, None) => tell(&agent, started.elapsed()),
        (0, Some(file)) => weights::tell(&agent, file, rounds),
        _ => Ok(()),
    };
    if told.is_err() {
        agent.abort();
    } else {
        agent.shutdown_blocking()?;
    }
    told
}

// ---- the story ----

fn chapter(title: &str) {
    println!("\n{title}");
}

fn check(condition: bool, what: &str) -> Result<(), Failure> {
    if condition { Ok(()) } else { Err(format!("the demo found a fault: {what}").into()) }
}

fn tell(agent: &Agent, joined_after: Duration) -> Result<(), Failure> {
    println!("farcall demo: {WORKERS} worker processes on this machine");
    for worker in agent.workers() {
        println!("  {}  pid {:<7} listens on {}", worker.id, worker.pid, worker.address);
    }
    println!("  joined in {joined_after:.1?}; no connections yet, they are made at first use");
    plain_calls(agent)?;
    devices(agent)?;
    failures(agent)?;
    bandwidth(agent)?;
    sudden_death(agent)?;
    chapter("The end: each worker waits until all others are done, then closes");
    Ok(())
}

fn plain_calls(agent: &Agent) -> Result<(), Failure> {
    chapter("A call with a tensor");
    let x = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3])?;
    let y = agent.to("w1").call(scale, (&x, 2.0)).wait()?;
    println!("  scale({x:?}, 2.0) on w1 = {:?}", y.as_slice::<f32>()?);
    check(y.as_slice::<f32>()? == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0], "scale")?;

    chapter("Dtypes and layouts: views travel as what they are");
    let views = [
        ("contiguous", x.clone()),
        ("transposed: the same bytes, other strides", x.transpose(0, 1)?),
        ("broadcast: 12 bytes stand for 12,000", x.narrow(0, 0, 1)?.broadcast_to(&[1000, 3])?),
        ("with gaps: packed before it leaves", x.narrow(1, 1, 2)?),
        ("bool", Tensor::from_slice(&[true, false, true], &[3])?),
        ("i64", Tensor::from_slice(&[1_i64 << 40, -1], &[2])?),
        ("f16", Tensor::from_slice(&[f16::from_f32(0.5); 4], &[4])?),
        ("bf16", Tensor::from_slice(&[bf16::from_f32(0.25); 4], &[2, 2])?),
        ("f64 scalar", Tensor::scalar(1.5_f64)?),
        ("no elements", Tensor::from_slice::<f32>(&[], &[0, 7])?),
    ];
    for (name, view) in &views {
        let there = agent.to("w2").call(describe, (view,)).wait()?;
        println!("  {name:<42} {there}");
        let here = describe::run(view.clone()).map_err(|error| error.to_string())?;
        let sum = |text: &str| text.rsplit(' ').next().map(str::to_owned);
        check(sum(&there) == sum(&here), name)?;
    }

    chapter("Values with tensors anywhere inside");
    let named = BTreeMap::from([("mask".to_owned(), Tensor::from_slice(&[1_u8, 0, 1], &[3])?)]);
    let batch =
        Batch { step: 41, inputs: vec![x.clone(), x.transpose(0, 1)?], named, note: Some("plain serde".into()) };
    let batch = agent.to("w1").call(advance, (&batch,)).wait()?;
    println!(
        "  step {}, {} inputs, named {:?}, note {:?}",
        batch.step,
        batch.inputs.len(),
        batch.named.keys(),
        batch.note
    );
    check(batch.step == 42 && batch.inputs[1].shape() == [3, 2] && batch.named.contains_key("mask"), "advance")?;

    chapter("An async handler calls on, and holds no thread while it waits: w0 → w1 → w2 → w3 → w0");
    let route = ["w2", "w3", "w0"].map(str::to_owned).to_vec();
    let back = agent.to("w1").call(relay, (route, &x)).wait()?;
    println!("  came back as {back:?}");
    check(back.as_slice::<f32>()? == x.as_slice::<f32>()?, "relay")
}

/// The story on devices, if there are any: `--devices emulated:2`.
fn devices(agent: &Agent) -> Result<(), Failure> {
    let devices: Vec<Device> =
        agent.runtime().devices().iter().copied().filter(|device| *device != Device::HOST).collect();
    if devices.is_empty() {
        return Ok(());
    }
    chapter("Tensors of devices: written, sent, doubled there and sent back, each step behind the one before");
    for device in devices {
        let emulated = if agent.runtime().is_emulated(device) { " (emulated)" } else { "" };
        let stream = agent.runtime().stream(device)?;
        let mut storage = stream.alloc(4 * size_of::<f32>())?;
        stream.launch(&[], &mut storage, |_, bytes| {
            for (element, value) in bytes.chunks_exact_mut(4).zip([1.0_f32, 2.0, 3.0, 4.0]) {
                element.copy_from_slice(&value.to_le_bytes());
            }
        })?;
        let x = TensorMut::from_storage(storage, DType::F32, &[4])?.freeze(&stream);
        let y = agent.to("w1").call(double, (&x,)).wait()?;
        let z = agent.to("w2").call(double, (&y,)).wait()?;
        let host = z.host().wait(Duration::from_secs(5))?;
        println!("  {device}{emulated}: w1 and w2 gave {z:?} = {:?}", host.as_slice::<f32>()?);
        check(z.device() == device && host.as_slice::<f32>()? == [4.0, 8.0, 12.0, 16.0], "the doubled tensor")?;
    }
    check(agent.runtime().races().is_empty(), "a missing wait")
}

fn failures(agent: &Agent) -> Result<(), Failure> {
    chapter("Failures are typed, and end nobody");
    let w2 = agent.to("w2");
    let error = w2.call(parse, ("forty-two",)).wait().err();
    let error = error.ok_or("the handler should have failed")?;
    println!("  a handler that fails:   {error}");
    check(
        matches!(&error, CallError::Remote { error, .. } if error.type_name.ends_with("ParseIntError")),
        "remote error",
    )?;

    let error = w2.call(head_of, (Vec::new(),)).wait().err().ok_or("the handler should have panicked")?;
    println!("  a handler that panics:  {error}");
    check(matches!(error, CallError::Panicked { .. }), "panic")?;

    let error =
        w2.deadline(Duration::from_millis(50)).call(think, (500,)).wait().err().ok_or("the deadline should pass")?;
    println!("  a deadline of 50 ms:    {error}");
    check(matches!(error, CallError::Deadline { .. }), "deadline")?;

    let error = agent.to("w9").call(think, (0,)).wait().err().ok_or("there is no w9")?;
    println!("  a worker not there:     {error}");
    check(matches!(error, CallError::NoSuchWorker { .. }), "no such worker")?;

    println!("  and w2 still answers:   {}", w2.call(head_of, (vec![7, 8],)).wait()?);
    Ok(())
}

fn bandwidth(agent: &Agent) -> Result<(), Failure> {
    chapter("64 MiB there and back, into recycled memory");
    let mut big = TensorMut::empty(DType::U8, &[BIG_BYTES])?;
    for (index, byte) in big.as_mut_slice::<u8>()?.iter_mut().enumerate() {
        *byte = (index % 251) as u8;
    }
    let big = big.freeze_ready();
    let mut rates = Vec::new();
    for _ in 0..BIG_ROUNDS {
        let started = Instant::now();
        let back = agent.to("w1").call(echo, (&big,)).wait()?;
        rates.push(2.0 * BIG_BYTES as f64 / started.elapsed().as_secs_f64() / 1e9);
        check(back.as_slice::<u8>()? == big.as_slice::<u8>()?, "the bytes of the echo")?;
    }
    let rates: Vec<String> = rates.iter().map(|rate| format!("{rate:.2}")).collect();
    let channel = agent.to("w1").channel(BIG_BYTES as u64).ok_or("no channel")?;
    println!("  {} GB/s by {channel}, every byte compared", rates.join(", "));
    Ok(())
}

fn sudden_death(agent: &Agent) -> Result<(), Failure> {
    chapter("A worker is killed in mid-call: everyone who waits for it is told");
    let victim = agent.workers().find(|worker| &*worker.id.name == VICTIM).ok_or("no victim")?;
    let pid = Pid::from_raw(victim.pid as i32).ok_or("no pid")?;
    let mine = agent.to(VICTIM).call(think, (60_000,));
    let others = ["w1", "w2"].map(|name| (name, agent.to(name).call(watch, (VICTIM.to_owned(),))));
    // All three calls are in flight once each watcher has answered something sent after its `watch`, and the victim
    // something sent after mine.
    for name in ["w1", "w2", VICTIM] {
        agent.to(name).call(head_of, (vec![0],)).wait()?;
    }
    std::thread::sleep(Duration::from_millis(100));
    let killed_at = epoch_ms();
    let started = Instant::now();
    kill_process(pid, Signal::KILL)?;
    let error = mine.wait().err().ok_or("the call should have failed")?;
    println!("  w0 after {:>5.1?}: {error}", started.elapsed());
    check(matches!(error, CallError::PeerLost { .. }), "the caller learns of the death")?;
    for (name, reply) in others {
        let (text, at) = reply.wait()?;
        println!("  {name} after {:>3} ms: {text}", at.saturating_sub(killed_at));
        check(text.contains("lost w3"), "the others learn of the death")?;
    }
    let started = Instant::now();
    let error = agent.to(VICTIM).call(think, (0,)).wait().err().ok_or("the victim should be gone")?;
    println!("  the next call, after {:.1?}: {error}", started.elapsed());
    check(matches!(error, CallError::PeerLost { .. }), "a dead worker is refused")
}
