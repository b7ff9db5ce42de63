//! Log lines, for programs that want them on standard error.
//!
//! farcall's crates speak through `tracing` and install no subscriber by themselves: a program with its own sees their events
//! there. [`init`] installs one as the settings `log` and `log_format` say, with this worker's name before each line.
//! What orderly work does is at `debug`; `warn` is for what somebody should look at.

use std::fmt::{self, Write as _};

use farcall_rpc::settings::{LogFormat, Origin, Settings, SettingsError};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{self, Format, FormatEvent, FormatFields, Full, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, Subscriber as Fmt};
use tracing_subscriber::registry::LookupSpan;

/// Why no log was set up. Programs match the variant; people read the text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum LogError {
    /// A setting is wrong.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The filter cannot be read.
    #[error("{origin}: log = {filter:?}: {message}; expected a level such as `info`, or `warn,farcall_rpc=debug`")]
    Filter { origin: Origin, filter: String, message: String },
    /// The process has a subscriber.
    #[error("this process has a `tracing` subscriber already, and there can be one only")]
    Taken,
}

/// Writes this process's log lines to standard error, as its settings say (`FARCALL_LOG`, `FARCALL_LOG_FORMAT`).
///
/// # Errors
/// [`LogError`].
pub fn init() -> Result<(), LogError> {
    init_with(&Settings::from_env()?)
}

/// As [`init`], with settings that were read already.
///
/// # Errors
/// [`LogError::Filter`], [`LogError::Taken`].
pub fn init_with(settings: &Settings) -> Result<(), LogError> {
    let filter = filter(settings)?;
    let name = settings.entries().iter().find(|entry| entry.setting.key == "name").and_then(|entry| entry.text.clone());
    let rank = settings.rank();
    let worker = name.or_else(|| rank.map(|rank| format!("w{rank}")));
    let lines = Lines { worker, rank, format: settings.log_format(), text: format::format() };
    let subscriber = Fmt::builder().with_env_filter(filter).with_writer(std::io::stderr).event_format(lines).finish();
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Taken)
}

/// Whether [`init_with`] could read the filter in these settings.
///
/// # Errors
/// [`LogError::Filter`].
pub fn check(settings: &Settings) -> Result<(), LogError> {
    filter(settings).map(drop)
}

fn filter(settings: &Settings) -> Result<EnvFilter, LogError> {
    let (filter, origin) = settings.log();
    EnvFilter::builder().parse(filter).map_err(|error| {
        let message = error.to_string();
        LogError::Filter { origin, filter: filter.to_owned(), message }
    })
}

/// Writes an event as a line.
struct Lines {
    worker: Option<String>,
    rank: Option<u32>,
    format: LogFormat,
    text: Format<Full, SystemTime>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut line = String::new();
        match self.format {
            LogFormat::Json => {
                self.json(context, event, &mut line)?;
                return writeln!(out, "{line}");
            }
            _ => self.text.format_event(context, Writer::new(&mut line), event)?,
        }
        if let Some(worker) = &self.worker {
            write!(out, "{worker} ")?;
        }
        // A peer's words must not look like lines of their own, or move a terminal's cursor.
        for letter in line.trim_end().chars() {
            if letter.is_control() { write!(out, "{}", letter.escape_default())? } else { out.write_char(letter)? }
        }
        out.write_char('\n')
    }
}

impl Lines {
    fn json<S, N>(&self, context: &FmtContext<'_, S, N>, event: &Event<'_>, line: &mut String) -> fmt::Result
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
        N: for<'a> FormatFields<'a> + 'static,
    {
        let mut time = String::new();
        // A clock before 1970 has no time to show.
        let _ = SystemTime.format_time(&mut Writer::new(&mut time));
        let metadata = event.metadata();
        let mut object = Object { line, result: Ok(()) };
        object.text("{", "time", &time);
        object.text(",", "level", metadata.level().as_str());
        object.text(",", "target", metadata.target());
        if let Some(worker) = &self.worker {
            object.text(",", "worker", worker);
        }
        if let Some(rank) = self.rank {
            object.plain("rank", rank);
        }
        let scope = context.event_scope().into_iter().flat_map(|scope| scope.from_root());
        let spans: Vec<&str> = scope.map(|span| span.name()).collect();
        if !spans.is_empty() {
            object.text(",", "spans", &spans.join(":"));
        }
        event.record(&mut object);
        object.result?;
        line.write_char('}')
    }
}

