//! Functions as callers name them on the wire: a number each, given once in a process.
//!
//! The same number stands for a function on every connection of every agent; a connection announces it before its first use.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};

use crate::agent::Callee;
use crate::builtin::Builtin;
use crate::function::Function;

/// A function's number, and what announces it.
#[derive(Debug)]
pub(crate) struct Interned {
    pub(crate) id: u32,
    pub(crate) announcement: Box<[u8]>,
}

/// Where a function keeps its number; written by `#[farcall::function]`.
#[derive(Debug, Default)]
pub struct FunctionCell(OnceLock<Interned>);

impl FunctionCell {
    /// Of a function that was not called yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }
}

fn number(callee: &Callee) -> Interned {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let types = callee.types();
    let announcement = match postcard::to_stdvec(&callee.announcement(&types)) {
        Ok(bytes) => bytes.into(),
        Err(error) => unreachable!("strings always encode: {error}"),
    };
    Interned { id: NEXT.fetch_add(1, Ordering::Relaxed), announcement }
}

/// The number of a function; its types are asked for before its first call.
pub(crate) fn of_function<F: Function>() -> &'static Interned {
    F::cell().0.get_or_init(|| number(&Callee::of::<F>()))
}

/// The number of a builtin. Builtins are for the process's life, and so is what is kept of those that were called.
pub(crate) fn of_builtin(builtin: &Builtin) -> &'static Interned {
    static BUILTINS: RwLock<Option<HashMap<&'static str, &'static Interned>>> = RwLock::new(None);
    // Not by the name: another registry may have another builtin of that.
    let text = builtin.text();
    let known = BUILTINS.read().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|map| map.get(text).copied());
    known.unwrap_or_else(|| {
        let mut builtins = BUILTINS.write().unwrap_or_else(PoisonError::into_inner);
        let new = || &*Box::leak(Box::new(number(&Callee::builtin(builtin))));
        builtins.get_or_insert_default().entry(text).or_insert_with(new)
    })
}
