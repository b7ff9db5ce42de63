//! Settings in a TOML file: names, texts and line numbers. Pure: knows the table, no file system.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::table::{self, Kind, Setting};
use super::{Origin, SETTINGS, SettingsError};
use crate::nearest::nearest;

/// A setting that the file has.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) setting: &'static Setting,
    pub(super) text: String,
    pub(super) line: usize,
}

struct File<'a> {
    path: &'a Path,
    text: &'a str,
    entries: Vec<Entry>,
}

/// The settings of a file with this text; `path` is for messages.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, SettingsError> {
    let mut file = File { path, text, entries: Vec::new() };
    let table = DeTable::parse(text).map_err(|error| SettingsError::Syntax {
        path: path.to_owned(),
        line: file.line(error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    file.table("", table.get_ref())?;
    Ok(file.entries)
}

impl File<'_> {
    /// The number of the line that has this byte.
    fn line(&self, byte: usize) -> usize {
        let before = self.text.as_bytes().get(..byte).unwrap_or(self.text.as_bytes());
        1 + before.iter().filter(|byte| **byte == b'\n').count()
    }

    fn table(&mut self, prefix: &str, table: &DeTable<'_>) -> Result<(), SettingsError> {
        for (name, value) in table {
            let key = format!("{prefix}{}", name.get_ref());
            let is_prefix = SETTINGS.iter().any(|setting| setting.key.starts_with(&format!("{key}.")));
            match value.get_ref() {
                DeValue::Table(inner) if is_prefix => self.table(&format!("{key}."), inner)?,
                _ => self.entry(&key, self.line(name.span().start), value)?,
            }
        }
        Ok(())
    }

    fn entry(&mut self, key: &str, line: usize, value: &Spanned<DeValue<'_>>) -> Result<(), SettingsError> {
        let Some(setting) = table::by_key(key) else {
            let nearest = nearest(key, SETTINGS.iter().map(|setting| setting.key));
            return Err(SettingsError::UnknownKey { path: self.path.to_owned(), line, key: key.to_owned(), nearest });
        };
        let origin = || Origin::File { path: self.path.into(), line };
        if setting.kind == Kind::Secret {
            let message = format!("files of settings are shown and passed on; set {}_FILE or {0}", setting.variable);
            return Err(SettingsError::Wrong { origin: origin(), key: setting.key, message });
        }
        let Some(text) = text_of(setting.kind, value.get_ref()) else {
            let value = self.text.get(value.span()).unwrap_or_default().to_owned();
            let expected = setting.kind.to_string();
            return Err(SettingsError::Value { origin: origin(), key: setting.key, value, expected });
        };
        self.entries.push(Entry { setting, text, line });
        Ok(())
    }
}

/// The text of a value, if it has the type of its kind.
fn text_of(kind: Kind, value: &DeValue<'_>) -> Option<String> {
    let integer =
        || value.as_integer().filter(|integer| integer.radix() == 10).map(|integer| integer.as_str().to_owned());
    match kind {
        Kind::Count | Kind::Positive => integer(),
        Kind::Size => integer().or_else(|| value.as_str().map(str::to_owned)),
        Kind::Flag => value.as_bool().map(|flag| flag.to_string()),
        Kind::Duration | Kind::Secret => value.as_str().map(str::to_owned),
        Kind::Text(_) => match value {
            // A list is another way to write commas.
            DeValue::Array(elements) => {
                let elements: Option<Vec<&str>> = elements.iter().map(|element| element.get_ref().as_str()).collect();
                elements.map(|elements| elements.join(","))
            }
            value => value.as_str().map(str::to_owned).or_else(integer),
        },
    }
}
