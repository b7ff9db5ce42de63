//! Copies of foreign memory into slabs: one pass, by two processors while one is idle.
//!
//! If the system says that fewer threads run than it has processors, a copy is cut into pieces that the caller and a helper thread
//! take in turn. A helper that is not scheduled takes none, and costs nothing. The caller may be told how far the copy is whole.
//! Stores that go around the caches are left to the C library, which knows the processor: written by hand they were as fast into
//! a slab at 4 and 16 MiB and slower at 8 and 32 MiB (6 ms for 4 ms), although they win into anonymous memory.
//!
//! Invariant C1: a piece is copied by who has claimed it, once, and `copy` returns, or unwinds, when all pieces are done.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;

use super::Span;

/// What one thread takes at a time: long beside a claim, short beside what a helper may keep the caller waiting for.
const PIECE_BYTES: usize = 512 << 10;
/// Shorter copies end before a helper has woken.
const SHARED_BYTES_MIN: usize = 4 << 20;
/// Spins until the caller lets others run while a helper ends its last piece.
const SPINS: usize = 1000;

/// Copies `source` to `target`, which are as long.
///
/// # Panics
/// If they are not.
/// # Cost
/// About what memory's bandwidth allows. The calling thread works all the time.
pub fn copy(target: &mut [u8], source: &[u8]) {
    copy_and_tell(target, source, usize::MAX, |_| {});
}

/// As [`copy`]; after every so many bytes, and not at the end, `tell` is given how many are whole from the start on.
pub(super) fn copy_and_tell(target: &mut [u8], source: &[u8], every: usize, mut tell: impl FnMut(usize)) {
    assert_eq!(target.len(), source.len(), "a copy of as many bytes");
    let len = source.len();
    if len < SHARED_BYTES_MIN || !processor_is_idle() {
        let every = every.clamp(1, len.max(1));
        for (index, (target, source)) in target.chunks_mut(every).zip(source.chunks(every)).enumerate() {
            target.copy_from_slice(source);
            let whole = index * every + source.len();
            if whole < len {
                tell(whole);
            }
        }
        return;
    }
    share(target, source, every, tell);
}

/// The same with the helper.
fn share(target: &mut [u8], source: &[u8], every: usize, mut tell: impl FnMut(usize)) {
    let len = source.len();
    let task = Arc::new(Task::new(target, source));
    Helper::ask(&task);
    let ending = Ending(&task);
    let (mut whole, mut told) = (0, 0);
    task.work(|| {
        whole += task.done[whole..].iter().take_while(|done| done.load(Ordering::Acquire)).count();
        let bytes = (whole * PIECE_BYTES).min(len);
        if bytes - told >= every && bytes < len {
            told = bytes;
            tell(bytes);
        }
    });
    drop(ending);
}

/// Ends a copy, also when its caller unwinds: what it lends is in use until then (C1).
struct Ending<'a>(&'a Task);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.work(|| {});
        let mut spins = 0;
        for done in &self.0.done {
            while !done.load(Ordering::Acquire) {
                // A helper is at its last piece.
                spins += 1;
                if spins < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
            }
        }
    }
}

struct Task {
    target: Span,
    source: Span,
    claimed: AtomicUsize,
    /// By piece.
    done: Box<[AtomicBool]>,
}

// SAFETY: addresses; what is behind them is reached under C1, while `copy` borrows it.
unsafe impl Sync for Task {}

impl Task {
    fn new(target: &mut [u8], source: &[u8]) -> Self {
        let claimed = AtomicUsize::new(0);
        let done = (0..source.len().div_ceil(PIECE_BYTES)).map(|_| AtomicBool::new(false)).collect();
        let source = Span::new(std::ptr::NonNull::from(source).cast(), source.len());
        Self { target: Span::new(std::ptr::NonNull::from(target).cast(), source.len), source, claimed, done }
    }

    /// Copies pieces until all are claimed; `after` each.
    fn work(&self, mut after: impl FnMut()) {
        loop {
            let piece = self.claimed.fetch_add(1, Ordering::Relaxed);
            let Some(done) = self.done.get(piece) else { return };
            let start = piece * PIECE_BYTES;
            let len = PIECE_BYTES.min(self.source.len - start);
            // SAFETY: the piece lies in both, which are as long.
            let [source, target] = [self.source, self.target].map(|span| unsafe { span.part(start, len) });
            // SAFETY: claimed and not done, so `copy` has not returned and lends it (C1).
            let source = unsafe { source.bytes() };
            // SAFETY: as above, and nobody else claims this piece.
            let target = unsafe { target.bytes_mut() };
            target.copy_from_slice(source);
            done.store(true, Ordering::Release);
            after();
        }
    }
}

/// Whether fewer threads run now than there are processors, this one included.
fn processor_is_idle() -> bool {
    static LOAD: OnceLock<Option<(File, usize)>> = OnceLock::new();
    let load = LOAD.get_or_init(|| {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        (processors > 1).then(|| File::open("/proc/loadavg").ok()).flatten().map(|file| (file, processors))
    });
    let Some((file, processors)) = load else { return false };
    let mut text = [0; 128];
    let Ok(len) = file.read_at(&mut text, 0) else { return false };
    running_threads(&text[..len]).is_some_and(|running| running < *processors)
}

