//! Builtin functions: operators that are called by name, their overloads matched by arguments on the caller.
//!
//! Not here: what signatures are and how arguments match them (`farcall-schema`), and the operators (`farcall-ops`).
//! Invariant B1: the callee checks values against its own signature before it runs anything, whatever the caller did.
//! Invariant B2: which overload is called depends on the caller's list, its order, and the arguments alone.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};

use farcall_schema::{NoMatch, ParseError, Schema, Value};

use crate::function::Handler;
use crate::nearest::{nearest, nearest_few};
use crate::registry::{Registered, Types};
use crate::{Call, Result};

mod table;

/// The code of a builtin: its arguments are those of its signature, all of them.
type Run = dyn Fn(&Call, &[Value]) -> Result<Value> + Send + Sync;

/// One overload of a function that is called by name: [`To::builtin`](crate::To::builtin).
pub struct Builtin {
    text: &'static str,
    schema: Schema,
    run: Box<Run>,
}

/// Why a signature cannot be a builtin's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuiltinError {
    /// It is none.
    #[error(transparent)]
    Schema(#[from] ParseError),
    /// Two workers compare signatures as texts, so there is one way to write them.
    #[error("write the signature as it is printed: {canonical}")]
    NotCanonical {
        /// How.
        canonical: String,
    },
}

impl fmt::Debug for Builtin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text)
    }
}

impl Builtin {
    /// A builtin that runs `run`, which gets a value of the right type for each argument of `signature`, defaults included.
    ///
    /// # Errors
    /// [`BuiltinError`]: it is no signature, or not in canonical form.
    pub fn new(
        signature: &'static str,
        run: impl Fn(&Call, &[Value]) -> Result<Value> + Send + Sync + 'static,
    ) -> Result<Self, BuiltinError> {
        let schema: Schema = signature.parse()?;
        let canonical = schema.to_string();
        if canonical != signature {
            return Err(BuiltinError::NotCanonical { canonical });
        }
        Ok(Self { text: signature, schema, run: Box::new(run) })
    }

    /// Its name with its overload, such as `aten::add.Tensor`.
    pub fn name(&self) -> &'static str {
        // In canonical form, the name comes first, and has no spaces.
        self.text.split_once('(').map_or(self.text, |(name, _)| name)
    }

    /// Its signature's text.
    pub fn text(&self) -> &'static str {
        self.text
    }

    /// Its signature.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Its name without the overload.
    fn base(&self) -> &'static str {
        self.name().split_once('.').map_or(self.name(), |(base, _)| base)
    }

    /// Runs it on values that a caller sent (B1).
    fn run(&self, cx: &Call, values: Vec<Value>) -> Result<Value, RunError> {
        let values = self.schema.check(values).map_err(|refused| RunError::Arguments(refused.to_string()))?;
        (self.run)(cx, &values).map_err(RunError::Failed)
    }
}

/// What came of a builtin that gave no value.
pub(crate) enum RunError {
    Arguments(String),
    Failed(crate::Error),
}

/// The builtins that a registry knows: those of this crate, and those that were added.
#[derive(Clone)]
pub(crate) struct Builtins {
    /// In the order in which overloads are tried.
    all: Vec<Arc<Builtin>>,
    /// By name with and without overload: where in `all`.
    by_name: HashMap<&'static str, Vec<usize>>,
    /// Those that callers may call, by name with overload.
    served: HashMap<&'static str, Arc<Registered>>,
}

/// What stands in the way of a call by name.
#[derive(Debug)]
pub(crate) enum Unresolved {
    /// Nothing has that name; these are near.
    Unknown(Vec<&'static str>),
    NoMatch {
        base: &'static str,
        error: NoMatch,
    },
}

impl Default for Builtins {
    /// All of this crate, none of them served.
    fn default() -> Self {
        static STANDARD: LazyLock<Builtins> = LazyLock::new(|| {
            let mut standard = Builtins { all: Vec::new(), by_name: HashMap::new(), served: HashMap::new() };
            table::standard().for_each(|builtin| standard.know(Arc::new(builtin)));
            standard
        });
        STANDARD.clone()
    }
}

impl Builtins {
    /// The same, all served.
    pub(crate) fn served() -> Self {
        let mut builtins = Self::default();
        for builtin in builtins.all.clone() {
            builtins.serve(&builtin);
        }
        builtins
    }

    /// Knows and serves `builtin`, too; `false` if its name is taken.
    pub(crate) fn add(&mut self, builtin: Builtin) -> bool {
        let builtin = Arc::new(builtin);
        if self
            .by_name
            .get(builtin.name())
            .is_some_and(|known| known.iter().any(|index| self.all[*index].name() == builtin.name()))
        {
            return false;
        }
        self.know(Arc::clone(&builtin));
        self.serve(&builtin);
        true
    }

    fn know(&mut self, builtin: Arc<Builtin>) {
        let index = self.all.len();
        self.by_name.entry(builtin.name()).or_default().push(index);
        if builtin.base() != builtin.name() {
            self.by_name.entry(builtin.base()).or_default().push(index);
        }
        self.all.push(builtin);
    }

