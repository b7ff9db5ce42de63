//! One call to several workers: its arguments are encoded once, copied from their devices and packed once, then sent to each.
//!
//! Invariant: no worker's failure is another's. Each call has its own slot, deadline, window and outcome, as if made alone.

use std::sync::Arc;
use std::time::Duration;

use farcall_device::codec::encode;
use serde::Serialize;

use crate::agent::Callee;
use crate::call::{Reply, Slot};
use crate::function::{Args, Function};
use crate::interned::{self, Interned};
use crate::link::Sent;
use crate::parcel::SharedParcel;
use crate::{CallError, Replies, To};

/// Calls to several workers, with their options; see [`Agent::to_all`](crate::Agent::to_all).
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `call`"]
pub struct ToAll<'a> {
    each: Vec<To<'a>>,
}

impl<'a> ToAll<'a> {
    pub(crate) fn new(each: Vec<To<'a>>) -> Self {
        Self { each }
    }

    /// How long each call waits for its reply; see [`To::deadline`].
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.each = self.each.into_iter().map(|to| to.deadline(deadline)).collect();
        self
    }

    /// As [`To::digests`]; those of the arguments are made once.
    pub fn digests(mut self, digests: bool) -> Self {
        self.each = self.each.into_iter().map(|to| to.digests(digests)).collect();
        self
    }

    /// Calls `function` on each of the workers, as [`To::call`] does on one: sent at once, never blocking.
    ///
    /// The tensors' devices are mapped for each worker by its own device map. A worker that is named twice is called twice; this
    /// worker may be among them. A worker that cannot be reached, or fails, has that as its outcome, and the others theirs.
    ///
    /// ```no_run
    /// # use farcall_device::Tensor;
    /// # use farcall_rpc::{Agent, Function};
    /// # async fn example<F>(agent: &Agent, keep: F, x: &Tensor) -> Result<(), String>
    /// # where F: Function<Args = (Tensor,), Output = ()> {
    /// for (worker, outcome) in agent.to_all(["w1", "w2", "w3"]).call(keep, (x,)).await {
    ///     outcome.map_err(|error| format!("{worker}: {error}"))?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    /// # Errors
    /// None here: each reply has its own.
    /// # Cost
    /// Encoding, copies from devices, packing, and copies of foreign memory into slabs: once. Then that of [`To::call`] for each.
    pub fn call<F: Function, A: Args<F::Args>>(&self, function: F, args: A) -> Replies<F::Output> {
        let _ = function;
        let slots = self.begin(&Callee::of::<F>(), &args, interned::of_function::<F>);
        let replies = self.each.iter().zip(slots).map(|(to, (slot, sent))| {
            to.adopt(&slot, sent.as_ref());
            Reply::new(slot, sent)
        });
        Replies::new(replies.collect())
    }

    fn begin<A: Serialize>(
        &self,
        callee: &Callee,
        args: &A,
        intern: impl FnOnce() -> &'static Interned,
    ) -> Vec<(Arc<Slot>, Option<Sent>)> {
        let opened: Vec<_> = self.each.iter().map(|to| to.open(callee)).collect();
        let Some(first) = self.each.first() else { return Vec::new() };
        let agent = first.agent().inner();
        let fail_all = |error: &dyn Fn(&Slot) -> CallError| {
            for (slot, _) in &opened {
                slot.complete(Err(error(slot)));
            }
            opened.iter().map(|(slot, _)| (Arc::clone(slot), None)).collect()
        };
        let encoded = match encode(args) {
            Ok(encoded) => encoded,
            Err(source) => {
                return fail_all(&|slot| CallError::Encode { call: slot.id.clone(), source: source.clone() });
            }
        };
        for (to, (slot, rank)) in self.each.iter().zip(&opened) {
            if *rank == Some(agent.me.rank) {
                to.call_here(callee, slot, encoded.clone());
            }
        }
        let remote = |rank: &u32| *rank != agent.me.rank;
        let routes: Vec<_> = opened.iter().map(|(slot, rank)| agent.route_for(rank.filter(remote)?, slot)).collect();
        let mut slots: Vec<_> = opened.iter().map(|(slot, _)| (Arc::clone(slot), None)).collect();
        if routes.iter().all(Option::is_none) {
            return slots;
        }
        let lends = routes.iter().flatten().any(|connection| connection.endpoint.lends());
        let parcel = match SharedParcel::new(&agent.driver.config().runtime, encoded, lends) {
            Ok(parcel) => parcel,
            Err(error) => {
                for ((slot, _), _) in opened.iter().zip(&routes).filter(|(_, route)| route.is_some()) {
                    slot.complete(Err(error.clone().into()));
                }
                return slots;
            }
        };
        let function = intern();
        for ((slot, sent), route) in slots.iter_mut().zip(routes) {
            if let Some(connection) = route {
                let call = connection.post(slot, function, parcel.parcel());
                *sent = call.map(|call| Sent { connection, call });
            }
        }
        slots
    }
}
