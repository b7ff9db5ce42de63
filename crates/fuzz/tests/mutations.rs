//! A fixed number of mutations of every decoder's corpus, memory counted; `cargo xtask fuzz` runs far more.

use farcall_fuzz::{Corpus, CountingAllocator, TARGETS, Target, mutate};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

#[track_caller]
fn stands_mutations(name: &str, count: u64) {
    let target = Target::named(name).expect("a target of this name");
    let corpus = Corpus::load(target).expect("a stored corpus");
    for (name, input) in corpus.inputs() {
        if let Err(why) = target.judge(input).outcome {
            panic!("{name} of the corpus: {why}");
        }
    }
    let mut decoded = 0;
    for seed in 0..count {
        match target.judge(&mutate(target, &corpus, seed)).outcome {
            Ok(decodes) => decoded += u64::from(decodes),
            Err(why) => panic!("{name}, seed {seed}: {why}"),
        }
    }
    // Else the mutations would test nothing but the first check.
    assert!((count / 100..count).contains(&decoded), "{decoded} of {count} mutations decode");
}

#[test]
fn header() {
    stands_mutations("header", 20_000);
}

#[test]
fn descriptors() {
    stands_mutations("descriptors", 20_000);
}

#[test]
fn frames() {
    stands_mutations("frames", 10_000);
}

#[test]
fn greeting() {
    stands_mutations("greeting", 20_000);
}

#[test]
fn metadata() {
    stands_mutations("metadata", 10_000);
}

#[test]
fn store() {
    stands_mutations("store", 20_000);
}

#[test]
fn schema() {
    stands_mutations("schema", 20_000);
}

#[test]
fn every_target_is_tested_here() {
    let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(names, ["header", "descriptors", "frames", "greeting", "metadata", "store", "schema"]);
}

/// F1: a decoder that panics or takes more than its bound is told of.
#[test]
fn panics_and_memory_beyond_the_bound_fail() {
    let with = |check| Target { check, memory_bytes: 1000, memory_bytes_per_byte: 10, ..TARGETS[0] };
    let outcome = |check, input: &[u8]| with(check).judge(input).outcome;
    assert_eq!(outcome(|_| panic!("at {}", 7), b""), Err("at 7".to_owned()));

    fn takes(bytes: usize) -> bool {
        std::hint::black_box(Vec::<u8>::with_capacity(bytes)).is_empty()
    }
    assert_eq!(outcome(|_| takes(1000), b""), Ok(true));
    let why = outcome(|_| takes(1001), b"").unwrap_err();
    assert_eq!(why, "1001 bytes were held for an input of 0, the bound is 1000");
    assert_eq!(outcome(|_| takes(1020), b"ab"), Ok(true), "ten more for each byte");
    // Held at once, not in all.
    assert_eq!(outcome(|_| takes(900) && takes(900), b""), Ok(true));
    fn grows(bytes: usize) -> bool {
        let mut vec = vec![0_u8; bytes / 2];
        vec.reserve_exact(bytes);
        std::hint::black_box(vec).len() == bytes / 2
    }
    assert!(outcome(|_| grows(1000), b"").is_err(), "the old and the new place of a vector");
}
