//! The table, in the manner of nccl-tests: lines of columns, all else behind `#`.

use std::fmt::Write;

use super::plan::{Op, Plan};
use super::report::{Machine, Report, Row};

pub(crate) fn header(report: &Report, plan: &Plan) -> String {
    let mut text = format!("# farcall bench {}: ", report.version);
    let _ = match &report.target {
        Some(target) => writeln!(text, "calls to {target}"),
        None => writeln!(text, "{} workers on this machine", report.workers),
    };
    let _ = writeln!(text, "# {}", machine(&report.machine));
    let checked = if plan.check { "checked" } else { "not checked" };
    let _ = writeln!(text, "# memory {}, device {}, data {checked}; GB are 10^9 bytes", report.memory, report.device);
    let _ = write!(
        text,
        "#{:<7} {:>11} {:>8} {:>10} {:>10} {:>10} {:>10} {:>8} {:>10} {:>7} {:>6}",
        "op", "size(B)", "calls", "p50(us)", "p99(us)", "p99.9(us)", "min(us)", "GB/s", "calls/s", "path", "#wrong"
    );
    if plan.limits {
        let _ = write!(text, " {:>10} {:>6}", "limit(us)", "ratio");
    }
    text.push('\n');
    text
}

fn machine(machine: &Machine) -> String {
    let gib = machine.memory_bytes as f64 / f64::from(1 << 30);
    let Machine { host, processors, processor, system, .. } = machine;
    format!("{host}: {processors} processors, {processor}, {gib:.0} GiB, {system}")
}

/// A line; of several runs, with the slowest run's median by the fastest's.
pub(crate) fn row(row: &Row, plan: &Plan, runs: u32) -> String {
    let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), us);
    let op = if row.op == Op::Rate { format!("rate{}", row.outstanding) } else { row.op.to_string() };
    let mut text = format!(
        "{op:<8} {:>11} {:>8} {:>10} {:>10} {:>10} {:>10} {:>8} {:>10.0} {:>7} {:>6}",
        row.size_bytes,
        row.calls,
        us(row.p50_us),
        optional(row.p99_us),
        optional(row.p999_us),
        us(row.min_us),
        row.gb_per_s.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.3}")),
        row.calls_per_s,
        row.path,
        row.wrong.map_or_else(|| "-".to_owned(), |wrong| wrong.to_string()),
    );
    if plan.limits {
        let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let _ = write!(text, " {:>10} {ratio:>6}", optional(row.limit.as_ref().map(|limit| limit.p50_us)));
        if let Some(limit) = &row.limit {
            let _ = write!(text, "  {}", limit.name);
        }
    }
    if runs > 1 {
        let _ = write!(text, "  {:.2}x", row.spread());
    }
    text.push('\n');
    text
}

pub(crate) fn footer(report: &Report) -> String {
    let mut text = String::new();
    if let (Some(target), Some(peer)) = (&report.target, &report.peer) {
        let _ = writeln!(text, "# {target} is {}", machine(peer));
    }
    if !report.limits.is_empty() {
        let _ = writeln!(text, "# limits, without farcall: medians");
        let _ = writeln!(text, "#{:<14} {:>11} {:>10} {:>8}", "what", "size(B)", "p50(us)", "GB/s");
        for limit in &report.limits {
            let rate = limit.gb_per_s.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.3}"));
            let _ = writeln!(text, "# {:<13} {:>11} {:>10} {rate:>8}", limit.name, limit.size_bytes, us(limit.p50_us));
        }
    }
    for (name, why) in &report.limits_skipped {
        let _ = writeln!(text, "# skipped: the limit {name}: {why}");
    }
    if report.runs > 1 {
        let _ = writeln!(
            text,
            "# medians of {} runs with fresh processes; last column: the slowest run's median by the fastest's",
            report.runs
        );
    }
    let checked: Vec<u64> = report.rows.iter().filter_map(|row| row.wrong).collect();
    let wrong: u64 = checked.iter().sum();
    if !checked.is_empty() {
        let _ = writeln!(text, "# wrong: {wrong} {}", if wrong == 0 { "OK" } else { "FAILED" });
    }
    if !report.complete {
        text.push_str("# PARTIAL: the run ended before all was measured\n");
    }
    text
}

/// Microseconds, to about four digits.
fn us(value: f64) -> String {
    match value {
        ..10.0 => format!("{value:.3}"),
        ..1000.0 => format!("{value:.2}"),
        _ => format!("{value:.1}"),
    }
}
