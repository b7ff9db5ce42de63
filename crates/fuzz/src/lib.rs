//! Whether decoders stand any bytes: a check for each, inputs to start from, and random mutations of them.
//!
//! - [`TARGETS`]: the decoders, each with its check, its golden inputs and what it may allocate;
//! - [`Corpus`]: golden inputs, and those that a fuzzer found, stored in `fuzz/corpus`;
//! - [`mutate`]: the next input, from the corpus and a seed alone, so that a seed repeats a failure;
//! - [`CountingAllocator`]: how many bytes a check holds at once.
//!
//! The checks of decoders that are private to their crate are there (`farcall_transport::fuzzing`). The program of this
//! package runs mutations for a time; the tests run a fixed number; `fuzz/` lets libFuzzer choose, by what an input reaches.
//!
//! Invariant F1: no input makes a check panic, nor hold more than its target's bound, a multiple of the input's size.
//! Invariant F2: target, seed and corpus determine an input; an input determines what its check does.

mod corpus;
mod memory;
mod metadata;
mod mutate;
mod random;
mod schema;
mod target;

pub use corpus::{Corpus, folder};
pub use memory::CountingAllocator;
pub use mutate::mutate;
pub use random::Random;
pub use target::{TARGETS, Target, Verdict};
