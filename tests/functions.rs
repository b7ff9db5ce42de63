//! The functions that tests call, in this process and in worker processes, and the gates that hold handlers until a
//! test lets them go on.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::{Builtin, Error, FromValue, Registry, Result, TensorMut};
use serde::{Deserialize, Serialize};

use crate::foreign::Foreign;

/// How long a handler waits for a test at most.
const PATIENCE: Duration = Duration::from_secs(30);

// ---- gates ----

#[derive(Default)]
struct GateState {
    arrived: usize,
    open: bool,
    order: u64,
    wakers: Vec<Waker>,
}

/// Where handlers wait until it is opened, and where their arrival is seen.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

/// The gate of this name in this process.
pub(crate) fn gate(key: &str) -> Arc<Gate> {
    static GATES: Mutex<Option<HashMap<String, Arc<Gate>>>> = Mutex::new(None);
    let mut gates = GATES.lock().unwrap_or_else(PoisonError::into_inner);
    Arc::clone(gates.get_or_insert_default().entry(key.to_owned()).or_default())
}

impl Gate {
    fn change<T>(&self, change: impl FnOnce(&mut GateState) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let value = change(&mut state);
        let wakers = if state.open { std::mem::take(&mut state.wakers) } else { Vec::new() };
        drop(state);
        self.changed.notify_all();
        wakers.into_iter().for_each(Waker::wake);
        value
    }

