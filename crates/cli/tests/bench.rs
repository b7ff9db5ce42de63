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
        for line in &lines {
            let path = if more.contains(&"tcp") { "tcp" } else { "shm" };
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

/// Each row's limit is measured beside it, and each limit has its line; what cannot be measured would be said.
#[test]
fn limits_are_measured_and_given_as_ratios() {
    for (transport, spin, limit) in
        [("unix", "auto", "futex"), ("unix", "on", "polled word"), ("tcp", "off", "raw tcp")]
    {
        let more = ["--limits", "--op", "call,read,echo", "--transport", transport, "--spin", spin, "--format", "csv"];
        let ended = tiny(&more);
        assert_eq!(ended.code(), 0, "{ended:?}");
        for line in ended.stdout.lines().skip(1) {
            let fields: Vec<&str> = line.split(',').collect();
            assert!(fields[14].contains(limit), "{line}");
            let [p50, limit, ratio] = [6, 15, 16].map(|at| fields[at].parse::<f64>().expect("a number"));
            assert!((p50 / limit - ratio).abs() < 1e-3 * ratio.max(1.0), "{line}");
        }
    }
    let ended = tiny(&["--limits", "--op", "sink"]);
    for name in ["futex", "polled word", "memcpy", "memread", "raw unix", "raw tcp", "raw tcp 512K"] {
        assert!(ended.stdout.contains(&format!("# {name} ")), "{name}: {}", ended.stdout);
    }
    assert!(!ended.stdout.contains("skipped"), "{}", ended.stdout);
}

#[test]
fn json_and_csv_have_the_table_s_rows() {
    let json = tiny(&["--format", "json", "--repeat", "2", "--cpus", "0"]);
    let report: serde_json::Value = serde_json::from_str(&json.stdout).expect("JSON");
    assert_eq!((report["schema"].as_str(), report["complete"].as_bool()), (Some("farcall-bench/1"), Some(true)));
    let rows = report["rows"].as_array().expect("rows");
    assert_eq!((rows.len(), report["runs"].as_u64()), (8, Some(2)));
    for row in rows {
        assert_eq!((row["calls"].as_u64(), row["wrong"].as_u64()), (Some(24), Some(0)), "{row}");
        assert_eq!(row["runs_p50_us"].as_array().map(Vec::len), Some(2), "{row}");
        assert!(row["p99_us"].is_null(), "12 calls have no 99th percentile: {row}");
    }
    // The progress is not among the results.
    assert!(json.stderr.contains("run 2/2"), "{}", json.stderr);
    assert_eq!(tiny(&["--format", "json", "--quiet", "--op", "call"]).stderr, "");
    let csv = tiny(&["--format", "csv"]);
    let lines: Vec<&str> = csv.stdout.lines().collect();
    assert_eq!((lines.len(), lines[0].split(',').next()), (9, Some("op")));
}

#[test]
fn a_chart_and_a_page_are_written() {
    let path = |kind: &str| std::env::temp_dir().join(format!("farcall-bench-{}.{kind}", std::process::id()));
    let (svg, html) = (path("svg"), path("html"));
    let text = |path: &std::path::Path| path.to_str().expect("UTF-8").to_owned();
    let ended = tiny(&["--op", "sink,echo", "--limits", "--plot", &text(&svg), "--report", &text(&html)]);
    assert_eq!(ended.code(), 0, "{ended:?}");
    for path in [svg, html] {
        let text = std::fs::read_to_string(&path).expect("written");
        let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
        let document = roxmltree::Document::parse_with_options(&text, options).expect("well-formed");
        let curves = document.descendants().filter(|node| node.tag_name().name() == "polyline").count();
        assert_eq!(curves, 8, "latency and bandwidth of two operations and their limits: {text}");
        std::fs::remove_file(&path).expect("the file");
    }
    let nowhere = tiny(&["--op", "sink", "--plot", "/nowhere/chart.svg"]);
    assert_eq!(nowhere.code(), 1, "{nowhere:?}");
    assert!(nowhere.stderr.contains("--plot /nowhere/chart.svg: No such file"), "{nowhere:?}");
}

/// The baselines are made from what was measured, so that no machine is too slow for the test.
#[test]
fn a_regression_against_a_baseline_is_code_1() {
    let path = std::env::temp_dir().join(format!("farcall-baseline-{}.json", std::process::id()));
    let file = path.to_str().expect("UTF-8");
    let measured = tiny(&["--op", "call,sink", "--json", file]);
    assert_eq!(measured.code(), 0, "{measured:?}");
    let text = std::fs::read_to_string(&path).expect("written");
    let scaled = |factor: f64| {
        let mut report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        for row in report["rows"].as_array_mut().expect("rows") {
            for (field, factor) in [("p50_us", factor), ("calls_per_s", 1.0 / factor), ("gb_per_s", 1.0 / factor)] {
                if let Some(value) = row[field].as_f64() {
                    row[field] = (value * factor).into();
                }
            }
        }
        std::fs::write(&path, report.to_string()).expect("written");
    };
    scaled(1e6);
    let faster = tiny(&["--op", "call,sink", "--baseline", file]);
    assert_eq!(faster.code(), 0, "{faster:?}");
    assert!(faster.stdout.contains("# baseline: OK"), "{faster:?}");
    let missing = tiny(&["--op", "call", "--baseline", file]);
    assert_eq!(missing.code(), 1, "{missing:?}");
    assert!(missing.stdout.contains("65536 is MISSING"), "{missing:?}");
    scaled(1e-6);
    let slower = tiny(&["--op", "call,sink", "--baseline", file]);
    assert_eq!(slower.code(), 1, "{slower:?}");
    assert!(slower.stdout.contains("WORSE") && slower.stdout.contains("# baseline: REGRESSED"), "{slower:?}");
    std::fs::write(&path, "{}").expect("written");
    let foreign = tiny(&["--op", "call", "--baseline", file]);
    assert_eq!(foreign.code(), 2, "{foreign:?}");
    assert!(foreign.stderr.contains("farcall-bench/1 is expected"), "{foreign:?}");
    std::fs::remove_file(&path).expect("the file");
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
    assert!(ended.stderr.contains("the path is shm"), "{}", ended.stderr);
    assert_eq!(tiny(&["--require", "shm", "--op", "call"]).code(), 0);
    assert_eq!(tiny(&["--require", "shm", "--op", "sink"]).code(), 0);
}

#[test]
fn wrong_usage_is_code_2_and_says_what_is_expected() {
    for (arguments, says) in [
        (&["--local", "1"][..], "at least 2 workers"),
        (&["-f", "1"], "a factor of at least 2"),
        (&["-b", "64", "-e", "8"], "the first at most the last"),
        (&["-b", "1.5M"], "a size such as 8, 64K"),
        (&["--spin", "fast"], "auto, on, off"),
        (&["--transport", "shmem"], "auto, tcp or unix is expected"),
        (&["--device", "gpu"], "or host"),
        (&["--devices", "4"], "emulated"),
        (&["--outstanding", "0"], "1..=4096"),
        (&["--tolerance=-1"], "percent from 0 on"),
        (&["--cpus", "4096"], "there are the processors 0 to"),
        (&["--baseline", "/nowhere/base.json"], "/nowhere/base.json: No such file"),
        (&["--require", "rdma"], "cuda_ipc, shm, ucx, unix or tcp"),
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
