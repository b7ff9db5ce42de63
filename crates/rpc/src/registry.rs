//! The functions an agent serves: name → handler. One registry per agent; nothing is process-global.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, OnceLock};

use farcall_transport::JobCost;
use serde::{Deserialize, Serialize};

use crate::builtin::{Builtin, Builtins};
use crate::error::JoinError;
use crate::function::{Function, Handler};
use crate::nearest::nearest;

/// What `#[farcall::function]` submits to `inventory`.
pub struct Registration {
    name: &'static str,
    signature: &'static str,
    types: fn() -> String,
    inline: bool,
    handler: fn() -> Handler,
}

impl Registration {
    /// The registration of `F`.
    pub const fn of<F: Function>() -> Self {
        Self { name: F::NAME, signature: F::SIGNATURE, types: F::types, inline: F::INLINE, handler: F::handler }
    }
}

inventory::collect!(Registration);

pub(crate) struct Registered {
    pub(crate) name: &'static str,
    pub(crate) signature: &'static str,
    pub(crate) types: Types,
    pub(crate) inline: bool,
    pub(crate) handler: Handler,
    pub(crate) cost: Arc<JobCost>,
}

/// Which of two spaces a function's name is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FunctionKind {
    User,
    Builtin,
}

/// What a function's types are made of: told at its first caller, known from then on.
#[derive(Default)]
pub(crate) struct Types {
    text: OnceLock<String>,
    of: Option<fn() -> String>,
}

impl Types {
    fn of(of: fn() -> String) -> Self {
        Self { text: OnceLock::new(), of: Some(of) }
    }

    /// Empty for those whose signature says it all.
    pub(crate) fn text(&self) -> &str {
        self.text.get_or_init(|| self.of.map(|of| of()).unwrap_or_default())
    }
}

/// The functions an agent serves.
#[derive(Clone, Default)]
pub struct Registry {
    functions: HashMap<&'static str, Arc<Registered>>,
    builtins: Builtins,
    duplicate: Option<&'static str>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.functions.keys()).finish()
    }
}

impl Registry {
    /// No functions; the agent only calls.
    pub fn empty() -> Self {
        Self::default()
    }

    /// Every `#[farcall::function]` linked into this program, and every builtin.
    pub fn collected() -> Self {
        inventory::iter::<Registration>.into_iter().fold(Self::default().with_builtins(), Self::add)
    }

    /// Serves the builtins, too: the operators of farcall, by torch's names.
    #[must_use]
    pub fn with_builtins(self) -> Self {
        Self { builtins: Builtins::served(), ..self }
    }

    /// Adds one builtin; its callers need it, too, since they match arguments to it.
    #[must_use]
    pub fn with_builtin(mut self, builtin: Builtin) -> Self {
        let name = builtin.name();
        if !self.builtins.add(builtin) {
            self.duplicate = Some(name);
        }
        self
    }

    /// The builtins that can be called by name, in the order in which overloads are tried.
    pub fn builtins(&self) -> impl Iterator<Item = &Builtin> {
        self.builtins.iter()
    }

    /// Adds one function.
    #[must_use]
    pub fn with<F: Function>(self, _function: F) -> Self {
        self.add(&Registration::of::<F>())
    }

    fn add(mut self, registration: &Registration) -> Self {
        let &Registration { name, signature, types, inline, handler } = registration;
        match self.functions.entry(name) {
            Entry::Occupied(_) => self.duplicate = Some(name),
            Entry::Vacant(entry) => {
                entry.insert(Arc::new(Registered {
                    name,
                    signature,
                    types: Types::of(types),
                    inline,
                    handler: handler(),
                    cost: Arc::default(),
                }));
            }
        }
        self
    }

    pub(crate) fn check(&self) -> Result<(), JoinError> {
        self.duplicate.map_or(Ok(()), |name| Err(JoinError::DuplicateFunction { name }))
    }

    /// The builtins' names that are most like `name`, nearest first; none that is far from it.
    pub fn nearest_builtins(&self, name: &str) -> Vec<&'static str> {
        self.builtins.nearest(name)
    }

    pub(crate) fn known_builtins(&self) -> &Builtins {
        &self.builtins
    }

    pub(crate) fn find(&self, kind: FunctionKind, name: &str) -> Option<&Arc<Registered>> {
        match kind {
            FunctionKind::User => self.functions.get(name),
            FunctionKind::Builtin => self.builtins.find(name),
        }
    }

    /// The registered name of that kind most like `name`, if any is close.
    pub(crate) fn nearest(&self, kind: FunctionKind, name: &str) -> Option<&'static str> {
        match kind {
            FunctionKind::User => nearest(name, self.functions.keys().copied()),
            FunctionKind::Builtin => self.builtins.nearest_served(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    struct Double;

    impl Function for Double {
        type Args = (i64,);
        type Output = i64;
        const NAME: &'static str = "math::double";
        const SIGNATURE: &'static str = "(i64) -> i64";
        const INLINE: bool = false;
        fn handler() -> Handler {
            Handler::sync(|_, (x,): (i64,)| Ok(2 * x))
        }
        fn cell() -> &'static crate::FunctionCell {
            static CELL: crate::FunctionCell = crate::FunctionCell::new();
            &CELL
        }
    }

    #[test]
    fn nearest_name_is_found_by_spelling_or_by_last_part() {
        let registry = Registry::empty().with(Double);
        assert_eq!(registry.nearest(FunctionKind::User, "math::duoble"), Some("math::double"));
        assert_eq!(registry.nearest(FunctionKind::User, "other::module::double"), Some("math::double"));
        assert_eq!(registry.nearest(FunctionKind::User, "completely::else"), None);
    }

    #[test]
    fn a_name_given_twice_is_an_error_at_join() {
        let registry = Registry::empty().with(Double).with(Double);
        assert!(matches!(registry.check(), Err(JoinError::DuplicateFunction { name: "math::double" })));
    }
}