    fn wait_until(&self, reached: impl Fn(&GateState) -> bool) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !reached(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// Counts one arrival and blocks until the gate is open; false after [`PATIENCE`].
    pub(crate) fn pass(&self) -> bool {
        self.change(|state| state.arrived += 1);
        self.wait_until(|state| state.open)
    }

    /// As [`Gate::pass`], holding no thread.
    async fn pass_async(&self) {
        self.change(|state| state.arrived += 1);
        std::future::poll_fn(|cx| {
            self.change(|state| {
                if state.open {
                    return Poll::Ready(());
                }
                state.wakers.push(cx.waker().clone());
                Poll::Pending
            })
        })
        .await;
    }

    /// Blocks until `count` have arrived; false after [`PATIENCE`].
    pub(crate) fn wait_arrived(&self, count: usize) -> bool {
        self.wait_until(|state| state.arrived >= count)
    }

    #[allow(dead_code, reason = "for the tests' own process")]
    /// Blocks until it is open; false after [`PATIENCE`].
    pub(crate) fn wait_open(&self) -> bool {
        self.wait_until(|state| state.open)
    }

    #[allow(dead_code, reason = "for the tests' own process")]
    /// Arrivals so far.
    pub(crate) fn arrived(&self) -> usize {
        self.change(|state| state.arrived)
    }

    /// Lets everyone through, from now on.
    pub(crate) fn open(&self) {
        self.change(|state| state.open = true);
    }
}

/// Every function, and builtins of the tests' own.
pub(crate) fn registry() -> Registry {
    type Line = (&'static str, fn(&Call, &[Value]) -> Result<Value>);
    let builtins: [Line; 7] = [
        ("test::echo(Any x) -> Any", |_, values| Ok(values[0].clone())),
        ("test::all(Tensor x, int[2] n=1, *, float k=2, str? note=None) -> Any", |_, values| {
            Ok(values.to_vec().into())
        }),
        ("test::half.int(int x) -> int", |_, values| Ok((i64::from_value(values[0].clone())? / 2).into())),
        ("test::half.float(float x) -> float", |_, values| Ok((f64::from_value(values[0].clone())? / 2.0).into())),
        ("test::fail(str why) -> ()", |_, values| Err(Error::msg(String::from_value(values[0].clone())?))),
        ("test::panic() -> ()", |_, _| panic!("as told")),
        ("test::hold(str key) -> bool", |_, values| Ok(gate(&String::from_value(values[0].clone())?).pass().into())),
    ];
    builtins.into_iter().fold(Registry::collected(), |registry, (signature, run)| {
        registry.with_builtin(Builtin::new(signature, run).expect("a signature"))
    })
}

/// Counts an arrival and blocks until the gate is open.
#[farcall::function(name = "test::hold")]
pub(crate) fn hold(key: String) -> bool {
    gate(&key).pass()
}

/// Writes so many MiB of tensors, and keeps them.
#[farcall::function(name = "test::keep_mib")]
pub(crate) fn keep_mib(cx: &Call, mib: usize) -> Result<()> {
    static KEPT: Mutex<Vec<farcall::Storage>> = Mutex::new(Vec::new());
    for _ in 0..mib / 64 {
        let mut bytes = cx.agent().runtime().alloc_host(64 << 20)?;
        bytes.as_bytes_mut()?.fill(7);
        KEPT.lock().unwrap_or_else(PoisonError::into_inner).push(bytes.freeze_ready());
    }
    Ok(())
}

/// Starts a process that inherits every socket of this one and outlives it; gives its id.
#[farcall::function(name = "test::leave_an_heir")]
pub(crate) fn leave_an_heir() -> Result<u32> {
    use std::os::fd::BorrowedFd;
    let mut sockets = 0;
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        // The folder's own descriptor is gone by now.
        let Ok(target) = std::fs::read_link(&path) else { continue };
        if let Some(number) = path.file_name().and_then(|name| name.to_str()?.parse().ok())
            && target.to_string_lossy().starts_with("socket:")
        {
            #[expect(unsafe_code, reason = "a descriptor that this process has, by its number")]
            // SAFETY: it was open a moment ago; should it be closed meanwhile, setting a flag on another harms nobody here.
            let socket = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(socket, rustix::io::FdFlags::empty())?;
            sockets += 1;
        }
    }
    assert!(sockets > 1, "a listener and a connection at least");
    let null = std::process::Stdio::null;
    let heir = std::process::Command::new("sleep").arg("60").stdin(null()).stdout(null()).stderr(null()).spawn()?;
    Ok(heir.id())
}

/// Forks this process. The child tries all that an agent offers, then lives on; gives its id, and what it found.
#[farcall::function(name = "test::fork")]
#[expect(unsafe_code, reason = "a fork")]
pub(crate) fn fork(cx: &Call, key: String) -> Result<(i32, String)> {
    use std::io::{Read, Write};
    let (mut there, mut here) = std::os::unix::net::UnixStream::pair()?;
    let waiting = cx.agent().to("w0").call(hold, (&key,));
    let tensor = Tensor::from_slice(&[1_u8; 100], &[100])?;
    // SAFETY: the child runs what follows on its only thread, and never returns from here.
    let child = unsafe { libc::fork() };
    if child == 0 {
        drop(here);
        let mut found = Vec::new();
        let mut see =
            |what: &str, refused: bool| found.push(format!("{what}: {}", if refused { "refused" } else { "?" }));
        see("wait", matches!(waiting.wait(), Err(CallError::ForkedProcess { .. })));
        see("call", matches!(cx.agent().to("w0").call(add, (1, 2)).wait(), Err(CallError::ForkedProcess { .. })));
        see("shutdown", matches!(cx.agent().shutdown_blocking(), Err(farcall::JoinError::ForkedProcess)));
        see("join", matches!(Agent::join_blocking(Options::new(0, 1, "")), Err(farcall::JoinError::ForkedProcess)));
        let forked = |error| matches!(error, farcall::DeviceError::ForkedProcess);
        see("tensor", tensor.as_slice::<u8>().is_err_and(forked));
        see("memory", Tensor::from_slice(&[1_u8; 100], &[100]).is_err_and(forked));
        drop(tensor);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        see("slabs", !maps.is_empty() && !maps.contains("farcall-slab") && !maps.contains("farcall-rings"));
        cx.agent().abort();
        drop(cx.agent().clone());
        // The parent sees the end of the pipe when this has been written.
        let _ = there.write_all(found.join(", ").as_bytes());
        drop(there);
        std::thread::sleep(PATIENCE);
        // SAFETY: ends the child, and runs nothing of the parent's.
        unsafe { libc::_exit(0) };
    }
    drop(there);
    let mut found = String::new();
    here.read_to_string(&mut found)?;
    gate(&key).open();
    Ok((child, found))
}

/// Computes for so many milliseconds.
#[farcall::function(name = "test::spin")]
pub(crate) fn spin(millis: u64) -> bool {
    let until = std::time::Instant::now() + Duration::from_millis(millis);
    while std::time::Instant::now() < until {
        std::hint::spin_loop();
    }
    true
}

/// As `spin`, though `inline` promises to be short.
#[farcall::function(name = "test::spin_inline", inline)]
pub(crate) fn spin_inline(millis: u64) -> bool {
    spin::run(millis)
}

/// As `hold`, holding no thread.
#[farcall::function(name = "test::hold_async")]
pub(crate) async fn hold_async(key: String, x: i64) -> i64 {
    gate(&key).pass_async().await;
    x
}

/// Blocks until `count` have arrived at the gate.
#[farcall::function(name = "test::arrived")]
pub(crate) fn arrived(key: String, count: usize) -> bool {
    gate(&key).wait_arrived(count)
}

/// Opens the gate.
#[farcall::function(name = "test::open")]
pub(crate) fn open(key: String) {
    gate(&key).open();
}

/// Blocks until `count` calls are in it at once; returns at once for 0.
#[farcall::function(name = "test::meet")]
pub(crate) fn meet(key: String, count: usize) -> bool {
    if count == 0 {
        return true;
    }
    let gate = gate(&key);
    gate.change(|state| state.arrived += 1);
    gate.wait_arrived(count)
}

/// The how-manieth call with this key it is.
#[farcall::function(name = "test::order")]
pub(crate) fn order(key: String) -> u64 {
    gate(&key).change(|state| {
        state.order += 1;
        state.order
    })
}

/// As `order`, for a call that brings a tensor.
#[farcall::function(name = "test::order_with")]
pub(crate) fn order_with(key: String, _x: Tensor) -> u64 {
    order::run(key)
}

// ---- values ----

/// Gives a tensor back.
#[farcall::function(name = "test::echo")]
pub(crate) fn echo(x: Tensor) -> Tensor {
    x
}

/// Gives a tensor back, from where the request was read.
#[farcall::function(name = "test::echo_inline", inline)]
pub(crate) fn echo_inline(x: Tensor) -> Tensor {
    x
}

/// Gives a tensor back without ever waiting.
#[farcall::function(name = "test::echo_async")]
pub(crate) async fn echo_async(x: Tensor) -> Tensor {
    x
}

/// Gives a tensor back after it was put aside once.
#[farcall::function(name = "test::echo_later")]
pub(crate) async fn echo_later(x: Tensor) -> Tensor {
    tokio::task::yield_now().await;
    x
}

static KEPT_TENSORS: Mutex<Vec<(String, Tensor)>> = Mutex::new(Vec::new());

/// Keeps a tensor beyond the call, in place of any other of that key.
#[farcall::function(name = "test::keep")]
pub(crate) fn keep(key: String, x: Tensor) {
    forget::run(key.clone());
    KEPT_TENSORS.lock().unwrap_or_else(PoisonError::into_inner).push((key, x));
}

/// The hash of what is kept.
#[farcall::function(name = "test::kept_hash")]
pub(crate) fn kept_hash(key: String) -> Result<(usize, u64)> {
    let kept = KEPT_TENSORS.lock().unwrap_or_else(PoisonError::into_inner);
    let kept = kept.iter().find(|(name, _)| *name == key).map(|(_, x)| x.clone());
    hash::run(kept.ok_or_else(|| farcall::Error::msg("nothing is kept under that key"))?)
}

/// Drops what is kept.
#[farcall::function(name = "test::forget")]
pub(crate) fn forget(key: String) {
    let gone: Vec<_> =
        KEPT_TENSORS.lock().unwrap_or_else(PoisonError::into_inner).extract_if(.., |(name, _)| *name == key).collect();
    drop(gone);
}

fn filled(x: Tensor, value: u8) -> Result<Tensor> {
    let (shape, storage) = (x.layout().clone(), x.storage().clone());
    drop(x);
    let alone = storage.try_unique();
    let mut bytes = alone.map_err(|_| farcall::Error::msg("somebody else holds the argument"))?;
    bytes.as_bytes_mut()?.fill(value);
    Ok(Tensor::from_storage(bytes.freeze_ready(), shape)?)
}

/// Writes over its argument, in place; gives the hash of what it was, and whether it is what was written.
#[farcall::function(name = "test::own_and_fill")]
pub(crate) fn own_and_fill(x: Tensor, value: u8) -> Result<((usize, u64), bool)> {
    let before = hash::run(x.clone())?;
    let after = filled(x, value)?;
    Ok((before, after.as_slice::<u8>()?.iter().all(|byte| *byte == value)))
}

/// Writes over its argument, in place, and sends it back.
#[farcall::function(name = "test::own_fill_and_echo")]
pub(crate) fn own_fill_and_echo(x: Tensor, value: u8) -> Result<Tensor> {
    filled(x, value)
}

/// As `pattern`, in memory that is not this library's.
#[farcall::function(name = "test::foreign_pattern")]
pub(crate) fn foreign_pattern(len: usize, seed: u64) -> Result<Tensor> {
    Ok(Foreign::new(pattern::run(len, seed)?.to_vec::<u8>()?).tensor())
}

/// Each one's hash.
#[farcall::function(name = "test::hash_all")]
pub(crate) fn hash_all(xs: Vec<Tensor>) -> Result<Vec<(usize, u64)>> {
    xs.into_iter().map(hash::run).collect()
}

/// Sends back the rows from there on, turned.
#[farcall::function(name = "test::rows_from")]
pub(crate) fn rows_from(x: Tensor, start: usize) -> Result<Tensor> {
    let rows = x.shape()[0];
    Ok(x.narrow(0, start, rows - start)?.transpose(0, 1)?)
}

/// Writes over its argument, in place, and keeps it.
#[farcall::function(name = "test::own_and_fill_kept")]
pub(crate) fn own_and_fill_kept(key: String, x: Tensor, value: u8) -> Result<()> {
    keep::run(key, filled(x, value)?);
    Ok(())
}

/// Passes tensors to and from a worker until it is lost; gives how many calls that were, or what was wrong with a tensor.
#[farcall::function(name = "test::trade")]
pub(crate) fn trade(cx: &Call, worker: String, seed: u64) -> Result<u64> {
    let other = cx.to(&worker);
    let mut kept = std::collections::VecDeque::new();
    let mut calls = 0;
    loop {
        let round = seed + calls;
        let len = [5000, 100_000, 1 << 20, 3 << 20][(round % 4) as usize];
        let x = pattern::run(len, round)?;
        let expected = hash::run(x.clone())?;
        // Its own memory, and in turn what others made: that lands.
        let x = if round % 8 < 4 { x } else { Foreign::new(x.to_vec::<u8>()?).tensor() };
        let Ok(hashed) = other.call(hash, (x,)).wait() else { break };
        let Ok(made) = other.call(pattern, (len, round)).wait() else { break };
        calls += 2;
        if hashed != expected {
            return Err(farcall::Error::msg(format!("{len} bytes were not what was sent")));
        }
        kept.push_back((made, expected));
        if kept.len() > 6 {
            kept.pop_front();
        }
    }
    // What came from the dead worker is as it was.
    for (made, expected) in kept {
        if hash::run(made)? != expected {
            return Err(farcall::Error::msg("a tensor changed after its sender's death"));
        }
    }
    Ok(calls)
}

/// Sends memory that is not this library's when the process has no descriptor left for memory of its own, and writes over it once the
/// call was made; whether what came was as it was before.
#[farcall::function(name = "test::sends_without_descriptors")]
pub(crate) fn sends_without_descriptors(cx: &Call, worker: String, len: usize) -> Result<bool> {
    let _permits: Vec<_> = std::iter::from_fn(farcall::device::DescriptorPermit::take).collect();
    let bytes: Vec<u8> = (0..len).map(|index| (index % 251) as u8).collect();
    let expected = hash::run(Tensor::from_slice(&bytes, &[len])?)?;
    let x = Foreign::new(bytes);
    let reply = cx.to(&worker).call(hash, (x.tensor(),));
    x.fill(0xee);
    Ok(reply.wait()? == expected)
}

/// How often a peer's slab is mapped here.
#[farcall::function(name = "test::mapped_slabs")]
pub(crate) fn mapped_slabs() -> Result<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    Ok(maps.lines().filter(|line| line.contains("r--s") && line.contains("memfd:farcall-slab")).count())
}

