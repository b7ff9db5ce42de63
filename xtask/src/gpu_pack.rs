//! What a machine with a GPU needs to run the device suite and the costs, and nothing else: programs and one script.
//!
//! It is built here, tried here against the fake driver, and carried there. Figures of that trial are thrown away.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::shell::{self, Shell};
use crate::steps::fake_driver;
use crate::{Outcome, StepResult};

const SCRIPT: &str = include_str!("gpu-run.sh");
/// All of the pack: what can be carried to a lent machine at a time.
const BYTES_MAX: u64 = 64 << 20;
/// The trial; the script itself bounds each of its steps.
const TRIAL_MAX: Duration = Duration::from_secs(480);

/// Builds the pack, checks its size, and runs all of it against the fake driver.
pub(crate) fn gpu_pack() -> StepResult {
    let folder = shell::target().join("gpu-pack");
    let repeat = || Shell::new("cargo xtask gpu-pack");
    let no_file = |error: io::Error| repeat().failure(error.to_string());
    // Figures without assertions, and tests with them.
    Shell::new("cargo build --release -p farcall-benches --bin gpu").run()?;
    let built = Shell::new(
        "cargo test --profile device -p farcall-device --features mutants --test suite --no-run --message-format json",
    );
    let suite = executable(&built.output()?).ok_or_else(|| repeat().failure("cargo named no suite"))?;
    let commit = Shell::new("git rev-parse HEAD").output().unwrap_or_else(|_| "unknown".to_owned());
    write(&folder, &suite, commit.trim()).map_err(no_file)?;
    let bytes = size_of(&folder).map_err(no_file)?;
    println!("{:.1} MiB in {}", bytes as f64 / f64::from(1 << 20), folder.display());
    if bytes > BYTES_MAX {
        return Err(repeat().failure(format!("the pack has {bytes} bytes, more than {BYTES_MAX}")));
    }
    trial(&folder)
}

fn write(folder: &Path, suite: &Path, commit: &str) -> io::Result<()> {
    // Whatever an earlier pack left is not part of this one.
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    fs::copy(shell::target().join("release/gpu"), folder.join("gpu"))?;
    fs::copy(suite, folder.join("suite"))?;
    fs::write(folder.join("run.sh"), SCRIPT)?;
    fs::write(folder.join("commit"), commit)?;
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(folder.join("run.sh"), fs::Permissions::from_mode(0o755))
}

fn size_of(folder: &Path) -> io::Result<u64> {
    fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}

/// The test program that cargo's messages name.
fn executable(messages: &str) -> Option<PathBuf> {
    let path = messages.lines().find_map(|line| line.split_once("\"executable\":\"")?.1.split('"').next())?;
    Some(path.into())
}

/// The whole script against the fake driver, with few rounds; then without a driver, which it must say.
fn trial(folder: &Path) -> StepResult {
    let driver = fake_driver()?;
    let results = shell::target().join("gpu-pack-trial");
    let no_file = |error: io::Error| Shell::new("cargo xtask gpu-pack").failure(error.to_string());
    if results.exists() {
        fs::remove_dir_all(&results).map_err(no_file)?;
    }
    let script = folder.join("run.sh");
    let run = || {
        let run = Shell::new("sh").arg(&script).env("OUT", &results.to_string_lossy()).env("QUICK", "--quick");
        run.env("LD_LIBRARY_PATH", &driver)
    };
    run().run_within(TRIAL_MAX)?;
    let read = |name: &str| fs::read_to_string(results.join(name)).map_err(no_file);
    let (steps, figures, suite) = (read("steps.jsonl")?, read("gpu.jsonl")?, read("suite.log")?);
    for subject in ["capability", "driver", "host", "latency", "copies", "alloc"] {
        if !figures.contains(&format!("\"subject\":\"{subject}\"")) {
            return Err(run().failure(format!("no figure of {subject}")));
        }
    }
    if !figures.contains("unsupported(801)") || steps.matches("\"exit\":0").count() != 7 {
        return Err(run().failure("a refusal is not reported, or a step did not pass"));
    }
    if suite.contains("skipped:") || !suite.contains(" 0 failed") {
        return Err(run().failure("the suite skipped or failed"));
    }
    let absent = Shell::new("sh").arg(&script).env("OUT", &results.join("absent").to_string_lossy());
    let absent = absent.env("LD_LIBRARY_PATH", "");
    match absent.output() {
        Err(failure) if failure.what.contains("exit status: 3") => Ok(Outcome::Passed),
        Err(failure) => Err(failure),
        // A machine with a GPU: the script ran all of it.
        Ok(_) => Ok(Outcome::Passed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_is_found_among_cargos_messages() {
        let messages =
            "{\"reason\":\"compiler-artifact\",\"executable\":null}\n{\"executable\":\"/t/suite-1\",\"fresh\":true}\n";
        assert_eq!(executable(messages), Some("/t/suite-1".into()));
    }

    #[test]
    fn the_scripts_limits_stay_under_eight_minutes() {
        let limits =
            SCRIPT.lines().filter_map(|line| line.strip_prefix("step ")?.split(' ').nth(1)?.parse::<u64>().ok());
        let sum: u64 = limits.sum();
        assert!((1..=480).contains(&sum), "{sum} s");
    }
}
