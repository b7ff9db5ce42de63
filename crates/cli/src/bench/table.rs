//! The table, in the manner of nccl-tests: lines of columns, all else behind `#`.

use std::fmt::Write;

use super::plan::{Op, Plan};
use super::report::{Report, Row};

pub(crate) fn header(report: &Report, plan: &Plan) -> String {
    let machine = &report.machine;
    let mut text = format!("# farcall bench {}: {} workers\n", report.version, report.workers);
    let _ = writeln!(
        text,
        "# {}: {} processors, {}, {:.0} GiB, {}",
        machine.host,
        machine.processors,
        machine.processor,
        machine.memory_bytes as f64 / f64::from(1 << 30),
        machine.system
    );
    let checked = if plan.check { "checked" } else { "not checked" };
    let _ = writeln!(text, "# memory {}, device {}, data {checked}; GB are 10^9 bytes", report.memory, report.device);
    let _ = writeln!(
        text,
        "#{:<5} {:>11} {:>8} {:>10} {:>10} {:>10} {:>10} {:>8} {:>10} {:>7} {:>6}",
        "op", "size(B)", "calls", "p50(us)", "p99(us)", "p99.9(us)", "min(us)", "GB/s", "calls/s", "path", "#wrong"
    );
    text
}

pub(crate) fn row(row: &Row) -> String {
    let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), us);
    let op = if row.op == Op::Rate { format!("rate{}", row.outstanding) } else { row.op.to_string() };
    format!(
        "{op:<6} {:>11} {:>8} {:>10} {:>10} {:>10} {:>10} {:>8} {:>10.0} {:>7} {:>6}\n",
        row.size_bytes,
        row.calls,
        us(row.p50_us),
        optional(row.p99_us),
        optional(row.p999_us),
        us(row.min_us),
        row.gb_per_s.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2}")),
        row.calls_per_s,
        row.path,
        row.wrong.map_or_else(|| "-".to_owned(), |wrong| wrong.to_string()),
    )
}

pub(crate) fn footer(report: &Report) -> String {
    let mut text = String::new();
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