/// Gives tensors back.
#[farcall::function(name = "test::echo_all")]
pub(crate) fn echo_all(xs: Vec<Tensor>) -> Vec<Tensor> {
    xs
}

/// One of each kind of value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Part {
    Unit,
    Newtype(Tensor),
    Tuple(u8, Option<Tensor>),
    Struct { name: String, inner: Box<Message> },
}

/// A value with tensors anywhere inside.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) id: u64,
    pub(crate) parts: Vec<Part>,
    pub(crate) named: HashMap<String, Tensor>,
    pub(crate) pair: (Option<Tensor>, Option<Tensor>),
    pub(crate) text: Option<String>,
}

/// Gives a message back.
#[farcall::function(name = "test::echo_message")]
pub(crate) fn echo_message(message: Message) -> Message {
    message
}

/// A sum.
#[farcall::function(name = "test::add")]
pub(crate) fn add(a: i64, b: i64) -> i64 {
    a + b
}

/// Eight arguments, the most there are.
#[farcall::function(name = "test::eight")]
#[expect(clippy::too_many_arguments, reason = "as many as a function may have")]
pub(crate) fn eight(a: bool, b: u8, c: i16, d: u32, e: f32, f: f64, g: String, h: Tensor) -> Result<String> {
    Ok(format!("{a} {b} {c} {d} {e} {f} {g} {:?}", h.to_vec::<u8>()?))
}

