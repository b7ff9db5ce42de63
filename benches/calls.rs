//! What does a call cost beside the raw socket under it?
//!
//! Question: latency of a small call, of each kind of handler and of waiting, beside a raw blocking ping-pong over TCP loopback;
//! page faults per call once warm. Sizes, percentiles and bandwidth beside the physical limits: `farcall bench --limits`.
//! Method: two processes; raw and farcall blocks alternate within one run; medians over blocks, with the lowest and
//! highest. Small calls are measured twice: both processes on one processor, and one on each. Left to the scheduler, either
//! placement comes about by chance and stays, and the second is many times slower where idle processors halt (virtual
//! machines), so that a raw socket and a call would be compared in different ones. Wall time is for a quiet machine: read the ratios.
//! Run: `cargo run --release -p farcall-benches --bin calls`. Calls go by Unix sockets, with `FARCALL_TRANSPORT=tcp` over TCP
//! as the raw sockets do.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::{StoreServer, TensorMut};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

const SMALL_BLOCKS: usize = 15;
const SMALL_CALLS: usize = 2000;
/// Bytes of a small request on the wire: a header and an integer.
const SMALL_BYTES: usize = 66;
const MIB: usize = 1 << 20;

/// Adds one; runs on the pool, as any function does.
#[farcall::function(name = "bench::next")]
fn next(x: u64) -> u64 {
    x + 1
}

/// Adds one where the frame was read.
#[farcall::function(name = "bench::next_inline", inline)]
fn next_inline(x: u64) -> u64 {
    x + 1
}

/// Adds one on the async runtime.
#[farcall::function(name = "bench::next_async")]
async fn next_async(x: u64) -> u64 {
    x + 1
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

struct Spread {
    median: f64,
    low: f64,
    high: f64,
}

fn spread(mut values: Vec<f64>) -> Spread {
    values.sort_by(f64::total_cmp);
    Spread { median: values[values.len() / 2], low: values[0], high: values[values.len() - 1] }
}

/// Keeps the optimiser from dropping what computed `value`.
fn used<T>(value: T) -> Outcome {
    black_box(value);
    Ok(())
}

/// Microseconds of one of `count` runs.
fn time_us(count: usize, mut run: impl FnMut() -> Outcome) -> Outcome<f64> {
    let started = Instant::now();
    for _ in 0..count {
        run()?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / count as f64)
}

// ---- the other process ----

fn raw_pong(mut socket: TcpStream) -> Outcome {
    let mut buffer = [0; SMALL_BYTES];
    while socket.read_exact(&mut buffer).is_ok() {
        socket.write_all(&buffer)?;
    }
    Ok(())
}

fn serve() -> Outcome {
    pin("BENCH_SERVER_CPU")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    std::fs::write(std::env::var("BENCH_PORT_FILE")?, listener.local_addr()?.port().to_string())?;
    let (socket, _) = listener.accept()?;
    socket.set_nodelay(true)?;
    let pong = std::thread::spawn(move || raw_pong(socket));
    Agent::join_blocking(Options::from_env()?)?.serve_blocking()?;
    pong.join().map_err(|_| "the raw server panicked")?
}

// ---- this process ----

/// Where the two processes run: which processors, or the scheduler's choice.
#[derive(Clone, Copy)]
struct Placement {
    name: &'static str,
    client: &'static str,
    server: &'static str,
}

const PLACEMENTS: [Placement; 2] = [
    Placement { name: "one processor each", client: "0", server: "1" },
    Placement { name: "both on one processor", client: "0", server: "0" },
];

/// Keeps this thread, and those it starts, on the processor that `variable` names, if it does.
fn pin(variable: &str) -> Outcome {
    if let Ok(cpu) = std::env::var(variable) {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu.parse()?);
        rustix::thread::sched_setaffinity(None, &set)?;
    }
    Ok(())
}

fn main() -> Outcome {
    match std::env::args().nth(1).as_deref() {
        Some("serve") => return serve(),
        Some("small") => {
            pin("BENCH_CLIENT_CPU")?;
            return with_server(small_calls);
        }
        _ => {}
    }
    println!(
        "small call, two processes, raw: TCP loopback; microseconds, median of {SMALL_BLOCKS} blocks of {SMALL_CALLS}"
    );
    for Placement { name, client, server } in PLACEMENTS {
        if client != server && std::thread::available_parallelism()?.get() < 2 {
            println!("{name}: skipped, there is one processor");
            continue;
        }
        println!("{name:<30} {:>8} {:>8} {:>8} {:>7}", "median", "lowest", "highest", "ratio");
        let status = Command::new(std::env::current_exe()?)
            .arg("small")
            .env("BENCH_CLIENT_CPU", client)
            .env("BENCH_SERVER_CPU", server)
            .status()?;
        if !status.success() {
            return Err(format!("small calls: {status}").into());
        }
    }
    with_server(|agent, _| page_faults_per_call(agent))
}

