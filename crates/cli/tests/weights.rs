//! `farcall demo --weights`: versions into the same memory, files that lie, and an end by Ctrl-C.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use super::program::{Ended, eventually, farcall, lives, start};

/// A file of its own for each test, gone with it.
struct Checkpoint(PathBuf);

impl Checkpoint {
    fn of(name: &str, bytes: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("farcall-weights-{}-{name}.safetensors", std::process::id()));
        std::fs::write(&path, bytes).expect("a temporary file");
        Self(path)
    }

    /// A header of this text, then so many bytes.
    fn with(name: &str, header: &str, data: usize) -> Self {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend((0..data).map(|index| (index % 251) as u8));
        Self::of(name, &bytes)
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("UTF-8")
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn entry(name: &str, dtype: &str, shape: &str, offsets: [usize; 2]) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{},{}]}}"#, offsets[0], offsets[1])
}

/// Tensors of every path to a reader: in the frame, in a slab or a chunk, of several batches, without elements.
fn small(name: &str) -> Checkpoint {
    let (mut entries, mut at) = (Vec::new(), 0);
    for (index, (dtype, elements, size)) in [
        ("F32", 5_000_000, 4),
        ("BF16", 40_000, 2),
        ("I64", 3, 8),
        ("BOOL", 100, 1),
        ("F16", 0, 2),
        ("U8", 70_000, 1),
        ("F64", 1, 8),
    ]
    .into_iter()
    .enumerate()
    {
        entries.push(entry(&format!("layer.{index}"), dtype, &format!("[{elements}]"), [at, at + elements * size]));
        at += elements * size;
    }
    Checkpoint::with(name, &format!("{{{}}}", entries.join(",")), at)
}

fn assert_published(ended: &Ended, rounds: usize) {
    assert_eq!((ended.code(), &*ended.stderr), (0, ""), "{ended:?}");
    let lines: Vec<_> = ended.stdout.lines().filter(|line| line.starts_with("  round ")).collect();
    assert_eq!(lines.len(), rounds, "{ended:?}");
    for (index, line) in lines.iter().enumerate() {
        assert!(line.starts_with(&format!("  round {}/{rounds}: ", index + 1)), "{line}");
        assert!(line.contains(" GB/s to all 3 readers together, 21/21 digests equal, "), "{line}");
        assert!(index == 0 || line.ends_with(", 0 page faults"), "{line}");
    }
    assert!(!ended.stdout.contains('\x1b'), "no terminal, no codes for one");
    assert!(ended.stdout.contains("  back from w1") && ended.stdout.contains("7/7 digests equal"), "{ended:?}");
}

#[test]
fn versions_are_published_into_the_same_memory() {
    let checkpoint = small("published");
    for variables in [&[][..], &[("FARCALL_TRANSPORT", "tcp")], &[("FARCALL_SHM", "off")]] {
        let ended = start(&["demo", "--weights", checkpoint.path(), "--rounds", "6"], variables).end();
        assert_published(&ended, 6);
    }
}

/// Whatever its header says, a file is refused in one line that names it, and no worker starts.
#[test]
fn a_file_with_a_lie_in_its_header_is_refused_before_any_worker_starts() {
    let float = |shape: &str, offsets| format!("{{{}}}", entry("a", "F32", shape, offsets));
    let overlap = format!("{{{},{}}}", entry("a", "F32", "[2]", [0, 8]), entry("b", "F32", "[2]", [4, 12]));
    let gap = format!("{{{},{}}}", entry("a", "F32", "[2]", [0, 8]), entry("b", "F32", "[2]", [12, 20]));
    let lies = [
        ("overlap", Checkpoint::with("overlap", &overlap, 12)),
        ("gap", Checkpoint::with("gap", &gap, 20)),
        ("beyond", Checkpoint::with("beyond", &float("[4]", [0, 16]), 8)),
        ("backwards", Checkpoint::with("backwards", &float("[2]", [8, 0]), 8)),
        ("length", Checkpoint::with("length", &float("[3]", [0, 8]), 8)),
        ("huge", Checkpoint::with("huge", &float("[4611686018427387904,4]", [0, 8]), 8)),
        ("more", Checkpoint::with("more", &float("[2]", [0, 8]), 9)),
        ("dtype", Checkpoint::with("dtype", &format!("{{{}}}", entry("a", "F99", "[2]", [0, 8])), 8)),
        ("json", Checkpoint::with("json", "{\"a\":", 8)),
        ("text", Checkpoint::of("text", b"this is no checkpoint at all, but some text")),
        ("cut", Checkpoint::of("cut", &1000_u64.to_le_bytes())),
        ("long", Checkpoint::of("long", &[&u64::MAX.to_le_bytes()[..], b"{}"].concat())),
        ("empty", Checkpoint::of("empty", b"")),
    ];
    for (name, file) in &lies {
        let ended = farcall(&["demo", "--weights", file.path()]);
        assert_eq!((ended.code(), &*ended.stdout), (1, ""), "{name}: {ended:?}");
        let line = ended.stderr.strip_suffix('\n').unwrap_or_default();
        assert!(
            line.starts_with("farcall: ") && line.contains(file.path()) && !line.contains('\n'),
            "{name}: {ended:?}"
        );
    }
    let ended = farcall(&["demo", "--weights", "/nowhere/model.safetensors"]);
    assert_eq!(ended.code(), 1);
    assert!(ended.stderr.starts_with("farcall: cannot open /nowhere/model.safetensors: "), "{ended:?}");
    let ended = farcall(&["demo", "--rounds", "3"]);
    assert_eq!(ended.code(), 2, "rounds of what? {ended:?}");
}

#[test]
fn ctrl_c_ends_all_of_it_without_a_word() {
    let checkpoint = small("interrupted");
    let run = start(&["demo", "--weights", checkpoint.path(), "--rounds", "100000"], &[]);
    eventually("a round is over", Duration::from_secs(30), || run.stdout().contains("  round 2/"));
    let workers = run.children();
    assert_eq!(workers.len(), 4);
    run.signal(Signal::INT);
    let ended = run.end();
    assert_eq!((ended.code(), &*ended.stderr), (130, ""), "{ended:?}");
    eventually("no worker is left", Duration::from_secs(10), || !workers.iter().any(|pid| lives(*pid)));
}