/// The names that each line has; an event's field of such a name gets `_` behind it.
const OWN: &[&str] = &["time", "level", "target", "worker", "rank", "spans"];

/// A JSON object that is being written. By hand: a crate for it would add its conversions to all who depend on this one.
struct Object<'a> {
    line: &'a mut String,
    result: fmt::Result,
}

impl Object<'_> {
    fn text(&mut self, before: &str, name: &str, value: &str) {
        self.write(|line| {
            line.push_str(before);
            quote(line, name)?;
            line.push(':');
            quote(line, value)
        });
    }

    fn plain(&mut self, name: &str, value: impl fmt::Display) {
        self.write(|line| {
            line.push(',');
            quote(line, name)?;
            write!(line, ":{value}")
        });
    }

    fn write(&mut self, write: impl FnOnce(&mut String) -> fmt::Result) {
        if self.result.is_ok() {
            self.result = write(self.line);
        }
    }
}

fn quote(line: &mut String, text: &str) -> fmt::Result {
    line.push('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => {
                line.push('\\');
                line.push(letter);
            }
            // All of them are below U+10000.
            letter if letter.is_control() => write!(line, "\\u{:04x}", u32::from(letter))?,
            letter => line.push(letter),
        }
    }
    line.push('"');
    Ok(())
}

fn name(field: &Field) -> String {
    let own = if OWN.contains(&field.name()) { "_" } else { "" };
    format!("{}{own}", field.name())
}

impl Visit for Object<'_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        if value.is_finite() { self.plain(&name(field), value) } else { self.plain(&name(field), "null") }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(&name(field), value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(&name(field), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(&name(field), value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.text(",", &name(field), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.text(",", &name(field), &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What `body` logs.
    fn logged(format: LogFormat, body: impl FnOnce()) -> String {
        #[derive(Clone, Default)]
        struct Out(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Out {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let out = Out::default();
        let kept = out.clone();
        let lines = Lines { worker: Some("w2".into()), rank: Some(2), format, text: format::format() };
        let subscriber = Fmt::builder().with_writer(move || out.clone()).event_format(lines).finish();
        tracing::subscriber::with_default(subscriber, body);
        String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_text_line_begins_with_the_worker_and_ends_where_it_ends() {
        let text = logged(LogFormat::Text, || {
            tracing::warn!(peer = %"w3\nw2 forged", cause = %"\x1b[2Jgone", "lost a worker");
            tracing::debug!("not wanted");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.starts_with("w2 2") && text.contains(" WARN farcall::log::tests: lost a worker peer=w3"),
            "{text}"
        );
        assert!(text.ends_with("gone\n") && !text.contains('\x1b'), "{text}");
    }

    #[test]
    fn a_json_line_is_an_object_with_the_fields_beside_the_place() {
        let text = logged(LogFormat::Json, || {
            tracing::info_span!("training", step = 3).in_scope(|| {
                let (peer, rank, nothing) = ("w\"3\n\\", "own", None::<u64>);
                tracing::warn!(%peer, count = 7_u64, share = 0.5, none = f64::NAN, good = true, rank, nothing, "lost a worker");
            });
        });
        let (time, rest) = text.split_at(r#"{"time":"2026-11-21T09:00:00.000000Z""#.len());
        assert!(time.starts_with(r#"{"time":"2"#) && time.ends_with("Z\""), "{time}");
        let expected = concat!(
            r#","level":"WARN","target":"farcall::log::tests","worker":"w2","rank":2,"spans":"training","#,
            r#""message":"lost a worker","peer":"w\"3\u000a\\","count":7,"share":0.5,"none":null,"good":true,"rank_":"own"}"#,
            "\n"
        );
        assert_eq!(rest, expected);
    }
}
