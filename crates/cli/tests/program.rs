//! Runs the built program, bounded in time.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long a run may take.
const RUN_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// How a run ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    pub(crate) fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("ended by a signal: {self:?}"))
    }
}

/// A run, killed when dropped.
pub(crate) struct Run {
    child: Child,
    stdout: Captured,
    stderr: Captured,
}

/// What a run has written so far, and who reads it to its end.
struct Captured(Arc<Mutex<Vec<u8>>>, Option<JoinHandle<()>>);

impl Captured {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let (mut pipe, text) = (pipe.expect("piped"), Arc::<Mutex<Vec<u8>>>::default());
        let written = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            // What came before a broken pipe counts.
            while let Ok(len @ 1..) = pipe.read(&mut chunk) {
                written.lock().expect("no panic").extend_from_slice(&chunk[..len]);
            }
        });
        Self(text, Some(reader))
    }

    fn finish(&mut self) -> String {
        self.1.take().expect("finished once").join().expect("a reader");
        self.text()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("no panic")).into_owned()
    }
}

/// Starts `farcall` without what somebody's shell has for other jobs.
pub(crate) fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Run {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farcall"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("FARCALL_") {
            command.env_remove(name);
        }
    }
    command.args(arguments).envs(variables.iter().copied());
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("farcall starts");
    let (stdout, stderr) = (Captured::of(child.stdout.take()), Captured::of(child.stderr.take()));
    Run { child, stdout, stderr }
}

/// Runs `farcall` to its end.
pub(crate) fn farcall(arguments: &[&str]) -> Ended {
    start(arguments, &[]).end()
}

impl Run {
    pub(crate) fn signal(&self, signal: Signal) {
        // Not reaped before `end`, so the id is its own.
        kill_process(Pid::from_child(&self.child), signal).expect("a child can be signalled");
    }

    /// What it has written so far.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// The processes that it has started and that live.
    pub(crate) fn children(&self) -> Vec<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = std::fs::read_to_string(path).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
    }

    pub(crate) fn end(mut self) -> Ended {
        let ended = self.await_end();
        Ended { status: ended, stdout: self.stdout.finish(), stderr: self.stderr.finish() }
    }

    fn await_end(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("farcall ends", RUN_MAX, || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        status.expect("set when it ended")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Ended already, or ends now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Polls a fact of the operating system until it holds.
pub(crate) fn eventually(what: &str, within: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + within;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {within:?}: {what}");
        std::thread::sleep(POLL);
    }
}

/// Whether a process lives; one that is only not reaped yet does not.
pub(crate) fn lives(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with('Z'))
}