fn with_server(measure: impl FnOnce(&Agent, &mut TcpStream) -> Outcome) -> Outcome {
    let store = StoreServer::bind("127.0.0.1:0")?;
    let port_file = std::env::temp_dir().join(format!("farcall-bench-{}", std::process::id()));
    let mut server = Command::new(std::env::current_exe()?)
        .arg("serve")
        .env("FARCALL_RANK", "1")
        .env("FARCALL_WORLD_SIZE", "2")
        .env("FARCALL_STORE", store.address().to_string())
        .env("BENCH_PORT_FILE", &port_file)
        .stdin(Stdio::null())
        .spawn()?;
    let measured = join(&store, &port_file).and_then(|(agent, mut pong)| {
        measure(&agent, &mut pong)?;
        drop(pong);
        Ok(agent.shutdown_blocking()?)
    });
    if measured.is_err() {
        server.kill()?;
    }
    server.wait()?;
    std::fs::remove_file(&port_file)?;
    measured
}

fn join(store: &StoreServer, port_file: &std::path::Path) -> Outcome<(Agent, TcpStream)> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let port: u16 = loop {
        match std::fs::read_to_string(port_file).ok().and_then(|text| text.parse().ok()) {
            Some(port) => break port,
            None if Instant::now() > deadline => return Err("the server did not start".into()),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let pong = TcpStream::connect(("127.0.0.1", port))?;
    pong.set_nodelay(true)?;
    let mut options = Options::new(0, 2, store.address().to_string());
    options.host_store = false;
    if let Ok(transport) = std::env::var("FARCALL_TRANSPORT") {
        options.transport = transport.parse()?;
    }
    Ok((Agent::join_blocking(options)?, pong))
}

fn small_calls(agent: &Agent, pong: &mut TcpStream) -> Outcome {
    let to = agent.to("w1");
    let runtime = std::sync::Arc::new(CurrentThread);
    let mut buffer = [0; SMALL_BYTES];
    let names = [
        "raw blocking ping-pong",
        "call, pooled, wait()",
        "call, inline, wait()",
        "call, async handler, wait()",
        "call, pooled, .await",
    ];
    let mut columns: Vec<Vec<f64>> = vec![Vec::new(); names.len()];
    for block in 0..=SMALL_BLOCKS {
        let row = [
            time_us(SMALL_CALLS, || {
                pong.write_all(&buffer)?;
                Ok(pong.read_exact(&mut buffer)?)
            })?,
            time_us(SMALL_CALLS, || used(to.call(next, (7,)).wait()?))?,
            time_us(SMALL_CALLS, || used(to.call(next_inline, (7,)).wait()?))?,
            time_us(SMALL_CALLS, || used(to.call(next_async, (7,)).wait()?))?,
            time_us(SMALL_CALLS, || used(runtime.block_on(to.call(next, (7,)).into_future())?))?,
        ];
        if block > 0 {
            columns.iter_mut().zip(row).for_each(|(column, value)| column.push(value));
        }
    }
    let base = spread(columns[0].clone()).median;
    for (name, column) in names.iter().zip(columns) {
        let Spread { median, low, high } = spread(column);
        println!("  {name:<28} {median:>8.2} {low:>8.2} {high:>8.2} {:>7.2}", median / base);
    }
    Ok(())
}

/// The smallest executor: parks this thread. What a program's own runtime adds is its own.
struct CurrentThread;

impl CurrentThread {
    fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = std::pin::pin!(future);
        let waker = std::task::Waker::from(std::sync::Arc::new(Unpark(std::thread::current())));
        let mut cx = std::task::Context::from_waker(&waker);
        loop {
            match future.as_mut().poll(&mut cx) {
                std::task::Poll::Ready(value) => return value,
                std::task::Poll::Pending => std::thread::park(),
            }
        }
    }
}

struct Unpark(std::thread::Thread);

impl std::task::Wake for Unpark {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.unpark();
    }
}

fn warm(len: usize) -> Outcome<Tensor> {
    let mut tensor = TensorMut::empty(DType::U8, &[len])?;
    tensor.as_mut_slice::<u8>()?.fill(7);
    Ok(tensor.freeze_ready())
}

fn page_faults_per_call(agent: &Agent) -> Outcome {
    println!("\nminor page faults per call once warm (caller, callee)");
    let to = agent.to("w1");
    for (name, len, calls) in
        [("8 B", 8, 1000), ("64 KiB", 64 << 10, 500), ("1 MiB", MIB, 200), ("64 MiB", 64 * MIB, 10)]
    {
        let tensor = warm(len)?;
        let count = |calls: usize| -> Outcome<(f64, f64)> {
            let before = (page_faults()?, to.call(faults, ()).wait()?);
            for _ in 0..calls {
                used(to.call(echo, (&tensor,)).wait()?)?;
            }
            let after = (page_faults()?, to.call(faults, ()).wait()?);
            Ok(((after.0 - before.0) as f64 / calls as f64, (after.1 - before.1) as f64 / calls as f64))
        };
        count(calls)?;
        let started = Instant::now();
        let (here, there) = count(calls)?;
        let rate = (2 * len * calls) as f64 / started.elapsed().as_secs_f64() / 1e9;
        println!("{:<30} {here:>8.3} {there:>8.3}   {rate:.2} GB/s", format!("echo of {name}, {calls} calls"));
    }
    Ok(())
}