/// Of `0.52 0.58 0.59 2/345 12345`, the 2.
fn running_threads(load: &[u8]) -> Option<usize> {
    let field = std::str::from_utf8(load).ok()?.split(' ').nth(3)?;
    field.split_once('/')?.0.parse().ok()
}

/// A thread that waits for copies to help with; one at a time, the others go without.
struct Helper {
    task: Mutex<Option<Arc<Task>>>,
    asked: Condvar,
}

impl Helper {
    fn ask(task: &Arc<Task>) {
        static HELPER: OnceLock<Option<&'static Helper>> = OnceLock::new();
        let helper = HELPER.get_or_init(|| {
            let helper: &Helper = Box::leak(Box::new(Helper { task: Mutex::default(), asked: Condvar::new() }));
            let started = thread::Builder::new().name("farcall-copy".into()).spawn(|| helper.run());
            started.inspect_err(|error| tracing::debug!(%error, "large copies go without help")).ok().map(|_| helper)
        });
        if let Some(helper) = helper {
            *helper.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(task));
            helper.asked.notify_one();
        }
    }

    fn run(&self) {
        loop {
            let task = {
                let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
                loop {
                    match task.take() {
                        Some(task) => break task,
                        None => task = self.asked.wait(task).unwrap_or_else(PoisonError::into_inner),
                    }
                }
            };
            task.work(|| {});
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c1_every_byte_is_copied_whatever_the_sizes_and_addresses() {
        let source: Vec<u8> = (0..9 << 20).map(|index: usize| (index * 7 + (index >> 9)) as u8).collect();
        for len in [0, 1, 63, 64, 4096, PIECE_BYTES + 1, (2 << 20) + 1, (3 << 20) - 5, 4 << 20, (8 << 20) + 77] {
            for (from, to) in [(0, 0), (3, 5), (64, 1)] {
                let mut target = vec![0xaa; len + 8];
                copy(&mut target[to..to + len], &source[from..from + len]);
                assert!(target[to..to + len] == source[from..from + len], "{len} bytes from {from} to {to}");
                assert!(
                    target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0xaa),
                    "{len}: nothing else"
                );
            }
        }
    }

    #[test]
    fn c1_a_helper_and_the_caller_share_a_copy() {
        let source: Vec<u8> = (0..6 << 20).map(|index: usize| (index >> 3) as u8).collect();
        for _ in 0..20 {
            let mut target = vec![0; source.len()];
            let task = Arc::new(Task::new(&mut target, &source));
            thread::scope(|scope| {
                scope.spawn(|| task.work(|| {}));
                task.work(|| {});
            });
            assert!(task.done.iter().all(|done| done.load(Ordering::Acquire)));
            assert!(target == source);
        }
    }

    /// Whoever is told may read so far; never told of the end, nor of less than was asked for.
    #[test]
    fn c1_what_is_told_is_whole() {
        let source: Vec<u8> = (0..9 << 20).map(|index: usize| (index * 7 + (index >> 9)) as u8).collect();
        for (len, every) in [(0, 1), (1000, 300), (3 << 20, 1 << 20), (9 << 20, 1 << 20), (9 << 20, usize::MAX)] {
            let mut target = vec![0xaa; len];
            let start = target.as_ptr();
            let mut told = vec![0];
            copy_and_tell(&mut target, &source[..len], every, |whole| {
                // SAFETY: in `target`, and whole: nobody writes it any more.
                let seen = unsafe { std::slice::from_raw_parts(start, whole) };
                assert!(seen == &source[..whole], "{whole} of {len}");
                told.push(whole);
            });
            assert!(target == source[..len]);
            assert!(
                told.windows(2).all(|pair| pair[1] - pair[0] >= every) && told.iter().all(|whole| *whole < len.max(1))
            );
            // With a helper that was kept from its piece, maybe nothing.
            let alone = len < SHARED_BYTES_MIN;
            assert!(told.len() > 1 || len <= every || !alone, "{len} bytes, every {every}: {told:?}");
        }
    }

    /// C1: what a copy borrows is borrowed until the helper is done with it.
    #[test]
    fn c1_a_teller_that_panics_ends_the_copy_first() {
        let source = vec![1; 16 << 20];
        let mut target = vec![0; source.len()];
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            share(&mut target, &source, 1 << 20, |_| panic!("told"));
        }));
        assert!(unwound.is_err() && target == source);
    }

    #[test]
    fn the_systems_load_is_read() {
        assert_eq!(running_threads(b"0.52 0.58 0.59 2/345 12345\n"), Some(2));
        assert_eq!(running_threads(b"nonsense"), None);
        let now = std::fs::read("/proc/loadavg").unwrap();
        assert!(running_threads(&now).unwrap() >= 1, "this thread runs");
    }
}
