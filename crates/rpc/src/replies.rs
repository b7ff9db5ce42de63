//! The replies to one call of several workers, and their outcomes by worker.

use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use crate::call::ReplyFuture;
use crate::{CallError, Reply};

/// Calls that were sent to several workers: a future of the outcome of each, which resolves when all have one.
///
/// To take them one by one, iterate: each [`Reply`] knows its [worker](Reply::worker).
/// # Cancel safety
/// Dropping it cancels all calls that have no outcome, as dropping a [`Reply`] does.
#[must_use = "a call's failure is seen only by waiting for its reply"]
pub struct Replies<T>(Vec<Reply<T>>);

impl<T> Replies<T> {
    pub(crate) fn new(replies: Vec<Reply<T>>) -> Self {
        Self(replies)
    }

    /// How many calls were made.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no call was made.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether waiting would return at once.
    pub fn is_done(&self) -> bool {
        self.0.iter().all(Reply::is_done)
    }

    /// Blocks until each call has its outcome, at most until their deadlines.
    pub fn wait(self) -> Outcomes<T> {
        Outcomes(self.0.into_iter().map(|reply| (Arc::clone(reply.worker()), reply.wait())).collect())
    }

    /// As [`Reply::detach`], all of them.
    pub fn detach(self) {
        self.0.into_iter().for_each(Reply::detach);
    }
}

impl<T> IntoIterator for Replies<T> {
    type Item = Reply<T>;
    type IntoIter = std::vec::IntoIter<Reply<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<T> IntoFuture for Replies<T> {
    type Output = Outcomes<T>;
    type IntoFuture = RepliesFuture<T>;

    fn into_future(self) -> RepliesFuture<T> {
        let each = self.0.into_iter().map(|reply| (Arc::clone(reply.worker()), State::Waiting(reply.into_future())));
        RepliesFuture { each: each.collect() }
    }
}

impl<T> fmt::Debug for Replies<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Replies").field(&self.0).finish()
    }
}

/// Awaiting [`Replies`]: resolves when every call has its outcome.
pub struct RepliesFuture<T> {
    each: Vec<(Arc<str>, State<T>)>,
}

enum State<T> {
    Waiting(ReplyFuture<T>),
    Done(Result<T, CallError>),
}

impl<T> Unpin for RepliesFuture<T> {}

impl<T> Future for RepliesFuture<T> {
    type Output = Outcomes<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcomes<T>> {
        let mut waiting = false;
        for (_, state) in &mut self.each {
            let State::Waiting(reply) = state else { continue };
            match Pin::new(reply).poll(cx) {
                Poll::Ready(outcome) => *state = State::Done(outcome),
                Poll::Pending => waiting = true,
            }
        }
        if waiting {
            return Poll::Pending;
        }
        let each = std::mem::take(&mut self.each).into_iter().filter_map(|(worker, state)| match state {
            State::Done(outcome) => Some((worker, outcome)),
            State::Waiting(_) => None,
        });
        Poll::Ready(Outcomes(each.collect()))
    }
}

/// What became of a call to several workers: each one's name and outcome, in the order in which they were called.
#[derive(Debug)]
pub struct Outcomes<T>(Vec<(Arc<str>, Result<T, CallError>)>);

impl<T> Outcomes<T> {
    /// The values, if every worker gave one.
    ///
    /// # Errors
    /// [`SomeFailed`] with each failure, and who had none.
    pub fn into_values(self) -> Result<Vec<(Arc<str>, T)>, SomeFailed> {
        let (mut values, mut failed) = (Vec::new(), Vec::new());
        for (worker, outcome) in self.0 {
            match outcome {
                Ok(value) => values.push((worker, value)),
                Err(error) => failed.push((worker, error)),
            }
        }
        if failed.is_empty() {
            return Ok(values);
        }
        Err(SomeFailed { failed, succeeded: values.into_iter().map(|(worker, _)| worker).collect() })
    }
}

impl<T> Deref for Outcomes<T> {
    type Target = [(Arc<str>, Result<T, CallError>)];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> IntoIterator for Outcomes<T> {
    type Item = (Arc<str>, Result<T, CallError>);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Some of the workers that were called failed.
#[derive(Clone, Debug)]
pub struct SomeFailed {
    /// Each worker that failed, and how.
    pub failed: Vec<(Arc<str>, CallError)>,
    /// The others.
    pub succeeded: Vec<Arc<str>>,
}

impl fmt::Display for SomeFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.failed.len() + self.succeeded.len();
        write!(f, "{} of {of} workers failed", self.failed.len())?;
        self.failed.iter().try_for_each(|(worker, error)| write!(f, "; {worker}: {error}"))
    }
}

impl std::error::Error for SomeFailed {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.failed.first().map(|(_, error)| error as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CallId;

    #[test]
    fn each_failure_is_named_and_no_value_is_lost_silently() {
        let lost = |worker: &str| {
            let call = CallId { worker: worker.into(), function: "f" };
            Err(CallError::Panicked { call, message: "no".into() })
        };
        let outcomes = Outcomes(vec![("w1".into(), Ok(1)), ("w2".into(), lost("w2")), ("w3".into(), lost("w3"))]);
        assert_eq!(outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).count(), 1);
        let failed = outcomes.into_values().expect_err("two failed");
        assert_eq!(failed.succeeded, ["w1".into()]);
        assert_eq!(failed.to_string(), "2 of 3 workers failed; w2: f on w2 panicked: no; w3: f on w3 panicked: no");
        let all = Outcomes(vec![("w1".into(), Ok(1)), ("w2".into(), Ok(2))]).into_values().expect("all succeeded");
        assert_eq!(all, [("w1".into(), 1), ("w2".into(), 2)]);
    }
}
