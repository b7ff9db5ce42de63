//! Where results go: standard output as they come, files at the end; the progress goes to standard error.

use std::io::{self, IsTerminal, Write};

use super::plan::{Plan, Size};
use super::report::{Event, Report, Row};
use super::{BenchArgs, Format, baseline, csv, html, plot, table};
use crate::Failure;

/// How the progress is shown.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Progress {
    Silent,
    /// One line that is written over.
    Terminal,
    Lines,
}

/// See the module.
pub(super) struct Output<'a> {
    args: &'a BenchArgs,
    plan: &'a Plan,
    progress: Progress,
}

impl<'a> Output<'a> {
    pub(super) fn new(args: &'a BenchArgs, plan: &'a Plan) -> Self {
        let rows_come_late = args.format == Format::Json || args.repeat > 1;
        let progress = match (args.quiet, std::io::stderr().is_terminal()) {
            (true, _) => Progress::Silent,
            (false, true) => Progress::Terminal,
            // Elsewhere the rows themselves show how far it is.
            (false, false) if rows_come_late => Progress::Lines,
            (false, false) => Progress::Silent,
        };
        Self { args, plan, progress }
    }

    pub(super) fn begin(&self, report: &Report) -> io::Result<()> {
        match self.args.format {
            Format::Table => print(&table::header(report, self.plan)),
            Format::Csv => print(csv::HEADER),
            Format::Json => Ok(()),
        }
    }

    /// Something was measured, or begins to be.
    pub(super) fn show(&self, run: u32, report: &Report, event: &Event) -> io::Result<()> {
        match event {
            Event::Begins { cell, cells, op, size_bytes } => {
                let run =
                    if self.args.repeat > 1 { format!("run {run}/{}, ", self.args.repeat) } else { String::new() };
                self.say(&format!("{run}{}/{cells} {op} {}", cell + 1, Size(*size_bytes)));
            }
            Event::Row(row) if self.args.repeat == 1 => {
                self.clear();
                self.row(row, report)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn row(&self, row: &Row, report: &Report) -> io::Result<()> {
        match self.args.format {
            Format::Table => print(&table::row(row, self.plan, report.runs)),
            Format::Csv => print(&csv::row(row)),
            Format::Json => Ok(()),
        }
    }

    /// All rows are there; those of several runs only now.
    pub(super) fn end(&self, report: &Report) -> Result<(), Failure> {
        self.clear();
        if self.args.repeat > 1 {
            for row in &report.rows {
                self.row(row, report)?;
            }
        }
        match self.args.format {
            Format::Table => print(&table::footer(report))?,
            Format::Json => print(&(serde_json::to_string_pretty(report)? + "\n"))?,
            Format::Csv => {}
        }
        let files = [
            ("--json", &self.args.json, serde_json::to_string_pretty(report)? + "\n"),
            ("--plot", &self.args.plot, plot::document(report)),
            ("--report", &self.args.report, html::page(report)),
        ];
        for (option, path, text) in files {
            let Some(path) = path else { continue };
            std::fs::write(path, text).map_err(|error| format!("{option} {}: {error}", path.display()))?;
        }
        Ok(())
    }

    /// Shows what is different from the baseline; whether something is worse than the tolerance allows. It goes where people
    /// look: standard output is the results' alone if a program reads them.
    pub(super) fn compare(&self, baseline: &Report, report: &Report, tolerance_percent: f64) -> io::Result<bool> {
        let (text, regressed) = baseline::compare(baseline, report, tolerance_percent);
        if self.args.format == Format::Table {
            print(&text)?
        } else {
            eprint!("{text}")
        }
        Ok(regressed)
    }

    fn say(&self, text: &str) {
        match self.progress {
            Progress::Silent => {}
            Progress::Terminal => {
                eprint!("\r\x1b[K{text}");
                let _ = std::io::stderr().flush();
            }
            Progress::Lines => eprintln!("{text}"),
        }
    }

    fn clear(&self) {
        if self.progress == Progress::Terminal {
            self.say("");
        }
    }
}

/// Writes to standard output at once. Whoever reads it may have gone, which ends the bench, but not by a panic.
fn print(text: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes())?;
    output.flush()
}
