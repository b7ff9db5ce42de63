//! `farcall config`: the settings of a process that is started like this one, and a check of a file.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};
use farcall::settings::{Entry, Kind, Origin, Settings};
use serde_json::{Map, Value, json};

use crate::Failure;

#[derive(Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show every setting and its value. Those without one are comments; the job's key is not shown.
    Show {
        /// Say for each where it comes from: a variable, a line of a file, a launcher, or nowhere.
        #[arg(long)]
        origin: bool,
        #[arg(long, value_enum, default_value_t = Format::Toml)]
        format: Format,
    },
    /// Check a file of settings as `FARCALL_CONFIG` would name it.
    Check { file: PathBuf },
}

/// How settings are shown.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A file of settings.
    Toml,
    /// An object with a field for each setting.
    Json,
}

pub(crate) fn run(command: &ConfigCommand) -> Result<ExitCode, Failure> {
    match command {
        ConfigCommand::Show { origin, format } => {
            let settings = Settings::from_env()?;
            match format {
                Format::Toml => print!("{}", toml(settings.entries(), *origin)),
                Format::Json => println!("{:#}", json(settings.entries(), *origin)),
            }
        }
        ConfigCommand::Check { file } => {
            let settings = Settings::from_file(file)?;
            settings.device()?;
            farcall::log::check(&settings)?;
            let set = settings.entries().iter().filter(|entry| entry.origin != Origin::Default).count();
            println!("{}: {set} settings, all understood", file.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What stands for a secret that is set.
const HIDDEN: &str = "set, and not shown";

fn toml(entries: &[Entry], origin: bool) -> String {
    let mut lines = Vec::new();
    // Tables come last: whatever follows one belongs to it.
    let table = |entry: &Entry| entry.setting.key.split_once('.').map(|(table, _)| table);
    let mut entries: Vec<&Entry> = entries.iter().collect();
    entries.sort_by_key(|entry| table(entry));
    let mut current = None;
    for entry in entries {
        if table(entry) != current {
            current = table(entry);
            lines.push((format!("\n[{}]", current.unwrap_or_default()), None));
        }
        let name = entry.setting.key.rsplit('.').next().unwrap_or_default();
        let line = match (value(entry), entry.setting.kind) {
            (Some(value), _) => format!("{name} = {value}"),
            (None, Kind::Secret) if entry.origin != Origin::Default => format!("# {name} is {HIDDEN}"),
            (None, _) => format!("# {name} ="),
        };
        lines.push((line, origin.then(|| entry.origin.to_string())));
    }
    let width = lines.iter().map(|(line, _)| line.chars().count()).max().unwrap_or_default().min(48);
    let mut text = String::new();
    for (line, origin) in lines {
        let line = match origin {
            Some(origin) => format!("{line:<width$}  # {origin}"),
            None => line,
        };
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A value as TOML and JSON both write it.
fn value(entry: &Entry) -> Option<Value> {
    let text = entry.text.as_deref()?;
    let bare = match entry.setting.kind {
        Kind::Count | Kind::Positive => text.parse::<u64>().ok().map(Value::from),
        Kind::Flag => Some(Value::from(matches!(text, "1" | "true"))),
        _ => None,
    };
    Some(bare.unwrap_or_else(|| text.into()))
}

fn json(entries: &[Entry], origin: bool) -> Value {
    let value = |entry: &Entry| match (value(entry), entry.setting.kind) {
        (None, Kind::Secret) if entry.origin != Origin::Default => HIDDEN.into(),
        (value, _) => value.unwrap_or(Value::Null),
    };
    let field = |entry: &Entry| {
        let value = value(entry);
        let value = if origin { json!({ "value": value, "origin": entry.origin.to_string() }) } else { value };
        (entry.setting.key.to_owned(), value)
    };
    entries.iter().map(field).collect::<Map<String, Value>>().into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const SECRET: &str = "5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e7";

    fn settings() -> Settings {
        let variables = [
            ("FARCALL_KEY", SECRET),
            ("FARCALL_NAME", "a \"quoted\" näme"),
            ("FARCALL_HOST_STORE", "1"),
            ("FARCALL_LIMITS_REQUESTS", "16"),
            ("FARCALL_DEADLINE", "7s"),
            ("RANK", "3"),
            ("WORLD_SIZE", "4"),
        ];
        let variables: BTreeMap<String, String> =
            variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Settings::from_variables(&variables).expect("settings")
    }

    #[test]
    fn what_is_shown_is_a_file_that_gives_the_same_values() {
        let shown = toml(settings().entries(), true);
        assert!(!shown.contains(SECRET));
        let path = std::env::temp_dir().join(format!("farcall-config-{}.toml", std::process::id()));
        std::fs::write(&path, &shown).expect("a file");
        let read = Settings::from_file(&path);
        std::fs::remove_file(&path).expect("the file");
        let read = read.unwrap_or_else(|error| panic!("{error}\n{shown}"));
        for (shown, read) in settings().entries().iter().zip(read.entries()) {
            assert_eq!(value(shown), value(read), "{:?}", shown.setting);
        }
    }

    #[test]
    fn each_value_has_its_origin() {
        let shown = toml(settings().entries(), true);
        let line = |start: &str| {
            let line = shown.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{start}: {shown}"));
            line.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(line("rank ="), "rank = 3 # torchrun, RANK");
        assert_eq!(line("deadline ="), "deadline = \"7s\" # variable FARCALL_DEADLINE");
        assert_eq!(line("join_timeout ="), "join_timeout = \"60s\" # default");
        assert_eq!(line("requests ="), "requests = 16 # variable FARCALL_LIMITS_REQUESTS");
        assert_eq!(line("# bind ="), "# bind = # default");
        assert_eq!(line("# key is"), "# key is set, and not shown # variable FARCALL_KEY");
        assert!(!toml(settings().entries(), false).contains("default"));
    }

    #[test]
    fn json_has_every_setting_by_its_key() {
        let object = json(settings().entries(), true);
        assert_eq!(object["rank"], json!({ "value": 3, "origin": "torchrun, RANK" }));
        assert_eq!(object["limits.requests"]["value"], 16);
        assert_eq!(object["host_store"]["value"], true);
        assert_eq!(object["key"]["value"], HIDDEN);
        assert_eq!(json(settings().entries(), false)["bind"], Value::Null);
        assert!(!object.to_string().contains(SECRET));
    }
}
