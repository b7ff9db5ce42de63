//! What the tests share: groups of agents in this process, and a bound on every test.

use std::cell::RefCell;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::transport::StoreLimits;
use farcall::{JobKey, StoreServer, TensorMut, Transport};

use crate::functions::add;

/// How long a test may take.
const TEST_MAX: Duration = Duration::from_secs(60);
/// How often facts of the operating system are looked at.
const POLL: Duration = Duration::from_millis(5);

thread_local! {
    static STEP: RefCell<Arc<Mutex<String>>> = RefCell::default();
}

/// Says what the test does now: the name of what hung, should it hang.
pub(crate) fn step(what: impl fmt::Display) {
    STEP.with_borrow(|step| *step.lock().unwrap_or_else(PoisonError::into_inner) = what.to_string());
}

/// Runs a test's body; after [`TEST_MAX`] the test fails with the last [`step`].
pub(crate) fn bounded(body: impl FnOnce() + Send + 'static) {
    bounded_by(TEST_MAX, body);
}

/// The same for tests that take longer.
pub(crate) fn bounded_by(max: Duration, body: impl FnOnce() + Send + 'static) {
    let name = thread::current().name().unwrap_or("a test").to_owned();
    let last = Arc::new(Mutex::new("its first".to_owned()));
    let (ended, wait) = mpsc::channel::<()>();
    let step = Arc::clone(&last);
    let runner = thread::Builder::new().name(name.clone()).spawn(move || {
        // Dropped at the end, also by a panic.
        let _ended = ended;
        STEP.set(step);
        body();
    });
    let runner = runner.expect("a thread for the test");
    if wait.recv_timeout(max) == Err(mpsc::RecvTimeoutError::Timeout) {
        let last = last.lock().unwrap_or_else(PoisonError::into_inner);
        panic!("{name} did not end within {max:?}; it hung in: {last}");
    }
    if let Err(panic) = runner.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A name that no other test of this process uses.
pub(crate) fn unique(what: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{what}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Polls a fact of the operating system, or of another thread that tells nobody, until it holds.
pub(crate) fn eventually(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        thread::sleep(POLL);
    }
}

/// Runs a future on a runtime of this thread.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// The job key of groups that do not choose: a new one, unless `TEST_KEY=none` says that the suite runs without.
pub(crate) fn job_key() -> Option<JobKey> {
    match std::env::var("TEST_KEY").as_deref() {
        Err(_) => Some(JobKey::random().expect("random bytes")),
        Ok("none") => None,
        Ok(other) => panic!("TEST_KEY={other}: only none is known"),
    }
}

/// The sockets of groups that do not choose, as workers in processes of their own read it, too.
pub(crate) fn transport() -> Transport {
    let text = std::env::var("FARCALL_TRANSPORT");
    text.map_or(Transport::Auto, |text| text.parse().expect("FARCALL_TRANSPORT"))
}

/// Agents of one group in this process, `w0` to `w<n-1>`.
pub(crate) struct Group {
    pub(crate) agents: Vec<Agent>,
    pub(crate) key: Option<JobKey>,
    pub(crate) name: String,
    _store: StoreServer,
}

impl Group {
    pub(crate) fn new(n: u32) -> Self {
        Self::with(n, |_| {})
    }

    /// A group whose options are changed by `change` first.
    pub(crate) fn with(n: u32, change: impl Fn(&mut Options)) -> Self {
        Self::with_key(n, job_key(), change)
    }

    /// The same, with this job key or without any.
    pub(crate) fn with_key(n: u32, key: Option<JobKey>, change: impl Fn(&mut Options)) -> Self {
        step("joining a group");
        let store = StoreServer::bind_with("127.0.0.1:0", StoreLimits::default(), key.clone()).expect("a store");
        let name = unique("group");
        let joining: Vec<_> = (0..n)
            .map(|rank| {
                let mut options = Options::new(rank, n, store.address().to_string());
                options.host_store = false;
                options.group = name.clone();
                options.key = key.clone();
                options.transport = transport();
                #[cfg(feature = "tls")]
                if crate::hostile::tls::is_asked_for() {
                    (options.transport, options.tls) = (Transport::Tcp, Some(crate::hostile::tls::shared()));
                }
                change(&mut options);
                thread::spawn(move || Agent::join_blocking(options))
            })
            .collect();
        let agents = joining.into_iter().map(|agent| agent.join().expect("no panic").expect("joins")).collect();
        step("the test's own calls");
        Self { agents, key, name, _store: store }
    }

    /// Where a worker listens.
    pub(crate) fn address(&self, rank: u32) -> SocketAddr {
        self.agents[0].workers().nth(rank as usize).expect("a worker of the group").address
    }

    /// Every worker answers every other, over the wire.
    pub(crate) fn answers(&self) {
        for (from, agent) in self.agents.iter().enumerate() {
            for to in (0..self.agents.len()).filter(|to| *to != from) {
                step(format_args!("w{to} answers w{from}"));
                assert_eq!(agent.to(to as u32).call(add, (2, 3)).wait().expect("a healthy worker answers"), 5);
            }
        }
    }

    /// Everybody leaves, in order.
    pub(crate) fn shutdown(self) {
        step("the group's shutdown");
        let leaving: Vec<_> =
            self.agents.iter().cloned().map(|agent| thread::spawn(move || agent.shutdown_blocking())).collect();
        for leaving in leaving {
            leaving.join().expect("no panic").expect("leaves in order");
        }
    }
}

/// A tensor of `dtype` with exactly these bytes.
pub(crate) fn tensor_of(dtype: DType, shape: &[usize], bytes: &[u8]) -> Tensor {
    let mut tensor = TensorMut::empty(dtype, shape).expect("a small tensor");
    tensor.storage_mut().as_bytes_mut().expect("host").copy_from_slice(bytes);
    tensor.freeze_ready()
}

/// The packed bytes of a contiguous host tensor.
pub(crate) fn bytes_of(tensor: &Tensor) -> &[u8] {
    assert!(tensor.is_contiguous(), "{tensor:?}");
    &tensor.storage().as_bytes().expect("ready on the host")[tensor.layout().byte_span()]
}

/// 0.0, 1.0, 2.0 … in this shape.
pub(crate) fn counting(shape: &[usize]) -> Tensor {
    let elements: Vec<f32> = (0..shape.iter().product::<usize>()).map(|index| index as f32).collect();
    Tensor::from_slice(&elements, shape).expect("a small tensor")
}