    fn serve(&mut self, builtin: &Arc<Builtin>) {
        let run = Arc::clone(builtin);
        let registered = Registered {
            name: builtin.name(),
            signature: builtin.text(),
            types: Types::default(),
            inline: false,
            handler: Handler::builtin(move |cx, values| run.run(cx, values)),
            cost: Arc::default(),
        };
        self.served.insert(builtin.name(), Arc::new(registered));
    }

    pub(crate) fn find(&self, name: &str) -> Option<&Arc<Registered>> {
        self.served.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Builtin> {
        self.all.iter().map(AsRef::as_ref)
    }

    /// The names with overloads that are most like `name`.
    pub(crate) fn nearest(&self, name: &str) -> Vec<&'static str> {
        let mut names: Vec<_> = self.by_name.keys().copied().collect();
        names.sort_unstable();
        nearest_few(name, names)
    }

    /// The one that is served most like `name`, if any is close.
    pub(crate) fn nearest_served(&self, name: &str) -> Option<&'static str> {
        nearest(name, self.served.keys().copied())
    }

    /// The overload to call, and its arguments' values (B2). `name` may be with an overload or without.
    pub(crate) fn resolve(
        &self,
        name: &str,
        args: &[Value],
        kwargs: &[(String, Value)],
    ) -> Result<(&Arc<Builtin>, Vec<Value>), Unresolved> {
        let Some((base, indices)) = self.by_name.get_key_value(name) else {
            return Err(Unresolved::Unknown(self.nearest(name)));
        };
        let schemas = indices.iter().map(|index| &self.all[*index].schema);
        match farcall_schema::resolve(name, schemas, args, kwargs) {
            Ok((chosen, values)) => Ok((&self.all[indices[chosen]], values)),
            Err(error) => Err(Unresolved::NoMatch { base, error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use farcall_schema::{args, kwargs};

    use super::*;

    fn builtin(signature: &'static str) -> Builtin {
        Builtin::new(signature, |_, _| Ok(Value::None)).unwrap_or_else(|error| panic!("{signature}: {error}"))
    }

    fn builtins() -> Builtins {
        let mut builtins = Builtins { all: Vec::new(), by_name: HashMap::new(), served: HashMap::new() };
        for signature in
            ["t::f.int(int a) -> int", "t::f.str(str a, *, int n=1) -> str", "t::f(Any a) -> Any", "t::g() -> ()"]
        {
            assert!(builtins.add(builtin(signature)));
        }
        builtins
    }

    fn resolved(name: &str, args: &[Value], kwargs: &[(String, Value)]) -> Result<&'static str, String> {
        let builtins = builtins();
        let resolved = builtins.resolve(name, args, kwargs).map(|(builtin, _)| builtin.name());
        resolved.map_err(|error| match error {
            Unresolved::Unknown(nearest) => format!("unknown, near {nearest:?}"),
            Unresolved::NoMatch { base, error } => format!("{base}: {} candidates", error.candidates.len()),
        })
    }

    #[test]
    fn a_name_with_an_overload_is_that_one_and_without_it_is_all() {
        assert_eq!(resolved("t::f", &args![1], &[]), Ok("t::f.int"));
        assert_eq!(resolved("t::f", &args!["x"], &kwargs! {"n": 2}), Ok("t::f.str"));
        assert_eq!(resolved("t::f", &args![0.5], &[]), Ok("t::f"));
        assert_eq!(resolved("t::f.int", &args!["x"], &[]), Err("t::f.int: 1 candidates".to_owned()));
        assert_eq!(resolved("t::f", &[], &[]), Err("t::f: 3 candidates".to_owned()));
        assert_eq!(resolved("t::f.itn", &args![1], &[]), Err(r#"unknown, near ["t::f.int", "t::f.str"]"#.to_owned()));
        assert_eq!(resolved("t::h", &args![1], &[]), Err(r#"unknown, near ["t::f", "t::g"]"#.to_owned()));
    }

    #[test]
    fn one_name_is_one_builtin() {
        let mut builtins = builtins();
        assert!(!builtins.add(builtin("t::g() -> int")));
        assert!(!builtins.add(builtin("t::f(int a) -> int")), "the overload without a name");
        assert!(builtins.add(builtin("t::g.x() -> int")));
    }

    #[test]
    fn a_signature_is_written_as_it_is_printed() {
        let error = Builtin::new("t::f( int a ) -> int", |_, _| Ok(Value::None)).expect_err("spaces");
        assert_eq!(error, BuiltinError::NotCanonical { canonical: "t::f(int a) -> int".to_owned() });
        assert!(matches!(Builtin::new("t::f(", |_, _| Ok(Value::None)), Err(BuiltinError::Schema(_))));
    }

    /// Every line of the table makes a builtin, and none is there twice.
    #[test]
    fn the_table_is_complete() {
        let known = Builtins::default();
        assert_eq!(known.all.len(), table::count());
        let mut names: Vec<_> = known.iter().map(Builtin::name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), table::count());
    }
}
