//! `farcall explain`: the way that it tells is the way that calls take.

use serde_json::Value;

use crate::program::{farcall, start};

fn explain(arguments: &[&str]) -> Value {
    let ended = farcall(&[&["explain"], arguments, &["--json"]].concat());
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"))
}

#[test]
fn the_way_that_is_told_is_the_way_that_a_bench_measures() {
    for transport in ["auto", "tcp", "unix"] {
        let told = explain(&["host", "host", "64K", "--transport", transport]);
        let path = told["taken"].as_str().expect("a way");
        let bench =
            ["bench", "--op", "sink", "-b", "64K", "-e", "64K", "-n", "3", "--transport", transport, "--require", path];
        let measured = farcall(&bench);
        assert_eq!(measured.code(), 0, "{told}: {measured:?}");
    }
}

#[test]
fn each_place_of_the_other_worker_has_its_reasons() {
    for (place, taken, why) in [
        ("--same-host", "shm", None),
        ("--other-host", "tcp", Some("on another host")),
        ("--other-namespace", "tcp", Some("another network namespace")),
        ("--other-user", "tcp", Some("runs as user")),
    ] {
        let told = explain(&["host", "host", "16MiB", place]);
        let chunks = if taken == "shm" { 0 } else { 4 };
        assert_eq!((told["taken"].as_str(), told["chunks"].as_u64()), (Some(taken), Some(chunks)), "{told}");
        let candidates = told["candidates"].as_array().expect("candidates");
        assert_eq!(candidates.iter().filter(|candidate| candidate["taken"] == true).count(), 1);
        for candidate in candidates {
            assert!(candidate["why"].as_str().is_some_and(|why| !why.is_empty()), "{candidate}");
        }
        if let Some(why) = why {
            let unix = candidates.iter().find(|candidate| candidate["channel"] == "unix").expect("unix");
            assert!(unix["why"].as_str().is_some_and(|said| said.contains(why)), "{unix}");
        }
    }
}

#[test]
fn lines_name_every_step_and_what_is_not_there() {
    let emulated = start(&["explain", "cuda:0", "cuda:1", "9M"], &[("FARCALL_DEVICES", "emulated:2")]).end();
    assert_eq!(emulated.code(), 0, "{emulated:?}");
    for line in [
        "-> shm",
        "1. copied from cuda:0 to cpu:0",
        "2. shm: read where it lies",
        "3. copied from cpu:0 to cuda:1",
        "cuda:0 is emulated",
    ] {
        assert!(emulated.stdout.contains(line), "{line}: {}", emulated.stdout);
    }
    let absent = start(&["explain", "cuda:77", "host", "8"], &[]).end();
    assert!(absent.stdout.contains("note: cuda:77 is not on this machine"), "{absent:?}");
}

#[test]
fn exit_codes_tell_no_way_unmet_requirements_and_wrong_usage() {
    let code = |arguments: &[&str]| farcall(&[&["explain"], arguments].concat()).code();
    assert_eq!(code(&["host", "host", "8", "--require", "shm"]), 0);
    assert_eq!(code(&["host", "host", "8", "--require", "tcp"]), 3);
    assert_eq!(code(&["host", "host", "8K", "--require", "shm"]), 0);
    assert_eq!(code(&["host", "host", "8", "--other-host", "--transport", "unix"]), 1, "no way");
    assert_eq!(code(&["gpu", "host", "8"]), 2);
    assert_eq!(code(&["host", "host", "8MB5"]), 2);
    assert_eq!(code(&["host", "host", "8", "--other-host", "--other-user"]), 2);
}
