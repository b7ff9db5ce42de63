//! Worker processes of one group, killed by their ids when dropped.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use farcall::prelude::*;
use farcall::transport::StoreLimits;
use farcall::{JobKey, StoreServer, Transport};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{eventually, job_key, step, transport, unique};

/// How long a process may take to end.
const END_MAX: Duration = Duration::from_secs(20);

/// The worker program, a mode of it, and the environment of a launcher.
pub(crate) fn command(mode: &str, variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_farcall-test-worker"));
    // How the suite runs is passed on, what somebody's shell has for other jobs is not.
    let passed_on = ["FARCALL_TRANSPORT", "FARCALL_CPU_STREAMS", "FARCALL_DEVICES", "FARCALL_CUDA", "FARCALL_CHECK"];
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("FARCALL_") && !passed_on.contains(&name.as_str()) {
            command.env_remove(name);
        }
    }
    command.arg(mode).envs(variables.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a process wrote.
struct Captured(Option<JoinHandle<String>>);

impl Captured {
    fn of(pipe: Option<impl Read + Send + 'static>) -> Self {
        let mut pipe = pipe.expect("piped");
        Self(Some(std::thread::spawn(move || {
            let mut text = Vec::new();
            // What came before a broken pipe counts.
            let _ = pipe.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        })))
    }

    fn text(&mut self) -> String {
        self.0.take().map_or_else(String::new, |reader| reader.join().expect("a reader"))
    }
}

/// A process, its output captured, killed when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: Captured,
    stderr: Captured,
}

