//! `farcall explain A B SIZE`: the way that a tensor takes, and why every other way is not taken.
//!
//! It asks the function that the library itself asks, with this machine as one end.

use std::process::ExitCode;

use farcall::Channel;
use farcall::settings::Settings;
use farcall::transport::{
    Carriage, Decision, End, Limits, LocalAddress, NoSlabs, Transport, Verdict, negotiate, no_slabs,
};
use farcall::{Device, Runtime};
use serde_json::json;

use crate::Failure;
use crate::bench::{Size, device};

/// The name and version of the JSON format.
const SCHEMA: &str = "farcall-explain/1";

/// Explains the way from one device to another.
#[derive(Debug, clap::Args)]
pub(crate) struct ExplainArgs {
    /// Where the tensor is: `host`, or `cuda:0` and so on
    #[arg(value_name = "A")]
    from: String,
    /// Where it goes, at the other worker
    #[arg(value_name = "B")]
    to: String,
    /// Its bytes: 8, 64K, 16MiB
    size: Size,
    /// The other worker runs on this host, as this user (the default)
    #[arg(long)]
    same_host: bool,
    /// The other worker runs on another host
    #[arg(long, conflicts_with = "same_host")]
    other_host: bool,
    /// The other worker runs on this host in another network namespace: in another container
    #[arg(long, conflicts_with_all = ["same_host", "other_host"])]
    other_namespace: bool,
    /// The other worker runs on this host as another user
    #[arg(long, conflicts_with_all = ["same_host", "other_host", "other_namespace"])]
    other_user: bool,
    /// As if FARCALL_TRANSPORT were this: `auto`, `tcp` or `unix`
    #[arg(long, value_name = "NAME")]
    transport: Option<Transport>,
    /// End with code 3 unless this way is taken
    #[arg(long, value_name = "PATH")]
    require: Option<Channel>,
    /// Write an object, `farcall-explain/1`, in place of lines
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &ExplainArgs) -> Result<ExitCode, Failure> {
    let devices = match [&args.from, &args.to].map(|name| device(name).map_err(|error| format!("{name}: {error}"))) {
        [Ok(from), Ok(to)] => [from, to],
        [Err(message), _] | [_, Err(message)] => {
            eprintln!("farcall explain: {message}");
            return Ok(ExitCode::from(2));
        }
    };
    let settings = Settings::from_env()?;
    let limits = settings.limits().clone();
    let transport = args.transport.unwrap_or_else(|| settings.transport());
    let decision = args.decide(transport, devices, &limits, no_slabs(settings.slabs()).as_ref())?;
    let notes = notes(&settings, devices)?;
    if args.json {
        println!("{:#}", args.json(&decision, &notes));
    } else {
        print!("{}", args.lines(&decision, &notes, &limits));
    }
    match (args.require, decision.taken()) {
        (Some(required), taken) if taken != Some(required) => {
            let taken = taken.map_or("none", Channel::name);
            eprintln!("farcall explain: --require {required}: the way is {taken}");
            Ok(ExitCode::from(3))
        }
        (_, None) => Ok(ExitCode::FAILURE),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// What the way does not show: devices that are not here.
fn notes(settings: &Settings, devices: [Device; 2]) -> Result<Vec<String>, Failure> {
    if devices == [Device::HOST; 2] {
        return Ok(Vec::new());
    }
    let runtime = Runtime::new(settings.device()?)?;
    let mut notes = Vec::new();
    let [from, to] = devices;
    if !runtime.devices().contains(&from) {
        let why = runtime.cuda_absent().map_or_else(|| "there is no such device".to_owned(), ToString::to_string);
        notes.push(format!("{from} is not on this machine: {why}"));
    }
    for device in [from, to].into_iter().filter(|device| runtime.is_emulated(*device)) {
        notes.push(format!("{device} is emulated on the CPU here"));
    }
    notes.dedup();
    Ok(notes)
}

impl ExplainArgs {
    fn decide(
        &self,
        transport: Transport,
        [from, to]: [Device; 2],
        limits: &Limits,
        no_slabs: Option<&NoSlabs>,
    ) -> Result<Decision, Failure> {
        let here = LocalAddress::new()?;
        let mut there = here.clone();
        if self.other_host {
            there.boot = "of-another-host".into();
        } else if self.other_namespace {
            there.network = here.network.wrapping_add(1);
        } else if self.other_user {
            there.user = here.user.wrapping_add(1);
        }
        let here = End { local: Some(&here), device: from, no_slabs };
        let there = End { local: Some(&there), device: to, no_slabs };
        Ok(negotiate(transport, &here, &there, self.size.0, limits))
    }

    fn place(&self) -> &'static str {
        match (self.other_host, self.other_namespace, self.other_user) {
            (true, ..) => "on another host",
            (_, true, _) => "in another network namespace of this host",
            (.., true) => "of another user on this host",
            _ => "on this host",
        }
    }

    fn lines(&self, decision: &Decision, notes: &[String], limits: &Limits) -> String {
        let Self { from, to, size, .. } = self;
        let mut text = format!("{size} from {from} here to {to} of a worker {}\n", self.place());
        for (channel, verdict) in &decision.verdicts {
            let mark = if *verdict == Verdict::Taken { "->" } else { "  " };
            text.push_str(&format!("{mark} {channel:<9} {verdict}\n"));
        }
        let mut steps = Vec::new();
        for (from, to) in decision.copies.iter().filter(|(from, _)| *from != Device::HOST) {
            steps.push(format!("copied from {from} to {to}, on a stream behind its write"));
        }
        steps.push(match (decision.taken(), decision.carriage) {
            (None, _) => "nothing leads there".to_owned(),
            (Some(channel), Carriage::Slab) => {
                format!("{channel}: read where it lies, in memory that both processes map")
            }
            (Some(channel), Carriage::Inline) => {
                format!("{channel}, in the call's own frame (up to {})", Size(limits.inline_bytes_max))
            }
            (Some(channel), Carriage::Bulk { chunks }) => {
                let chunk = Size(limits.chunk_bytes_max);
                format!("{channel}, on a second connection, in {chunks} chunks of at most {chunk}")
            }
        });
        for (from, to) in decision.copies.iter().filter(|(_, to)| *to != Device::HOST) {
            steps.push(format!("copied from {from} to {to} there, on a stream that the function's work waits for"));
        }
        for (index, step) in steps.iter().enumerate() {
            text.push_str(&format!("{}. {step}\n", index + 1));
        }
        for note in notes {
            text.push_str(&format!("note: {note}\n"));
        }
        text
    }

    fn json(&self, decision: &Decision, notes: &[String]) -> serde_json::Value {
        let candidates: Vec<_> = decision
            .verdicts
            .iter()
            .map(|(channel, verdict)| {
                let taken = *verdict == Verdict::Taken;
                json!({ "channel": channel.name(), "taken": taken, "why": verdict.to_string() })
            })
            .collect();
        let chunks = match decision.carriage {
            Carriage::Inline | Carriage::Slab => 0,
            Carriage::Bulk { chunks } => chunks,
        };
        let copies: Vec<_> = decision
            .copies
            .iter()
            .map(|(from, to)| json!({ "from": from.to_string(), "to": to.to_string() }))
            .collect();
        json!({
            "schema": SCHEMA,
            "size_bytes": self.size.0,
            "taken": decision.taken().map(Channel::name),
            "candidates": candidates,
            "inline": decision.carriage == Carriage::Inline,
            "chunks": chunks,
            "copies": copies,
            "notes": notes,
        })
    }
}
