//! The decoders, and how an input is judged.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use farcall_transport::fuzzing::{self, Check, Golden};

use crate::memory::peak_bytes;
use crate::{metadata, schema};

/// One decoder.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name on the command line, and its folder in the corpus.
    pub name: &'static str,
    /// Panics where the decoder breaks a promise; else whether the input decodes.
    pub check: Check,
    /// Inputs to start from: small, and between them every variant.
    pub golden: fn() -> Vec<Golden>,
    /// Inputs grow up to this size.
    pub input_bytes_max: usize,
    /// What a check may hold at once, whatever the input: the check's own needs, for it decodes several times.
    pub memory_bytes: usize,
    /// And for each byte of the input.
    pub memory_bytes_per_byte: usize,
    /// Whether inputs are frames with headers, whose fields are worth changing as such.
    pub framed: bool,
}

/// Every decoder of bytes that a peer writes, and the parser of texts that people do.
pub const TARGETS: &[Target] = &[
    Target {
        name: "header",
        check: fuzzing::header,
        golden: fuzzing::golden_headers,
        input_bytes_max: 64,
        memory_bytes: 4 << 10,
        memory_bytes_per_byte: 0,
        framed: true,
    },
    Target {
        name: "descriptors",
        check: fuzzing::descriptors,
        golden: fuzzing::golden_descriptors,
        input_bytes_max: 1024,
        memory_bytes: 8 << 10,
        memory_bytes_per_byte: 0,
        framed: false,
    },
    Target {
        name: "frames",
        check: fuzzing::frames,
        golden: fuzzing::golden_frames,
        input_bytes_max: 4096,
        memory_bytes: 64 << 10,
        memory_bytes_per_byte: 128,
        framed: true,
    },
    Target {
        name: "greeting",
        check: fuzzing::greeting,
        golden: fuzzing::golden_greetings,
        input_bytes_max: 1024,
        memory_bytes: 32 << 10,
        memory_bytes_per_byte: 32,
        framed: true,
    },
    Target {
        name: "metadata",
        check: metadata::metadata,
        golden: metadata::golden,
        input_bytes_max: 4096,
        memory_bytes: 32 << 10,
        memory_bytes_per_byte: 256,
        framed: false,
    },
    Target {
        name: "store",
        check: fuzzing::store,
        golden: fuzzing::golden_store,
        input_bytes_max: 4096,
        memory_bytes: 32 << 10,
        memory_bytes_per_byte: 256,
        framed: false,
    },
    Target {
        name: "schema",
        check: schema::schema,
        golden: schema::golden,
        input_bytes_max: 1024,
        memory_bytes: 32 << 10,
        memory_bytes_per_byte: 512,
        framed: false,
    },
];

/// What became of an input.
#[derive(Debug)]
pub struct Verdict {
    /// Whether it decodes, or why its target failed.
    pub outcome: Result<bool, String>,
    /// Held at once; 0 unless [`crate::CountingAllocator`] is the program's.
    pub peak_bytes: usize,
    /// How long it took.
    pub took: Duration,
}

impl Target {
    /// The target of that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Checks `input`; a panic is an outcome (F1).
    #[must_use]
    pub fn judge(&self, input: &[u8]) -> Verdict {
        let start = Instant::now();
        // A failure ends the run: nothing that a panic left half done is used again.
        let (result, peak_bytes) = peak_bytes(|| catch_unwind(AssertUnwindSafe(|| (self.check)(input))));
        let took = start.elapsed();
        let bound = self.memory_bytes + input.len() * self.memory_bytes_per_byte;
        let outcome = match result {
            Ok(_) if peak_bytes > bound => {
                Err(format!("{peak_bytes} bytes were held for an input of {}, the bound is {bound}", input.len()))
            }
            Ok(decoded) => Ok(decoded),
            Err(panic) => Err(match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
                (Some(text), _) => text.clone(),
                (_, Some(text)) => (*text).to_owned(),
                _ => "a panic without a text".to_owned(),
            }),
        };
        Verdict { outcome, peak_bytes, took }
    }

    /// As [`Target::judge`], for a fuzzer that watches for panics.
    ///
    /// # Panics
    /// If the target fails.
    pub fn expect_sound(&self, input: &[u8]) -> bool {
        match self.judge(input).outcome {
            Ok(decoded) => decoded,
            Err(why) => panic!("{}: {why}", self.name),
        }
    }
}
