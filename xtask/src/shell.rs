//! Programs run from the repository's root, with or without a time limit.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs, io};

use crate::Failure;

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    // Where cargo runs us from, which may be another checkout than the one that built this program.
    let here = env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map_or_else(|| here.clone(), Path::to_path_buf)
}

/// Where cargo puts what it builds.
pub(crate) fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        // Relative to where the user stands, as cargo takes it.
        Some(target) => std::path::absolute(&target).unwrap_or_else(|_| target.into()),
        None => root().join("target"),
    }
}

/// Where steps keep what they download and what programs print.
pub(crate) fn cache() -> io::Result<PathBuf> {
    let cache = target().join("xtask-cache");
    fs::create_dir_all(&cache)?;
    Ok(cache)
}

/// A command as it would be typed, and what runs it.
pub(crate) struct Shell {
    typed: String,
    command: Command,
}

impl Shell {
    /// A program with arguments without white space: `cargo fmt --all`.
    pub(crate) fn new(typed: &str) -> Self {
        let mut words = typed.split_whitespace();
        let mut command = match words.next() {
            // The toolchain that runs us, not the first one on the path.
            Some("cargo") => Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into())),
            program => Command::new(program.unwrap_or_default()),
        };
        command.args(words).current_dir(root()).env("CARGO_TARGET_DIR", target()).stdin(Stdio::null());
        Self { typed: typed.to_owned(), command }
    }

    /// Adds an argument, a path for instance.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        let text = argument.as_ref().to_string_lossy();
        let plain = text.chars().all(|c| c.is_alphanumeric() || "-_./+=:".contains(c));
        self.typed = if plain { format!("{} {text}", self.typed) } else { format!("{} {text:?}", self.typed) };
        self.command.arg(argument);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.typed = format!("{name}={value:?} {}", self.typed);
        self.command.env(name, value);
        self
    }

    /// A failure of this command, or of what was expected of it.
    pub(crate) fn failure(&self, what: impl Into<String>) -> Failure {
        Failure { what: what.into(), repeat: self.typed.clone() }
    }

    /// Runs it to its end, which must be a success. It prints where we print.
    pub(crate) fn run(mut self) -> Result<(), Failure> {
        println!("$ {}", self.typed);
        let status = self.command.status();
        self.expect_success(status)
    }

    /// Runs it to its end, which must be a success, and returns what it printed to standard output.
    pub(crate) fn output(mut self) -> Result<String, Failure> {
        println!("$ {}", self.typed);
        match self.command.stderr(Stdio::inherit()).output() {
            Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            Ok(output) => Err(self.failure(format!("it ended with {}", output.status))),
            Err(error) => Err(self.failure(format!("it could not be started: {error}"))),
        }
    }

    /// Runs it for `limit` at most, with all processes it starts, and returns what it printed to standard error.
    ///
    /// Standard error goes through a file: a process that outlives the command cannot hold up its reader.
    pub(crate) fn run_within(mut self, limit: Duration) -> Result<String, Failure> {
        println!("$ {}", self.typed);
        let started = cache().and_then(|cache| {
            let log = cache.join("stderr");
            let child = self.command.stderr(File::create(&log)?).process_group(0).spawn()?;
            Ok((child, log))
        });
        let (mut child, log) = match started {
            Ok(started) => started,
            Err(error) => return Err(self.failure(format!("it could not be started: {error}"))),
        };
        let status = wait_within(&mut child, limit);
        let mut stderr = Vec::new();
        let read = File::open(log).and_then(|mut log| log.read_to_end(&mut stderr));
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        print!("{stderr}");
        match (status, read) {
            (Ok(Some(status)), Ok(_)) if status.success() => Ok(stderr),
            (Ok(Some(status)), Ok(_)) => {
                let last = stderr.trim_end().lines().next_back().unwrap_or("nothing on standard error");
                Err(self.failure(format!("it ended with {status}: {last}")))
            }
            (Ok(None), _) => Err(self.failure(format!("it was still running after {} s", limit.as_secs()))),
            (Err(error), _) | (_, Err(error)) => Err(self.failure(format!("its end was not seen: {error}"))),
        }
    }

    fn expect_success(&self, status: io::Result<ExitStatus>) -> Result<(), Failure> {
        match status {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(self.failure(format!("it ended with {status}"))),
            Err(error) => Err(self.failure(format!("it could not be started: {error}"))),
        }
    }
}

/// The end of `child`, or `None` after `limit`: then it and all of its process group are killed.
fn wait_within(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            // The group is the child's own: it was started as its leader, and is not reaped yet.
            Command::new("kill").args(["-KILL", "--", &format!("-{}", child.id())]).status()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);

    fn sh(script: &str) -> Shell {
        Shell::new("sh -c").arg(script)
    }

    /// One test: its commands write to the same file.
    #[test]
    fn a_limited_command_passes_fails_or_is_killed_with_what_it_started() {
        assert_eq!(sh("echo word >&2").run_within(LONG).map_err(|failure| failure.what), Ok("word\n".to_owned()));

        let failure = sh("echo why >&2; exit 3").run_within(LONG).err().unwrap();
        assert_eq!(failure.what, "it ended with exit status: 3: why");
        assert_eq!(failure.repeat, "sh -c \"echo why >&2; exit 3\"");

        // The reader sees the end only once the child of the shell is dead too.
        let (mut reader, writer) = io::pipe().unwrap();
        let mut hanging = sh("sleep 1000 & wait");
        hanging.command.stdout(writer);
        let failure = hanging.run_within(Duration::from_millis(50)).err().unwrap();
        assert_eq!(failure.what, "it was still running after 0 s");
        reader.read_to_end(&mut Vec::new()).unwrap();
    }

    #[test]
    fn a_program_that_is_missing_is_a_failure() {
        let failure = Shell::new("no-such-program --at all").run().err().unwrap();
        assert!(failure.what.starts_with("it could not be started"), "{}", failure.what);
        assert_eq!(failure.repeat, "no-such-program --at all");
    }
}
