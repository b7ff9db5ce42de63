//! Starts the workers of a group on this machine and sees them to their end.
//!
//! The launcher hosts the store, so it outlives every worker that needs it. A worker that fails ends the group: the
//! others get SIGTERM, and SIGKILL after [`GRACE`]. So do all of them when the launcher is told to end.
//! The workers share a job key: the launcher's own if its environment has one, else one made for them. They get it in their
//! environment, which their own user and root can read; a command line could be read by everybody.

use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdout, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use farcall::transport::StoreLimits;
use farcall::{JobKey, Options, StoreServer};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::Failure;

const GRACE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_millis(5);

/// A group of processes started here.
pub(crate) struct Workers {
    children: Vec<Option<Child>>,
    told_to_end: Arc<AtomicUsize>,
    /// Kept until the workers have ended.
    _store: Option<StoreServer>,
}

/// Where a single worker finds its group.
pub(crate) struct Place<'a> {
    pub(crate) rank: u32,
    pub(crate) world_size: u32,
    pub(crate) store: &'a str,
    pub(crate) group: &'a str,
    /// Unless its environment has one already.
    pub(crate) key: Option<&'a JobKey>,
}

impl Place<'_> {
    fn tell(&self, command: &mut Command) {
        command
            .env("FARCALL_RANK", self.rank.to_string())
            .env("FARCALL_WORLD_SIZE", self.world_size.to_string())
            .env("FARCALL_LOCAL_RANK", self.rank.to_string())
            .env("FARCALL_STORE", self.store)
            .env("FARCALL_GROUP", self.group)
            .env("FARCALL_HOST_STORE", "0");
        if let Some(key) = self.key {
            command.env("FARCALL_KEY", key.to_hex());
        }
    }
}

/// How a worker ended.
pub(crate) struct Ended {
    pub(crate) rank: usize,
    pub(crate) status: ExitStatus,
}

impl Workers {
    /// Starts `n` workers; `command` makes the one of a rank, the environment is added here.
    pub(crate) fn start(n: u32, command: impl Fn(u32) -> Command) -> Result<Self, Failure> {
        let given = Options::key_from_env()?;
        let key = given.clone().map_or_else(JobKey::random, Ok)?;
        let store = StoreServer::bind_with("127.0.0.1:0", StoreLimits::default(), Some(key.clone()))?;
        let (address, group) = (store.address().to_string(), format!("run-{}", std::process::id()));
        let mut workers = Self { children: Vec::new(), told_to_end: told_to_end()?, _store: Some(store) };
        for rank in 0..n {
            let key = given.is_none().then_some(&key);
            workers.spawn(command(rank), &Place { rank, world_size: n, store: &address, group: &group, key })?;
        }
        Ok(workers)
    }

    /// Starts the only worker here of a group whose store is elsewhere.
    pub(crate) fn start_one(command: Command, place: &Place<'_>) -> Result<Self, Failure> {
        let mut workers = Self { children: Vec::new(), told_to_end: told_to_end()?, _store: None };
        workers.spawn(command, place)?;
        Ok(workers)
    }

    fn spawn(&mut self, mut command: Command, place: &Place<'_>) -> Result<(), Failure> {
        place.tell(&mut command);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().map_err(|error| format!("cannot start {program}: {error}"))?;
        self.children.push(Some(child));
        Ok(())
    }

    /// The piped output of the worker that was started first.
    pub(crate) fn take_output(&mut self) -> Option<ChildStdout> {
        self.children.first_mut()?.as_mut()?.stdout.take()
    }

    /// Writes to the piped input of the worker that was started first; one that has ended hears nothing.
    pub(crate) fn tell(&mut self, line: &str) {
        if let Some(input) = self.children.first_mut().and_then(|child| child.as_mut()?.stdin.as_mut()) {
            let _ = writeln!(input, "{line}");
        }
    }

    /// Waits for the next worker to end; `None` once all have, or an interrupt's signal as the error.
    pub(crate) fn next(&mut self) -> Result<Option<Ended>, Interrupted> {
        loop {
            let mut running = false;
            for (rank, slot) in self.children.iter_mut().enumerate() {
                let Some(child) = slot else { continue };
                running = true;
                if let Ok(Some(status)) = child.try_wait() {
                    *slot = None;
                    return Ok(Some(Ended { rank, status }));
                }
            }
            if !running {
                return Ok(None);
            }
            match self.told_to_end.load(Ordering::SeqCst) {
                0 => std::thread::sleep(TICK),
                signal => return Err(Interrupted(signal)),
            }
        }
    }

    /// Waits for the next worker to end, whatever signals come; `None` once all have, or at `deadline`.
    pub(crate) fn next_until(&mut self, deadline: Instant) -> Option<usize> {
        loop {
            let before = self.children.iter().flatten().count();
            let left = self.reap();
            if left < before {
                return Some(left);
            }
            if left == 0 || Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(TICK);
        }
    }

    /// Ends what still runs: politely, then not.
    pub(crate) fn end(&mut self) {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline && self.reap() > 0 {
            std::thread::sleep(TICK);
        }
        self.signal(Signal::KILL);
        for child in self.children.iter_mut().flatten() {
            // It was killed; it ends.
            let _ = child.wait();
        }
        self.children.clear();
    }

    fn reap(&mut self) -> usize {
        for slot in &mut self.children {
            if slot.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(Some(_)))) {
                *slot = None;
            }
        }
        self.children.iter().flatten().count()
    }

    fn signal(&self, signal: Signal) {
        for child in self.children.iter().flatten() {
            // A child that is not reaped keeps its id, so this reaches no one else.
            if let Some(pid) = Pid::from_raw(child.id() as i32) {
                let _ = kill_process(pid, signal);
            }
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        if self.reap() > 0 {
            self.end();
        }
    }
}

/// Becomes the number of the signal that tells this process to end.
pub(crate) fn told_to_end() -> io::Result<Arc<AtomicUsize>> {
    let told = Arc::new(AtomicUsize::new(0));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_usize(signal, Arc::clone(&told), signal as usize)?;
    }
    Ok(told)
}

/// The launcher was told to end, by this signal.
pub(crate) struct Interrupted(pub(crate) usize);

impl Interrupted {
    /// The exit code a shell expects.
    pub(crate) fn exit_code(&self) -> u8 {
        128 + self.0 as u8
    }
}

/// An exit code for a worker's end, as a shell gives it.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).map_or(1, |code| code as u8)
}

/// This program, to be started again as a worker.
pub(crate) fn this_program() -> io::Result<Command> {
    Ok(Command::new(std::env::current_exe()?))
}