/// Nothing in, nothing out.
#[farcall::function(name = "test::nothing")]
pub(crate) fn nothing() {}

/// The shape and strides as they arrived.
#[farcall::function(name = "test::layout")]
pub(crate) fn layout(x: Tensor) -> (Vec<usize>, Vec<i64>) {
    (x.shape().to_vec(), x.strides().to_vec())
}

/// The elements in row-major order, as they arrived.
#[farcall::function(name = "test::elements")]
pub(crate) fn elements(x: Tensor) -> Result<Vec<f32>> {
    Ok(x.to_vec::<f32>()?)
}

/// A tensor of `len` bytes that `seed` decides.
#[farcall::function(name = "test::pattern")]
pub(crate) fn pattern(len: usize, seed: u64) -> Result<Tensor> {
    let mut tensor = TensorMut::empty(DType::U8, &[len])?;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for bytes in tensor.as_mut_slice::<u8>()?.chunks_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.copy_from_slice(&state.to_le_bytes()[..bytes.len()]);
    }
    Ok(tensor.freeze_ready())
}

/// As `pattern`, once the gate is open.
#[farcall::function(name = "test::pattern_after")]
pub(crate) fn pattern_after(key: String, len: usize, seed: u64) -> Result<Tensor> {
    gate(&key).pass();
    pattern::run(len, seed)
}