/// How a process ended, and what it wrote.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the worker program starts");
        let (stdout, stderr) = (Captured::of(child.stdout.take()), Captured::of(child.stderr.take()));
        Self { child, stdout, stderr }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // Not reaped before `end`, so the id is its own.
        kill_process(self.pid(), signal).expect("a child can be signalled");
    }

    /// Stops every thread of it; a signal alone is only on its way.
    pub(crate) fn stop(&self) {
        self.signal(Signal::STOP);
        let tasks = PathBuf::from(format!("/proc/{}/task", self.child.id()));
        crate::harness::eventually("every thread has stopped", Duration::from_secs(10), || {
            let threads = std::fs::read_dir(&tasks).expect("a live process");
            threads.flatten().all(|thread| {
                // A thread that ended meanwhile has no state, and does nothing.
                let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, fields)| fields.starts_with('T'))
            })
        });
    }

    /// Memory that it holds.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).expect("a live process");
        let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("resident pages");
        pages * rustix::param::page_size() as u64
    }

    /// The same without pages of files, which are its program's.
    pub(crate) fn data_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("a live process");
        let kib = |name| {
            status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok())
        };
        ["RssAnon:", "RssShmem:"].map(|name| kib(name).expect("a size")).iter().sum::<u64>() << 10
    }

    /// Processor time that it has taken, in user and in kernel mode.
    #[cfg(feature = "tls")]
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("a live process");
        // The fields after the command's name, which may hold spaces: state is field 3, utime and stime are 14 and 15.
        let fields = stat.rsplit_once(") ").expect("a name").1.split(' ');
        let ticks: u64 = fields.skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        let directory = PathBuf::from(format!("/proc/{}/fd", self.child.id()));
        std::fs::read_dir(directory).expect("a live process").count()
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        step(format_args!("the end of process {}", self.child.id()));
        let mut status = None;
        eventually("the process ends", END_MAX, || {
            status = self.child.try_wait().expect("a child");
            status.is_some()
        });
        let (stdout, stderr) = (self.stdout.text(), self.stderr.text());
        Ended { status: status.expect("set when it ended"), stdout, stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already, or ends now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A group of worker processes, and this process as its rank 0 unless told otherwise.
pub(crate) struct Processes {
    /// By rank; `None` for this process's and those that have ended.
    pub(crate) workers: Vec<Option<Process>>,
    pub(crate) group: String,
    pub(crate) store: StoreServer,
    pub(crate) key: Option<JobKey>,
    variables: Vec<(String, String)>,
}

impl Processes {
    /// Starts workers for the ranks of `modes` that have one, in a group of as many as there are modes.
    pub(crate) fn start(modes: &[Option<&str>], variables: &[(&str, &str)]) -> Self {
        Self::start_with_key(modes, variables, job_key())
    }

    fn start_with_key(modes: &[Option<&str>], variables: &[(&str, &str)], key: Option<JobKey>) -> Self {
        step("starting processes");
        let store = StoreServer::bind_with("127.0.0.1:0", StoreLimits::default(), key.clone()).expect("a store");
        let group = unique("processes");
        let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let workers = modes.iter().map(|_| None).collect();
        let mut processes = Self { workers, group, store, key, variables };
        for (rank, mode) in modes.iter().enumerate() {
            processes.workers[rank] = mode.map(|mode| processes.spawn(rank, mode, &[]));
        }
        processes
    }

    /// A process for that rank, whether or not it has one already.
    pub(crate) fn spawn(&self, rank: usize, mode: &str, more: &[(&str, &str)]) -> Process {
        let mut command = command(mode, more);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.env("FARCALL_RANK", rank.to_string()).env("FARCALL_WORLD_SIZE", self.workers.len().to_string());
        command.env("FARCALL_STORE", self.store.address().to_string()).env("FARCALL_GROUP", &self.group);
        command.env("FARCALL_HOST_STORE", "0").envs(self.key.iter().map(|key| ("FARCALL_KEY", key.to_hex())));
        Process::spawn(command)
    }

    /// `n` workers that serve, and this process's agent as rank 0 of `n` + 1.
    pub(crate) fn serving(n: usize) -> (Self, Agent) {
        Self::serving_with_key(n, job_key())
    }

    /// The same with these variables for the workers.
    pub(crate) fn serving_with(n: usize, variables: &[(&str, &str)]) -> (Self, Agent) {
        let modes: Vec<_> = std::iter::once(None).chain(vec![Some("serve"); n]).collect();
        let processes = Self::start(&modes, variables);
        let agent = processes.join(|_| {});
        (processes, agent)
    }

    /// The same, told of deaths by the kernel, which takes more than TCP.
    pub(crate) fn serving_near(n: usize) -> (Self, Agent) {
        let modes: Vec<_> = std::iter::once(None).chain(vec![Some("serve"); n]).collect();
        let processes = Self::start(&modes, &[("FARCALL_TRANSPORT", "auto")]);
        let agent = processes.join(|options| options.transport = Transport::Auto);
        (processes, agent)
    }

    /// The same over TCP, which the kernel has tables of.
    pub(crate) fn serving_over_tcp(n: usize) -> (Self, Agent) {
        let modes: Vec<_> = std::iter::once(None).chain(vec![Some("serve"); n]).collect();
        let processes = Self::start(&modes, &[("FARCALL_TRANSPORT", "tcp")]);
        let agent = processes.join(|options| options.transport = Transport::Tcp);
        (processes, agent)
    }

    /// The same with this job key, or without any.
    pub(crate) fn serving_with_key(n: usize, key: Option<JobKey>) -> (Self, Agent) {
        let modes: Vec<_> = std::iter::once(None).chain(vec![Some("serve"); n]).collect();
        let processes = Self::start_with_key(&modes, &[], key);
        let agent = processes.join(|_| {});
        (processes, agent)
    }

    /// This process joins as rank 0.
    pub(crate) fn join(&self, change: impl FnOnce(&mut Options)) -> Agent {
        step("joining a group of processes");
        let mut options = Options::new(0, self.workers.len() as u32, self.store.address().to_string());
        (options.host_store, options.group) = (false, self.group.clone());
        (options.key, options.transport) = (self.key.clone(), transport());
        change(&mut options);
        Agent::join_blocking(options).expect("joins")
    }

    pub(crate) fn worker(&self, rank: usize) -> &Process {
        self.workers[rank].as_ref().expect("a process")
    }

    /// Kills a worker and waits until the system has buried it.
    pub(crate) fn kill(&mut self, rank: usize) {
        let worker = self.workers[rank].take().expect("a process");
        worker.signal(Signal::KILL);
        assert!(!worker.end().status.success());
    }

    /// This process leaves, and every worker ends with success.
    pub(crate) fn shutdown(mut self, agent: &Agent) {
        step("the group's shutdown");
        agent.shutdown_blocking().expect("leaves in order");
        for worker in self.workers.iter_mut().filter_map(Option::take) {
            let ended = worker.end();
            assert!(ended.status.success(), "{ended:?}");
        }
    }
}
