//! Runs the built program, bounded in time.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
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
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
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
    let (stdout, stderr) = (captured(child.stdout.take()), captured(child.stderr.take()));
    Run { child, stdout, stderr }
}

/// Runs `farcall` to its end.
pub(crate) fn farcall(arguments: &[&str]) -> Ended {
    start(arguments, &[]).end()
}

fn captured(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    let mut pipe = pipe.expect("piped");
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before a broken pipe counts.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

impl Run {
    pub(crate) fn signal(&self, signal: Signal) {
        // Not reaped before `end`, so the id is its own.
        kill_process(Pid::from_child(&self.child), signal).expect("a child can be signalled");
    }

    /// The processes that it has started and that live.
    pub(crate) fn children(&self) -> Vec<u32> {
        let path = format!("/proc/{0}/task/{0}/children", self.child.id());
        let children = std::fs::read_to_string(path).unwrap_or_default();
        children.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
    }

    pub(crate) fn end(mut self) -> Ended {
        let mut status = None;
        eventually("farcall ends", RUN_MAX, || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        let status = status.expect("set when it ended");
        let [stdout, stderr] = [self.stdout, self.stderr].map(|reader| reader.join().expect("a reader"));
        Ended { status, stdout, stderr }
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
