//! `farcall schema`: the builtins that can be called by name, and what their arguments are.

use std::process::ExitCode;

use clap::Subcommand;
use farcall::{Builtin, Registry};

use crate::Failure;

#[derive(Subcommand)]
pub(crate) enum SchemaCommand {
    /// List the signatures of all builtins, by name.
    List {
        /// Only those whose signature has this text.
        #[arg(long, value_name = "TEXT")]
        filter: Option<String>,
    },
    /// Show a builtin, all its overloads in the order in which they are tried, or one: `aten::add`, `aten::add.Tensor`.
    Show { name: String },
}

pub(crate) fn run(command: &SchemaCommand) -> Result<ExitCode, Failure> {
    let registry = Registry::collected();
    match command {
        SchemaCommand::List { filter } => {
            for signature in list(&registry, filter.as_deref().unwrap_or_default()) {
                println!("{signature}");
            }
        }
        SchemaCommand::Show { name } => print!("{}", show(&registry, name)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn list(registry: &Registry, filter: &str) -> Vec<&'static str> {
    let mut signatures: Vec<_> = registry.builtins().map(Builtin::text).filter(|text| text.contains(filter)).collect();
    signatures.sort_unstable();
    signatures
}

fn show(registry: &Registry, name: &str) -> Result<String, Failure> {
    let named = |builtin: &&Builtin| builtin.name() == name || builtin.schema().name.base == name;
    let overloads: Vec<_> = registry.builtins().filter(named).collect();
    if overloads.is_empty() {
        let near = registry.nearest_builtins(name);
        let hint = match near.as_slice() {
            [] => "`farcall schema list` has all".to_owned(),
            near => format!("did you mean {}?", near.join(" or ")),
        };
        return Err(format!("no builtin {name}; {hint}").into());
    }
    Ok(overloads.into_iter().map(describe).collect())
}

/// A line for the signature, and one for each argument and result.
fn describe(builtin: &Builtin) -> String {
    let schema = builtin.schema();
    let mut lines = vec![builtin.text().to_owned()];
    for argument in &schema.arguments {
        let by_name = if argument.keyword_only { ", by name only" } else { "" };
        let default = match &argument.default {
            Some(default) => format!(", {default} if not given"),
            None => String::new(),
        };
        lines.push(format!("  {}: {}{by_name}{default}", argument.name, argument.of));
    }
    for returned in &schema.returns {
        let name = returned.name.as_ref().map(|name| format!(", {name}")).unwrap_or_default();
        lines.push(format!("  gives {}{name}", returned.of));
    }
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use farcall::Value;

    use super::*;

    fn registry() -> Registry {
        ["t::f.b(Tensor x, int[2] n=1, *, float? k=None) -> (Tensor y, int)", "t::f.a(int x) -> int", "t::g() -> ()"]
            .into_iter()
            .fold(Registry::empty(), |registry, signature| {
                registry.with_builtin(Builtin::new(signature, |_, _| Ok(Value::None)).expect("a signature"))
            })
    }

    #[test]
    fn signatures_are_listed_by_name() {
        assert_eq!(
            list(&registry(), "t::f"),
            ["t::f.a(int x) -> int", "t::f.b(Tensor x, int[2] n=1, *, float? k=None) -> (Tensor y, int)"]
        );
        assert!(list(&registry(), "no such text").is_empty());
        assert!(list(&registry(), "").len() > 3, "those of farcall, too");
    }

    #[test]
    fn a_builtin_is_shown_with_its_arguments() {
        let shown = show(&registry(), "t::f").expect("two overloads");
        assert_eq!(
            shown,
            "t::f.b(Tensor x, int[2] n=1, *, float? k=None) -> (Tensor y, int)\n  x: Tensor\n  n: int[2], 1 if not given\n  \
             k: float?, by name only, None if not given\n  gives Tensor, y\n  gives int\n\
             t::f.a(int x) -> int\n  x: int\n  gives int\n"
        );
        assert_eq!(show(&registry(), "t::g").expect("one"), "t::g() -> ()\n");
        let error = show(&registry(), "t::fg").expect_err("no such name").to_string();
        assert!(error.starts_with("no builtin t::fg; did you mean t::"), "{error}");
    }
}
