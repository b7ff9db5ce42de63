//! What is wrong with a setting: where it is, and what would be right.

use std::io;
use std::path::PathBuf;

use super::Origin;

/// Why settings cannot be used. Programs match the variant; people read the text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the settings in {}: {source}; FARCALL_CONFIG names the file", .path.display())]
    File { path: PathBuf, source: io::Error },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", .path.display())]
    Syntax { path: PathBuf, line: usize, message: String },
    /// No setting has this name.
    #[error("{}:{line}: no setting is named `{key}`{}; `farcall config show` lists all", .path.display(), told(.nearest))]
    UnknownKey { path: PathBuf, line: usize, key: String, nearest: Option<&'static str> },
    /// A variable has the prefix of settings and is none.
    #[error("{variable}: no setting has this variable{}; `farcall config show` lists all", told(.nearest))]
    UnknownVariable { variable: String, nearest: Option<&'static str> },
    /// A value is not what is expected.
    #[error("{origin}: {key} = {value}: expected {expected}")]
    Value { origin: Origin, key: &'static str, value: String, expected: String },
    /// A setting that has no default is not set.
    #[error("{variable}: not set; {remedy}")]
    Missing { variable: &'static str, remedy: String },
    /// A setting cannot be as it is, given the others or the machine.
    #[error("{origin}: {key}: {message}")]
    Wrong { origin: Origin, key: &'static str, message: String },
}

fn told(nearest: &Option<&'static str>) -> String {
    nearest.map(|name| format!(", the nearest is `{name}`")).unwrap_or_default()
}
