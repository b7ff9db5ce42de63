//! `farcall doctor`: what this machine offers, what it lacks, and how to get it.
//!
//! Invariant D1: a probe ends within [`PROBE_MAX`], in a thread of its own: one that does not, or panics, is a finding like any
//! other. Invariant D2: what can be tried is tried, not concluded from a version.

mod kernel;
mod machine;

use std::process::ExitCode;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use serde::Serialize;

use crate::Failure;
pub(crate) use kernel::child;

/// How long a probe may take.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// The name and version of the JSON format. A field may be added to a version; what changes in meaning makes a new one.
const SCHEMA: &str = "farcall-doctor/1";
const UNMET: u8 = 3;

/// Tries what farcall can use of this machine.
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Write an object, `farcall-doctor/1`, in place of lines
    #[arg(long)]
    json: bool,
    /// End with code 3 unless these checks are ok
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    require: Vec<String>,
}

/// How well it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// It works, and could work better.
    Warn,
    /// Not there; farcall does without.
    Missing,
}

/// What a probe found.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    status: Status,
    /// In words.
    found: String,
    /// A command or a setting, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn ok(found: impl Into<String>) -> Self {
        Self { status: Status::Ok, found: found.into(), fix: None }
    }

    fn warn(found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { status: Status::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    fn missing(found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { status: Status::Missing, found: found.into(), fix: Some(fix.into()) }
    }
}

/// A probe: its name, and what it tries.
type Probe = (&'static str, fn() -> Finding);

const PROBES: &[&[Probe]] = &[kernel::PROBES, machine::PROBES];

/// A finding by its name.
#[derive(Serialize)]
struct Check {
    name: &'static str,
    #[serde(flatten)]
    finding: Finding,
}

/// All findings.
#[derive(Serialize)]
struct Diagnosis {
    schema: &'static str,
    version: &'static str,
    checks: Vec<Check>,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode, Failure> {
    let names: Vec<&str> = PROBES.concat().iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = args.require.iter().find(|name| !names.contains(&name.as_str())) {
        eprintln!("farcall doctor: --require {unknown}: there is no such check, but {}", names.join(", "));
        return Ok(ExitCode::from(2));
    }
    // A probe that panics is reported; its message is not printed in between.
    std::panic::set_hook(Box::new(|_| {}));
    let checks = PROBES.concat().into_iter().map(|(name, probe)| Check { name, finding: bounded(probe, PROBE_MAX) });
    let diagnosis = Diagnosis { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), checks: checks.collect() };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&diagnosis)?);
    } else {
        print!("{}", lines(&diagnosis));
    }
    let unmet =
        |check: &&Check| check.finding.status != Status::Ok && args.require.iter().any(|name| name == check.name);
    let unmet: Vec<&str> = diagnosis.checks.iter().filter(unmet).map(|check| check.name).collect();
    if unmet.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("farcall doctor: required, and not ok: {}", unmet.join(", "));
    Ok(ExitCode::from(UNMET))
}

/// D1
fn bounded(probe: fn() -> Finding, within: Duration) -> Finding {
    let (found, wait) = channel();
    let spawned = std::thread::Builder::new().name("doctor".into()).spawn(move || drop(found.send(probe())));
    let report = "report this, with the output of `farcall doctor --json`";
    match (spawned, wait.recv_timeout(within)) {
        (Err(error), _) => Finding::missing(format!("no thread to try it: {error}"), "raise `ulimit -u`"),
        (_, Ok(finding)) => finding,
        (_, Err(RecvTimeoutError::Timeout)) => {
            Finding::warn(format!("no answer within {within:?}: a driver or a library hangs"), "look at `dmesg`")
        }
        (_, Err(RecvTimeoutError::Disconnected)) => Finding::warn("the check itself failed", report),
    }
}

fn lines(diagnosis: &Diagnosis) -> String {
    let mut text = format!("farcall {} on this machine\n", diagnosis.version);
    for Check { name, finding } in &diagnosis.checks {
        let status = match finding.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Missing => "missing",
        };
        text.push_str(&format!("{status:<8}{name:<14}{}\n", finding.found));
        if let Some(fix) = &finding.fix {
            text.push_str(&format!("{:22}fix: {fix}\n", ""));
        }
    }
    let count = |status| diagnosis.checks.iter().filter(|check| check.finding.status == status).count();
    let [ok, warn, missing] = [Status::Ok, Status::Warn, Status::Missing].map(count);
    text.push_str(&format!("{ok} ok, {warn} to improve, {missing} missing\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_that_hangs_or_panics_is_a_finding() {
        let hanging = bounded(
            || {
                std::thread::park_timeout(Duration::from_secs(60));
                Finding::ok("")
            },
            Duration::from_millis(20),
        );
        assert!(hanging.status == Status::Warn && hanging.found.contains("no answer within 20ms"), "{hanging:?}");
        let panicking = bounded(|| panic!("a probe"), PROBE_MAX);
        assert!(panicking.status == Status::Warn && panicking.found.contains("itself failed"), "{panicking:?}");
    }

    #[test]
    fn what_is_not_well_has_a_fix_and_no_two_checks_have_a_name() {
        let mut names = Vec::new();
        for (name, probe) in PROBES.concat() {
            let finding = bounded(probe, PROBE_MAX);
            assert_eq!(finding.status == Status::Ok, finding.fix.is_none(), "{name}: {finding:?}");
            assert!(!finding.found.is_empty() && finding.fix.as_deref() != Some(""), "{name}: {finding:?}");
            assert!(!names.contains(&name), "{name}");
            names.push(name);
        }
    }
}
