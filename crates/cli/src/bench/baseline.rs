//! Compares a run with one of before: what became slower, and what is missing.
//!
//! Invariant B1: a row that one of the two lacks is said, and one that the new run lacks counts as worse: a bench that measures
//! nothing passes no comparison.

use std::fmt::Write;
use std::path::Path;

use super::report::{Report, Row, SCHEMA};

/// Reads a file that `--json` or `--format json` wrote.
pub(crate) fn read(path: &Path) -> Result<Report, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("--baseline {}: {error}", path.display()))?;
    parse(&text).map_err(|error| format!("--baseline {}: {error}", path.display()))
}

fn parse(text: &str) -> Result<Report, String> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| format!("no JSON: {error}"))?;
    match value.get("schema").and_then(serde_json::Value::as_str) {
        Some(SCHEMA) => {}
        Some(other) => return Err(format!("its schema is {other}, {SCHEMA} is expected; measure it anew")),
        None => return Err(format!("it has no schema, {SCHEMA} is expected: not a file of `farcall bench --json`")),
    }
    serde_json::from_value(value).map_err(|error| error.to_string())
}

/// The differences as a table, and whether a row is worse by more than `tolerance_percent`, or missing.
pub(crate) fn compare(before: &Report, now: &Report, tolerance_percent: f64) -> (String, bool) {
    let mut text = format!("# baseline of farcall {}, {}\n", before.version, before.command);
    for (what, before, now) in [
        ("machine", format!("{:?}", before.machine), format!("{:?}", now.machine)),
        ("memory", before.memory.to_string(), now.memory.to_string()),
        ("device", before.device.clone(), now.device.clone()),
        ("workers", before.workers.to_string(), now.workers.to_string()),
    ] {
        if before != now {
            let _ = writeln!(text, "# NOTE: another {what}: {now}, the baseline's is {before}");
        }
    }
    let _ = writeln!(
        text,
        "#{:<7} {:>11} {:>10} {:>10} {:>8} {:>10} {:>10} {:>8}  verdict",
        "op", "size(B)", "base(us)", "p50(us)", "change", "base rate", "rate", "change"
    );
    let mut regressed = false;
    for row in &now.rows {
        let base = before.rows.iter().find(|base| base.key() == row.key());
        match base {
            Some(base) => regressed |= compare_row(&mut text, base, row, tolerance_percent),
            None => {
                let _ = writeln!(text, "{:<8} {:>11} is not in the baseline", row.op, row.size_bytes);
            }
        }
    }
    for base in before.rows.iter().filter(|base| now.rows.iter().all(|row| row.key() != base.key())) {
        let _ = writeln!(text, "{:<8} {:>11} is MISSING: it is in the baseline alone", base.op, base.size_bytes);
        regressed = true;
    }
    let verdict = if regressed { "REGRESSED" } else { "OK" };
    let _ = writeln!(text, "# baseline: {verdict}, tolerance {tolerance_percent} %");
    (text, regressed)
}

fn compare_row(text: &mut String, base: &Row, row: &Row, tolerance_percent: f64) -> bool {
    // As times: twice the time is 100 % worse, for latencies and for rates.
    let worse = |slow: f64, fast: f64| (slow / fast - 1.0) * 100.0;
    let (unit, base_rate, rate) = match (base.gb_per_s, row.gb_per_s) {
        (Some(base), Some(now)) => ("GB/s", base, now),
        _ => ("/s", base.calls_per_s, row.calls_per_s),
    };
    let changes = [worse(row.p50_us, base.p50_us), worse(base_rate, rate)];
    // What cannot be compared has not passed: also where a figure is 0.
    let regressed = !changes.iter().all(|change| *change <= tolerance_percent);
    let verdict = match (regressed, base.path == row.path) {
        (true, _) => "WORSE",
        (false, true) => "ok",
        (false, false) => "ok, by another path",
    };
    let _ = writeln!(
        text,
        "{:<8} {:>11} {:>10.2} {:>10.2} {:>+7.1}% {:>10.4} {:>10.4} {:>+7.1}%  {verdict} ({unit})",
        row.op, row.size_bytes, base.p50_us, row.p50_us, changes[0], base_rate, rate, changes[1]
    );
    regressed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::{report, row};

    fn sized(size_bytes: u64, p50_us: f64, gb_per_s: f64) -> Row {
        Row { size_bytes, gb_per_s: Some(gb_per_s), ..row(p50_us) }
    }

    #[test]
    fn only_what_is_worse_by_more_than_the_tolerance_is_a_regression() {
        let before = report(vec![sized(8, 100.0, 1.0)]);
        for (p50_us, gb_per_s, expected) in [
            (100.0, 1.0, false),
            (114.0, 1.0, false),
            (116.0, 1.0, true),
            (1.0, 1.0, false),
            (100.0, 0.88, false),
            (100.0, 0.86, true),
            (100.0, 9.0, false),
            (100.0, 0.0, true),
            (f64::NAN, 1.0, true),
        ] {
            let (text, regressed) = compare(&before, &report(vec![sized(8, p50_us, gb_per_s)]), 15.0);
            assert_eq!(regressed, expected, "{p50_us} us, {gb_per_s} GB/s: {text}");
            assert_eq!(text.contains("WORSE"), expected, "{text}");
        }
    }

    /// B1
    #[test]
    fn rows_that_one_side_lacks_are_said_and_a_missing_one_fails() {
        let (few, many) = (report(vec![sized(8, 1.0, 1.0)]), report(vec![sized(8, 1.0, 1.0), sized(64, 1.0, 1.0)]));
        let (text, regressed) = compare(&many, &few, 15.0);
        assert!(regressed && text.contains("64 is MISSING"), "{text}");
        let (text, regressed) = compare(&few, &many, 15.0);
        assert!(!regressed && text.contains("64 is not in the baseline"), "{text}");
    }

    #[test]
    fn what_is_written_is_read_and_other_files_are_refused() {
        let before = report(vec![row(3.0)]);
        let text = serde_json::to_string_pretty(&before).expect("JSON");
        assert_eq!(parse(&text).expect("the same").rows, before.rows);
        for (text, says) in [
            ("", "no JSON"),
            ("{}", "it has no schema"),
            (&text.replace(SCHEMA, "farcall-bench/9"), "its schema is farcall-bench/9"),
            (&text.replace("p50_us", "p50"), "missing field"),
        ] {
            let error = parse(text).expect_err("refused");
            assert!(error.contains(says), "{error}");
        }
    }
}
