//! A report as one page: the charts, the table, the limits, the machine. It loads nothing and runs no script.

use std::fmt::Write;

use super::plan::Size;
use super::plot::{Figure, chart, escape};
use super::report::{Machine, Report};

const STYLE: &str = "
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid color-mix(in srgb,currentColor 20%,transparent)}
th:first-child,td:first-child,.left{text-align:left}
.bad{font-weight:700}
.scroll{overflow-x:auto}
code{overflow-wrap:anywhere}
svg{max-width:100%;height:auto;display:block;margin:1rem 0}
";

pub(crate) fn page(report: &Report) -> String {
    let mut text = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>farcall bench</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>farcall bench</h1>\n"
    );
    if !report.complete {
        text.push_str("<p class=\"bad\">Partial: the run ended before all was measured.</p>\n");
    }
    if report.wrong() > 0 {
        let _ = writeln!(text, "<p class=\"bad\">Wrong bytes or answers: {}.</p>", report.wrong());
    }
    facts(&mut text, report);
    text.push_str("<h2>Latency</h2>\n");
    text.push_str(&chart(report, Figure::Latency));
    text.push_str("<h2>Bandwidth</h2>\n");
    text.push_str(&chart(report, Figure::Bandwidth));
    rows(&mut text, report);
    limits(&mut text, report);
    text.push_str("</body>\n</html>\n");
    text
}

fn facts(text: &mut String, report: &Report) {
    let machine = |machine: &Machine| {
        let Machine { host, processor, processors, memory_bytes, system } = machine;
        format!("{host}: {processors} processors, {processor}, {} MiB, {system}", memory_bytes >> 20)
    };
    let mut paths: Vec<&str> = report.rows.iter().map(|row| row.path.as_str()).collect();
    paths.sort_unstable();
    paths.dedup();
    let calls = match &report.target {
        Some(target) => format!("to {target}"),
        None => format!("between {} workers on one machine", report.workers),
    };
    let mut facts = vec![
        ("Command", report.command.clone()),
        ("Version", format!("farcall {}, {}", report.version, report.schema)),
        ("Started", format!("{} seconds after 1970-01-01 UTC", report.started_at)),
        ("Machine", machine(&report.machine)),
        ("Calls", calls),
        ("Path", paths.join(", ")),
        ("Memory", format!("{}, device {}", report.memory, report.device)),
        ("Runs", format!("{} with fresh processes; figures are medians of them", report.runs)),
    ];
    if let (Some(_), Some(peer)) = (&report.target, &report.peer) {
        facts.push(("Other machine", machine(peer)));
    }
    text.push_str("<div class=\"scroll\"><table>\n");
    for (name, value) in facts {
        let _ = writeln!(
            text,
            "<tr><th scope=\"row\">{name}</th><td class=\"left\"><code>{}</code></td></tr>",
            escape(&value)
        );
    }
    text.push_str("</table></div>\n");
}

fn rows(text: &mut String, report: &Report) {
    text.push_str("<h2>Figures</h2>\n<div class=\"scroll\"><table>\n<tr>");
    for name in [
        "op", "size", "calls", "p50 us", "p99 us", "p99.9 us", "min us", "GB/s", "calls/s", "path", "#wrong",
        "limit us", "ratio",
    ] {
        let _ = write!(text, "<th scope=\"col\">{name}</th>");
    }
    text.push_str("</tr>\n");
    let some = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| format!("{value:.2}"));
    for row in &report.rows {
        let fields = [
            if row.outstanding > 1 {
                format!("{}, {} outstanding", row.op, row.outstanding)
            } else {
                row.op.to_string()
            },
            Size(row.size_bytes).to_string(),
            row.calls.to_string(),
            some(Some(row.p50_us)),
            some(row.p99_us),
            some(row.p999_us),
            some(Some(row.min_us)),
            some(row.gb_per_s),
            format!("{:.0}", row.calls_per_s),
            row.path.clone(),
            row.wrong.map_or_else(|| "–".to_owned(), |wrong| wrong.to_string()),
            some(row.limit.as_ref().map(|limit| limit.p50_us)),
            some(row.ratio),
        ];
        text.push_str("<tr>");
        for field in fields {
            let _ = write!(text, "<td>{}</td>", escape(&field));
        }
        text.push_str("</tr>\n");
    }
    text.push_str("</table></div>\n");
}

fn limits(text: &mut String, report: &Report) {
    if report.limits.is_empty() && report.limits_skipped.is_empty() {
        return;
    }
    text.push_str("<h2>What the machine can do without farcall</h2>\n<div class=\"scroll\"><table>\n");
    text.push_str("<tr><th scope=\"col\">what</th><th scope=\"col\">size</th><th scope=\"col\">p50 us</th><th scope=\"col\">GB/s</th></tr>\n");
    for limit in &report.limits {
        let rate = limit.gb_per_s.map_or_else(|| "–".to_owned(), |rate| format!("{rate:.2}"));
        let (name, size) = (escape(&limit.name), Size(limit.size_bytes));
        let _ = writeln!(text, "<tr><td>{name}</td><td>{size}</td><td>{:.2}</td><td>{rate}</td></tr>", limit.p50_us);
    }
    text.push_str("</table></div>\n");
    for (name, why) in &report.limits_skipped {
        let _ = writeln!(text, "<p>Skipped: {}: {}.</p>", escape(name), escape(why));
    }
}