/// The length, and a hash of the bytes in order.
#[farcall::function(name = "test::hash")]
pub(crate) fn hash(x: Tensor) -> Result<(usize, u64)> {
    let bytes = x.as_slice::<u8>()?;
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for bytes in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        state = (state ^ u64::from_le_bytes(word)).wrapping_mul(0x0100_0000_01b3).rotate_left(29);
    }
    Ok((bytes.len(), state))
}

/// As `hash`, once the gate is open.
#[farcall::function(name = "test::hash_after")]
pub(crate) fn hash_after(key: String, x: Tensor) -> Result<(usize, u64)> {
    gate(&key).pass();
    hash::run(x)
}

// ---- the call itself ----

/// Who called, by name and rank, and by what name this function was.
#[farcall::function(name = "test::caller")]
pub(crate) fn caller(cx: &Call) -> (String, u32, String) {
    (cx.caller().name.to_string(), cx.caller().rank, cx.function().to_owned())
}

/// Microseconds that the caller still waits.
#[farcall::function(name = "test::remaining")]
pub(crate) fn remaining(cx: &Call) -> Option<u64> {
    cx.remaining().map(|left| left.as_micros() as u64)
}

/// Adds one at each worker it goes through; blocks its thread while the next one works.
#[farcall::function(name = "test::relay")]
pub(crate) fn relay(cx: &Call, through: Vec<String>, x: i64) -> Result<i64> {
    match through.split_first() {
        None => Ok(x + 1),
        Some((next, rest)) => Ok(cx.to(next).call(relay, (rest, x + 1)).wait()?),
    }
}

/// As `relay`, holding no thread.
#[farcall::function(name = "test::relay_async")]
pub(crate) async fn relay_async(cx: Call, through: Vec<String>, x: i64) -> Result<i64> {
    match through.split_first() {
        None => Ok(x + 1),
        Some((next, rest)) => Ok(cx.to(next).call(relay_async, (rest, x + 1)).await?),
    }
}

