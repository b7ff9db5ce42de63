//! Two words in a page that two processes share, and a thread that answers: the fastest that a sleeping process can be woken, or,
//! if both sides look at the words all the time, that processes can tell each other anything.
//!
//! Invariant X1: each word is written by one side; the other side only waits for it to change.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::thread::futex::{Flags, Timespec, wait, wake};
use serde::{Deserialize, Serialize};

const PAGE_BYTES: u64 = 4096;
/// How long a side looks before it sleeps, if it looks: longer than the other needs.
const LOOK: Duration = Duration::from_millis(20);
/// How long a side looks before it lets others have its processor between looks.
const ALONE: Duration = Duration::from_micros(10);
/// How long a side waits for the other.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long the answering thread stays without a question.
const IDLE_MAX: Duration = Duration::from_secs(120);

/// Where a page is: a descriptor of a process on this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Shared {
    pid: u32,
    descriptor: i32,
    polled: bool,
}

/// A page with two words.
pub(crate) struct Page {
    map: MmapRaw,
    asked: u32,
    /// Both sides look at their word instead of sleeping on it.
    polled: bool,
    /// Kept while the other side may open it.
    _fd: OwnedFd,
}

/// Makes a page, and a thread that answers on it.
pub(crate) fn serve(polled: bool) -> io::Result<Shared> {
    let fd = rustix::fs::memfd_create(c"farcall-bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, PAGE_BYTES)?;
    // A page that nobody can cut off under its readers.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let shared = Shared { pid: std::process::id(), descriptor: fd.as_raw_fd(), polled };
    let page = Page::map(fd, polled)?;
    std::thread::Builder::new().name("bench-futex".into()).spawn(move || page.answer())?;
    Ok(shared)
}

impl Page {
    pub(crate) fn open(shared: &Shared) -> io::Result<Self> {
        let path = format!("/proc/{}/fd/{}", shared.pid, shared.descriptor);
        Self::map(File::options().read(true).write(true).open(path)?.into(), shared.polled)
    }

    fn map(fd: OwnedFd, polled: bool) -> io::Result<Self> {
        let sealed = rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK);
        if !sealed || rustix::fs::fstat(fd.as_fd())?.st_size != PAGE_BYTES as i64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let map = MmapRaw::map_raw(&fd)?;
        Ok(Self { map, asked: 0, polled, _fd: fd })
    }

    /// Word 0 is the question's, word 1 the answer's.
    fn word(&self, index: usize) -> &AtomicU32 {
        #[expect(unsafe_code, reason = "memory that two processes share is reached by atomics")]
        // SAFETY: both words lie in the page, which is mapped for as long as `self` is, aligned, and sealed against shrinking;
        // every access to it, in both processes, is atomic.
        unsafe {
            AtomicU32::from_ptr(self.map.as_mut_ptr().cast::<u32>().add(index))
        }
    }

    /// Asks, and sleeps until the answer is there.
    pub(crate) fn round_trip(&mut self) -> io::Result<()> {
        self.asked = self.asked.wrapping_add(1);
        self.say(0, self.asked)?;
        let deadline = Instant::now() + ANSWER_MAX;
        if self.polled {
            while !self.look(1, self.asked.wrapping_sub(1)) {
                // Whoever has looked for long sleeps.
                wake(self.word(0), Flags::empty(), 1)?;
                if Instant::now() > deadline {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            return Ok(());
        }
        loop {
            let answer = self.word(1).load(Ordering::Acquire);
            if answer == self.asked {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.sleep(1, answer)?;
        }
    }

    /// Answers until nobody asks for long.
    fn answer(&self) {
        let (mut answered, mut asked_at) = (0, Instant::now());
        while asked_at.elapsed() < IDLE_MAX {
            let question = self.word(0).load(Ordering::Acquire);
            let done = if question == answered {
                if self.polled && self.look(0, answered) { Ok(()) } else { self.sleep(0, answered) }
            } else {
                (answered, asked_at) = (question, Instant::now());
                self.say(1, answered)
            };
            if done.is_err() {
                return;
            }
        }
    }

    fn say(&self, index: usize, value: u32) -> io::Result<()> {
        self.word(index).store(value, Ordering::Release);
        if !self.polled {
            wake(self.word(index), Flags::empty(), 1)?;
        }
        Ok(())
    }

    /// Whether the word is another within [`LOOK`].
    fn look(&self, index: usize, value: u32) -> bool {
        let began = Instant::now();
        loop {
            for _ in 0..64 {
                if self.word(index).load(Ordering::Acquire) != value {
                    return true;
                }
                std::hint::spin_loop();
            }
            match began.elapsed() {
                looked if looked > LOOK => return false,
                // On one processor, the other cannot answer while this one looks.
                looked if looked > ALONE => std::thread::yield_now(),
                _ => {}
            }
        }
    }

    /// Until the word is another, or for a second.
    fn sleep(&self, index: usize, value: u32) -> io::Result<()> {
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        match wait(self.word(index), Flags::empty(), value, Some(&second)) {
            Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_answered_over_two_mappings_of_a_page() {
        for polled in [false, true] {
            let mut page = Page::open(&serve(polled).expect("serves")).expect("opens");
            for _ in 0..1000 {
                page.round_trip().expect("an answer");
            }
            assert_eq!(page.word(1).load(Ordering::Relaxed), 1000);
        }
    }

    /// A file that its owner could shrink would end this process by a signal.
    #[test]
    fn a_page_that_is_not_sealed_is_refused() {
        let fd = rustix::fs::memfd_create(c"loose", MemfdFlags::ALLOW_SEALING).expect("a memfd");
        rustix::fs::ftruncate(&fd, PAGE_BYTES).expect("a page");
        assert_eq!(Page::map(fd, false).err().map(|error| error.kind()), Some(io::ErrorKind::InvalidData));
    }
}
