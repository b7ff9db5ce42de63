//! Memory that is not tensors' is touched before the rounds: what a thread or a path of the program first uses in a later round
//! would cost a page fault then.
//!
//! Only what every process has: its threads' stacks, its heap, and its own program and libraries, which the system maps page by page.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// For the C library of the workers: what was used once stays, in one heap. Else it gives memory back to the system between rounds,
/// and takes it again.
pub(crate) const ALLOCATOR: [(&str, &str); 4] = [
    ("MALLOC_ARENA_MAX", "1"),
    ("MALLOC_TRIM_THRESHOLD_", "1073741824"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TOP_PAD_", "16777216"),
];

/// What a thread of a reader may use of its stack.
const STACK_BYTES: usize = 192 << 10;
/// What a reader may use beside tensors.
const HEAP_BYTES: usize = 16 << 20;
/// How long the threads may take to come.
const COME_MAX: Duration = Duration::from_secs(10);

/// Holds this thread until `threads` have come so far, and touches its stack. Whether so many came.
pub(super) fn threads(threads: usize) -> bool {
    static HELD: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());
    let (held, came) = &HELD;
    let mut count = held.lock().unwrap_or_else(PoisonError::into_inner);
    *count += 1;
    came.notify_all();
    let (count, _) =
        came.wait_timeout_while(count, COME_MAX, |count| *count < threads).unwrap_or_else(PoisonError::into_inner);
    let all = *count >= threads;
    drop(count);
    stack();
    all
}

/// Touches this thread's stack.
pub(super) fn stack() {
    black_box(&mut [0_u8; STACK_BYTES]).fill(1);
}

pub(super) fn heap() {
    drop(black_box(vec![1_u8; HEAP_BYTES]));
}

/// Reads all that is mapped of the program and its libraries, by the kernel, which maps each page that it reads.
pub(super) fn program() -> std::io::Result<()> {
    let memory = File::open("/proc/self/mem")?;
    let mut chunk = vec![0; 1 << 20];
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let Some((start, end)) = mapped_file(line) else { continue };
        let mut at = start;
        while at < end {
            let len = chunk.len().min((end - at) as usize);
            // Beyond the end of its file a mapping cannot be read: there is nothing to touch.
            let Ok(read @ 1..) = memory.read_at(&mut chunk[..len], at) else { break };
            at += read as u64;
        }
    }
    Ok(())
}

/// The addresses of a mapping of a file on a disk: no slab, no device.
fn mapped_file(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_whitespace();
    let (range, access, path) = (fields.next()?, fields.next()?, fields.nth(3)?);
    if !path.starts_with('/') || path.starts_with("/dev/") || path.starts_with("/memfd:") || !access.starts_with('r') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_files_are_told_from_others() {
        let file = "5581f0a00000-5581f0b00000 r-xp 00001000 fd:01 1234                       /usr/bin/farcall";
        assert_eq!(mapped_file(file), Some((0x5581_f0a0_0000, 0x5581_f0b0_0000)));
        for other in [
            "7ffd5000-7ffd6000 rw-p 00000000 00:00 0                          [stack]",
            "7f00-7f10 rw-p 00000000 00:00 0 ",
            "7f00-7f10 rw-s 00000000 00:01 77                         /memfd:farcall (deleted)",
            "7f00-7f10 ---p 00000000 fd:01 1234                       /usr/lib/libc.so.6",
            "",
        ] {
            assert_eq!(mapped_file(other), None, "{other}");
        }
        program().expect("the kernel's own files");
    }
}