/// Calls `hold` on `worker` and gives the error's text.
#[farcall::function(name = "test::hold_there")]
pub(crate) async fn hold_there(cx: Call, worker: String, key: String) -> String {
    let outcome = cx.to(&worker).call(hold, (key,)).await;
    outcome.err().map_or_else(|| "no error".to_owned(), |error| error.to_string())
}

/// Calls `add` on `worker` and gives the error's text.
#[farcall::function(name = "test::add_there")]
pub(crate) async fn add_there(cx: Call, worker: String) -> String {
    let outcome = cx.to(&worker).call(add, (2, 3)).await;
    outcome.err().map_or_else(|| "no error".to_owned(), |error| error.to_string())
}

/// Calls `pattern_after` on `worker` and gives the error's text.
#[farcall::function(name = "test::pattern_there")]
pub(crate) async fn pattern_there(cx: Call, worker: String, key: String, len: usize) -> String {
    let outcome = cx.to(&worker).call(pattern_after, (key, len, 1)).await;
    outcome.err().map_or_else(|| "no error".to_owned(), |error| error.to_string())
}

/// Told when it is dropped.
struct OpensWhenDropped(String);

impl Drop for OpensWhenDropped {
    fn drop(&mut self) {
        gate(&self.0).open();
    }
}

/// Arrives at the gate, calls itself at the next worker, and never ends by itself. Opens the gate when it is dropped.
#[farcall::function(name = "test::linger")]
pub(crate) async fn linger(cx: Call, through: Vec<String>, key: String) -> Result<()> {
    let dropped = OpensWhenDropped(format!("{key} {}", cx.agent().worker()));
    gate(&dropped.0).change(|state| state.arrived += 1);
    match through.split_first() {
        None => std::future::pending().await,
        Some((next, rest)) => Ok(cx.to(next).call(linger, (rest, &key)).await?),
    }
}

/// Blocks until it is cancelled; gives whether it was.
#[farcall::function(name = "test::until_cancelled")]
pub(crate) fn until_cancelled(cx: &Call, key: String) -> bool {
    let until = Instant::now() + PATIENCE;
    gate(&key).change(|state| state.arrived += 1);
    while !cx.is_cancelled() && Instant::now() < until {
        std::thread::yield_now();
    }
    if cx.is_cancelled() {
        gate(&key).open();
    }
    cx.is_cancelled()
}

/// Blocks in a call of its own until that ends; opens the gate with its error.
#[farcall::function(name = "test::blocked_in")]
pub(crate) fn blocked_in(cx: &Call, worker: String, key: String) -> bool {
    let outcome = cx.to(&worker).call(hold, (format!("{key} there"),)).wait();
    let cancelled = matches!(outcome, Err(CallError::Cancelled { .. }));
    if cancelled {
        gate(&key).open();
    }
    cancelled
}

/// What its callee has left of the deadline, microseconds.
#[farcall::function(name = "test::remaining_there")]
pub(crate) fn remaining_there(cx: &Call, worker: String) -> Result<Option<u64>> {
    Ok(cx.to(&worker).deadline(Duration::from_secs(3600)).call(remaining, ()).wait()?)
}

/// Makes so many calls to `worker` at once, each with a tensor of `len` bytes there and back; gives how many were right.
#[farcall::function(name = "test::burst")]
pub(crate) async fn burst(cx: Call, worker: String, calls: usize, len: usize) -> Result<usize> {
    let x = pattern::run(len, 3)?;
    let to = cx.to(&worker);
    let replies: Vec<_> = (0..calls).map(|_| to.call(echo, (&x,)).into_future()).collect();
    let mut right = 0;
    for reply in replies {
        right += usize::from(reply.await?.as_slice::<u8>()? == x.as_slice::<u8>()?);
    }
    Ok(right)
}

/// Calls of this worker in flight, and bytes of its storages. Unused memory goes back to the system.
#[farcall::function(name = "test::held")]
pub(crate) fn held(cx: &Call) -> (usize, usize) {
    cx.agent().runtime().trim();
    #[expect(unsafe_code, reason = "there is no safe name for it")]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0)
    };
    (cx.agent().in_flight(), cx.agent().runtime().stats().live_bytes)
}

