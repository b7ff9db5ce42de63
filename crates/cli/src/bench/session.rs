//! One group of worker processes, from its start to its end, and what the measuring one says.

use std::io::{self, BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::BenchArgs;
use super::plan::Plan;
use super::report::{Event, Report, Row};
use super::serve::Turn;
use crate::Failure;
use crate::launch::{Interrupted, Workers, this_program};

/// How often signals are looked at.
const TICK: Duration = Duration::from_millis(20);
/// How long a worker may take to end in order.
const GRACE: Duration = Duration::from_secs(5);

/// How a session ended.
pub(super) enum Ended {
    Complete,
    Interrupted(Interrupted),
    Unmet { required: String, path: String },
    Failed(String),
}

/// See the module.
pub(super) struct Session {
    workers: Workers,
    events: Receiver<Result<Event, String>>,
}

impl Session {
    /// Starts the workers on this machine, or the one here of two if there is a target; an interrupt may come before its turn.
    pub(super) fn start(
        args: &BenchArgs,
        plan: &Plan,
        told_to_end: &AtomicUsize,
    ) -> Result<Result<Self, Interrupted>, Failure> {
        let program = this_program()?;
        let measuring = |same_host: bool| -> Result<Command, Failure> {
            let mut command = worker(&program, args, 0);
            let plan = serde_json::to_string(&Plan { same_host, ..plan.clone() })?;
            command.arg("--plan").arg(plan).stdout(Stdio::piped());
            Ok(command)
        };
        let mut workers = match &args.target {
            Some(target) => match Turn::wait(target, told_to_end)? {
                Ok(turn) => turn.start(measuring(turn.is_same_host())?)?,
                Err(interrupted) => return Ok(Err(interrupted)),
            },
            None => {
                let first = std::cell::Cell::new(Some(measuring(true)?));
                Workers::start(args.local, |rank| first.take().unwrap_or_else(|| worker(&program, args, rank)))?
            }
        };
        let output = workers.take_output().ok_or("the measuring worker has no output")?;
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).map_err(|error| format!("{error}: {line}"));
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        Ok(Ok(Self { workers, events }))
    }

    /// Gives what is measured to `show` as it comes: the rows, and how it ended.
    pub(super) fn follow(
        &mut self,
        told_to_end: &AtomicUsize,
        report: &mut Report,
        show: impl Fn(&Report, &Event) -> io::Result<()>,
    ) -> Result<(Vec<Row>, Ended), Failure> {
        let mut rows = Vec::new();
        let mut interrupted: Option<(usize, Instant)> = None;
        let mut ended = None;
        loop {
            match self.events.recv_timeout(TICK) {
                Ok(Ok(event)) => {
                    show(report, &event)?;
                    match event {
                        Event::Begins { .. } => {}
                        Event::Peer(machine) => report.peer = Some(machine),
                        Event::Row(row) => rows.push(*row),
                        Event::Limits { limits, skipped } => (report.limits, report.limits_skipped) = (limits, skipped),
                        Event::Unmet { required, path } => ended = Some(Ended::Unmet { required, path }),
                        Event::Failed { message } => ended = Some(Ended::Failed(message)),
                        Event::Complete => ended = Some(Ended::Complete),
                    }
                }
                Ok(Err(message)) => {
                    return Err(format!("the measuring worker said what it should not: {message}").into());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            match (told_to_end.load(Ordering::SeqCst), &interrupted) {
                (0, _) => {}
                (signal, None) => {
                    self.workers.tell("stop");
                    interrupted = Some((signal, Instant::now() + GRACE));
                }
                (_, Some((_, deadline))) if Instant::now() > *deadline => break,
                _ => {}
            }
        }
        if interrupted.is_none() {
            self.await_end();
        }
        self.workers.end();
        let ended = match (interrupted, ended) {
            (Some((signal, _)), _) => Ended::Interrupted(Interrupted(signal)),
            (None, Some(ended)) => ended,
            (None, None) => Ended::Failed("the measuring worker ended before it was done".to_owned()),
        };
        Ok((rows, ended))
    }

    /// Waits for the workers, who leave by themselves, for [`GRACE`].
    fn await_end(&mut self) {
        let deadline = Instant::now() + GRACE;
        while self.workers.next_until(deadline).is_some() {}
    }
}

/// The command of a worker, but for what its group tells it.
fn worker(program: &Command, args: &BenchArgs, rank: u32) -> Command {
    let mut command = Command::new(program.get_program());
    command.arg("bench-worker").stdin(Stdio::piped());
    if !args.cpus.is_empty() {
        command.arg("--cpu").arg(args.cpus[rank as usize % args.cpus.len()].to_string());
    }
    command.envs(args.devices.iter().map(|devices| ("FARCALL_DEVICES", devices)));
    command.envs(args.streams.iter().map(|streams| ("FARCALL_CPU_STREAMS", streams)));
    command.env("FARCALL_SPIN", args.spin.text());
    command.envs(args.transport.iter().map(|transport| ("FARCALL_TRANSPORT", transport)));
    command
}
