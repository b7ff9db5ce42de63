//! `farcall bench`: its lines, its exit codes, and that nothing of it is left behind.

use std::time::Duration;

use rustix::process::Signal;

use crate::program::{Ended, eventually, farcall, lives, start};

/// Sizes and counts that take milliseconds.
const TINY: [&str; 10] = ["bench", "-b", "8", "-e", "64K", "-f", "8192", "-n", "12", "-w"];

fn tiny(more: &[&str]) -> Ended {
    let arguments: Vec<&str> = TINY.iter().chain(&["2"]).chain(more).copied().collect();
    farcall(&arguments)
}

/// The table's lines, without those behind `#`.
fn lines(ended: &Ended) -> Vec<Vec<String>> {
    let lines = ended.stdout.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

#[test]
fn every_operation_has_its_lines_and_the_data_is_right() {
    for more in
        [&[][..], &["--memory", "foreign", "--transport", "tcp"], &["--devices", "emulated:2", "--device", "cuda:1"]]
    {
        let ended = tiny(more);
        assert_eq!(ended.code(), 0, "{ended:?}");
        let lines = lines(&ended);
        let cells: Vec<(&str, &str)> = lines.iter().map(|line| (line[0].as_str(), line[1].as_str())).collect();
        let sized = ["sink", "read", "echo"].into_iter().flat_map(|op| [(op, "8"), (op, "65536")]);
        let expected: Vec<_> = [("call", "8")].into_iter().chain(sized).chain([("rate64", "8")]).collect();
        assert_eq!(cells, expected);
        let path = if more.contains(&"tcp") { "tcp" } else { "unix" };
        for line in &lines {
            assert_eq!((line[2].as_str(), line[9].as_str(), line[10].as_str()), ("12", path, "0"), "{line:?}");
            assert!(line[3].parse::<f64>().expect("a number") > 0.0);
        }
        assert!(ended.stdout.contains("# wrong: 0 OK"));
        assert_eq!(ended.stderr, "");
    }
}

/// The planted byte is found by each operation that moves data, wherever it is.
#[test]
fn a_wrong_byte_is_counted_and_the_bench_fails() {
    for more in [&[][..], &["--memory", "foreign"], &["--devices", "emulated:1", "--device", "cuda:0"]] {
        let ended = tiny(&[&["--plant-wrong-byte"], more].concat());
        assert_eq!(ended.code(), 1, "{ended:?}");
        for line in lines(&ended) {
            let has_data = matches!(line[0].as_str(), "sink" | "read" | "echo");
            assert_eq!(line[10] != "0", has_data, "{line:?}");
        }
        assert!(ended.stdout.contains("FAILED"));
    }
    let unchecked = tiny(&["--plant-wrong-byte", "--no-check"]);
    assert_eq!(unchecked.code(), 0, "{unchecked:?}");
}

#[test]
fn several_workers_answer_in_turns() {
    let ended = tiny(&["--local", "4", "--op", "echo,rate"]);
    assert_eq!((ended.code(), lines(&ended).len()), (0, 3), "{ended:?}");
}

#[test]
fn a_path_that_is_not_taken_is_code_3() {
    let ended = tiny(&["--require", "tcp"]);
    assert_eq!(ended.code(), 3, "{ended:?}");
    assert!(ended.stderr.contains("the path is unix"), "{}", ended.stderr);
    assert_eq!(tiny(&["--require", "unix", "--op", "call"]).code(), 0);
}

#[test]
fn wrong_usage_is_code_2_and_says_what_is_expected() {
    for (arguments, says) in [
        (&["--local", "1"][..], "at least 2 workers"),
        (&["-f", "1"], "a factor of at least 2"),
        (&["-b", "64", "-e", "8"], "the first at most the last"),
        (&["-b", "1.5M"], "a size such as 8, 64K"),
        (&["--spin", "on"], "never spin"),
        (&["--transport", "shmem"], "auto, tcp or unix is expected"),
        (&["--device", "gpu"], "or host"),
        (&["--devices", "4"], "emulated"),
        (&["--outstanding", "0"], "1..=4096"),
        (&["--op", "cal"], "call"),
    ] {
        let ended = farcall(&[&["bench"], arguments].concat());
        assert_eq!(ended.code(), 2, "{arguments:?}: {ended:?}");
        assert!(ended.stderr.contains(says), "{arguments:?}: {}", ended.stderr);
    }
}

/// A device that is not there is the workers' failure, and nobody waits for anybody.
#[test]
fn a_device_that_is_not_there_fails_the_bench() {
    let ended = tiny(&["--devices", "emulated:1", "--device", "cuda:7"]);
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert!(ended.stderr.contains("cuda:7"), "{}", ended.stderr);
}

#[test]
fn an_interrupt_ends_it_with_partial_results_and_no_process_left() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let run = start(&["bench", "--op", "call,sink", "-n", "1000000000"], &[]);
        let mut children = Vec::new();
        eventually("two workers run", Duration::from_secs(20), || {
            children = run.children();
            children.len() == 2
        });
        run.signal(signal);
        let ended = run.end();
        assert_eq!(ended.code(), code, "{ended:?}");
        assert!(ended.stdout.contains("# PARTIAL"), "{ended:?}");
        assert!(ended.stderr.contains("interrupted"), "{ended:?}");
        assert!(!children.iter().any(|pid| lives(*pid)), "{children:?}");
    }
}

/// Its workers end when their standard input does, which no signal can prevent.
#[test]
fn workers_end_with_a_bench_that_is_killed() {
    let run = start(&["bench", "--op", "call", "-n", "1000000000"], &[]);
    let mut children = Vec::new();
    eventually("two workers run", Duration::from_secs(20), || {
        children = run.children();
        children.len() == 2
    });
    run.signal(Signal::KILL);
    eventually("the workers end", Duration::from_secs(20), || !children.iter().any(|pid| lives(*pid)));
}