// ---- failures ----

/// Fails with an error of the standard library.
#[farcall::function(name = "test::parse")]
pub(crate) fn parse(text: String) -> Result<i32> {
    Ok(text.parse()?)
}

/// An error with sources.
#[derive(Debug)]
pub(crate) struct Layered(&'static str, Option<Box<Layered>>);

impl fmt::Display for Layered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Layered {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.1.as_ref().map(|source| &**source as _)
    }
}

/// Fails with an error that has two sources.
#[farcall::function(name = "test::layered")]
pub(crate) fn layered() -> Result<(), Layered> {
    Err(Layered("cannot load", Some(Box::new(Layered("cannot read", Some(Box::new(Layered("disk on fire", None))))))))
}

/// Panics.
#[farcall::function(name = "test::panic_sync")]
pub(crate) fn panic_sync(text: String) {
    quietly(text)
}

/// Panics where the frame was read.
#[farcall::function(name = "test::panic_inline", inline)]
pub(crate) fn panic_inline(text: String) {
    quietly(text)
}

/// Panics at the first poll, or after it was put aside.
#[farcall::function(name = "test::panic_async")]
pub(crate) async fn panic_async(late: bool, text: String) {
    if late {
        tokio::task::yield_now().await;
    }
    quietly(text)
}

/// A panic that no hook prints.
fn quietly(text: String) {
    std::panic::resume_unwind(Box::new(text))
}

/// A reply whose metadata no peer accepts.
#[farcall::function(name = "test::long_text")]
pub(crate) fn long_text(len: usize) -> String {
    "x".repeat(len)
}

/// An error too long to be sent.
#[farcall::function(name = "test::long_error")]
pub(crate) fn long_error(len: usize) -> Result<()> {
    Err(farcall::Error::msg("x".repeat(len)))
}

/// A value that fails to be encoded.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Unencodable;

impl Serialize for Unencodable {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("never encodes"))
    }
}

/// Gives a value that cannot be encoded.
#[farcall::function(name = "test::unencodable")]
pub(crate) fn unencodable() -> Unencodable {
    Unencodable
}

/// Takes a value that cannot be encoded.
#[farcall::function(name = "test::take_unencodable")]
pub(crate) fn take_unencodable(_value: Unencodable) {}

/// Ends the process without a word.
#[farcall::function(name = "test::quit")]
pub(crate) fn quit(code: i32) {
    std::process::exit(code)
}

/// Twice each element, computed on the tensor's device by a stream, perhaps later.
#[farcall::function(name = "test::double_on_device")]
pub(crate) fn double_on_device(cx: &farcall::Call, x: Tensor) -> farcall::Result<Tensor> {
    let stream = cx.stream(x.device())?;
    let mut doubled = stream.alloc(x.numel() * 4)?;
    stream.launch(&[x.storage()], &mut doubled, |reads, bytes| {
        for (source, target) in reads[0].chunks_exact(4).zip(bytes.chunks_exact_mut(4)) {
            let element = f32::from_le_bytes([source[0], source[1], source[2], source[3]]);
            target.copy_from_slice(&(2.0 * element).to_le_bytes());
        }
    })?;
    Ok(farcall::TensorMut::from_storage(doubled, x.dtype(), x.shape())?.freeze(&stream))
}

/// Where a tensor has arrived.
#[farcall::function(name = "test::device_of")]
pub(crate) fn device_of(x: Tensor) -> String {
    x.device().to_string()
}

/// So many bytes, made where the call is read.
#[farcall::function(name = "test::bytes_inline", inline)]
pub(crate) fn bytes_inline(len: usize) -> Vec<u8> {
    vec![7; len]
}

/// Calls every other worker, and gives how many have answered.
#[farcall::function(name = "test::meet_all")]
pub(crate) async fn meet_all(cx: Call) -> Result<u32> {
    let others = cx.agent().workers().filter(|worker| worker.id != *cx.agent().worker());
    let replies: Vec<_> = others.map(|worker| cx.to(&worker.id).call(add, (2, 3))).collect();
    let mut answers = 0;
    for reply in replies {
        answers += u32::from(reply.await? == 5);
    }
    Ok(answers)
}
