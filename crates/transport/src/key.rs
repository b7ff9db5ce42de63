//! The job's key: the secret that the workers of one job share, and where it comes from.
//!
//! Not here: how it is proven (`auth`). It proves membership in the job, nothing finer: whoever has it can claim any name in
//! the group. It encrypts nothing.
//! Invariant K1: a key is shown by [`JobKey::to_hex`] alone: no `Debug` output, error or log line has a part of it.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};

/// Random bytes for one use.
pub(crate) type Nonce = [u8; 32];

/// The secret that all workers of a job have and nobody else has. Clones share it.
///
/// It must be random: who listens to a handshake can try guesses at home. `openssl rand -hex 32` makes one, and so does
/// [`JobKey::random`].
#[derive(Clone)]
pub struct JobKey(Arc<Secret>);

struct Secret(Vec<u8>);

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        // Else the optimizer sees that nobody reads the zeros.
        std::hint::black_box(&self.0);
    }
}

impl fmt::Debug for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JobKey(…)")
    }
}

/// Why a key cannot be had. No text shows what was given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum KeyError {
    /// So short that it can be guessed.
    #[error("a job key of {bytes} bytes, at least {} are needed; `openssl rand -hex 32` makes one", JobKey::BYTES_MIN)]
    Short { bytes: usize },
    /// Not written in hexadecimal digits.
    #[error("not an even number of hexadecimal digits; `openssl rand -hex 32` makes a job key")]
    NotHex,
    /// Other users can read the file, or replace what is in it.
    #[error("{path} has mode {mode:03o}, others could read it; run: chmod 600 {path}", path = .path.display())]
    Exposed { path: PathBuf, mode: u32 },
    /// The file is another user's.
    #[error("{path} belongs to user {uid}, not to this process's user; run: chown {own} {path}", path = .path.display())]
    Owner { path: PathBuf, uid: u32, own: u32 },
    /// A directory, a pipe or a device, or too large for a key.
    #[error("{path} is not a file of at most {} bytes", JobKey::FILE_BYTES_MAX, path = .path.display())]
    NotAFile { path: PathBuf },
    /// The file cannot be read.
    #[error("{path}: {source}", path = .path.display())]
    Read { path: PathBuf, source: io::Error },
    /// The system gave no random bytes.
    #[error("no random bytes: {source}")]
    Random { source: io::Error },
}

impl JobKey {
    /// The fewest bytes of a key.
    pub const BYTES_MIN: usize = 16;
    const FILE_BYTES_MAX: u64 = 16 << 10;

    /// A key of these bytes, which must be random.
    ///
    /// # Errors
    /// [`KeyError::Short`] for fewer than [`Self::BYTES_MIN`].
    pub fn new(secret: impl Into<Vec<u8>>) -> Result<Self, KeyError> {
        // Owned at once: it is overwritten even when it is refused.
        let secret = Secret(secret.into());
        let bytes = secret.0.len();
        if bytes < Self::BYTES_MIN { Err(KeyError::Short { bytes }) } else { Ok(Self(Arc::new(secret))) }
    }

    /// A new key of 32 random bytes, as launchers make one for the workers they start.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn random() -> Result<Self, KeyError> {
        Self::new(fresh().map_err(|source| KeyError::Random { source })?)
    }

    /// A key written in hexadecimal digits, as `FARCALL_KEY` has it.
    ///
    /// # Errors
    /// [`KeyError::NotHex`], [`KeyError::Short`].
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
        let pair = |pair: &[u8]| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        };
        let bytes: Option<Vec<u8>> = text.trim_ascii().as_bytes().chunks(2).map(pair).collect();
        Self::new(bytes.ok_or(KeyError::NotHex)?)
    }

    /// A key in a file, in hexadecimal digits, as `FARCALL_KEY_FILE` names it.
    ///
    /// # Errors
    /// [`KeyError::Exposed`] when group or others have any access to it, [`KeyError::Owner`] when it is neither this user's
    /// nor root's; else what is wrong with the file or with what it says.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        Self::from_hex(&read_secret(path)?)
    }

    /// The key in hexadecimal digits, for the environment of a child process. Print it nowhere.
    #[must_use]
    pub fn to_hex(&self) -> String {
        self.0.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn secret(&self) -> &[u8] {
        &self.0.0
    }
}

/// The text of a small file that nobody but this user, or root, can read or write.
pub(crate) fn read_secret(path: &Path) -> Result<String, KeyError> {
    let read = |source: io::Error| KeyError::Read { path: path.to_owned(), source };
    // Not to be kept waiting by a pipe. What is asked and what is read is this descriptor's file, whatever the path
    // comes to name meanwhile.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| read(error.into()))?;
    let stat = rustix::fs::fstat(&file).map_err(|error| read(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(KeyError::NotAFile { path: path.to_owned() });
    }
    let (mode, own) = (stat.st_mode & 0o777, rustix::process::geteuid().as_raw());
    if mode & 0o077 != 0 {
        return Err(KeyError::Exposed { path: path.to_owned(), mode });
    }
    if stat.st_uid != own && stat.st_uid != 0 {
        return Err(KeyError::Owner { path: path.to_owned(), uid: stat.st_uid, own });
    }
    let mut text = String::new();
    let mut file = std::fs::File::from(file).take(JobKey::FILE_BYTES_MAX + 1);
    let read_bytes = file.read_to_string(&mut text).map_err(read)?;
    if read_bytes as u64 > JobKey::FILE_BYTES_MAX {
        return Err(KeyError::NotAFile { path: path.to_owned() });
    }
    Ok(text)
}

/// Fresh random bytes.
pub(crate) fn fresh() -> io::Result<Nonce> {
    let mut bytes = [0; 32];
    // At most 256 bytes come whole, whatever signals arrive.
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const HEX: &str = "000102030405060708090a0b0c0d0e0fF0";

    #[test]
    fn hexadecimal_digits_are_read_and_written() {
        let key = JobKey::from_hex(&format!("  {HEX}\n")).unwrap();
        assert_eq!(key.secret(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0xf0]);
        assert_eq!(key.to_hex(), HEX.to_lowercase());
        let [one, other] = [(); 2].map(|()| JobKey::random().unwrap());
        assert_eq!(one.secret().len(), 32);
        assert_ne!(one.secret(), other.secret());
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_shown() {
        for (text, expected) in [
            ("", "a job key of 0 bytes, at least 16 are needed"),
            ("5ec2e7", "a job key of 3 bytes"),
            ("5ec2e7b", "not an even number of hexadecimal digits"),
            ("5ec2e7 5ec2e75ec2e75ec2e75ec2e75ec2e7", "hexadecimal"),
            ("5ec2e7é5ec2e75ec2e75ec2e75ec2e75ec2e7", "hexadecimal"),
            ("0x5ec2e75ec2e75ec2e75ec2e75ec2e75ec2e7", "hexadecimal"),
        ] {
            let error = JobKey::from_hex(text).unwrap_err();
            assert!(error.to_string().contains(expected), "{text:?}: {error}");
            assert!(!format!("{error} {error:?}").contains("5ec2e7"), "{error:?}");
        }
    }

    /// K1.
    #[test]
    fn debug_output_shows_no_key() {
        assert_eq!(format!("{:?}", JobKey::from_hex(HEX).unwrap()), "JobKey(…)");
    }

    #[test]
    fn a_file_is_read_only_if_nobody_else_can() {
        let path = std::env::temp_dir().join(format!("farcall-key-{}", std::process::id()));
        let with = |text: &str, mode: u32| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            JobKey::from_file(&path)
        };
        for mode in [0o600, 0o400] {
            assert_eq!(with(&format!("{HEX}\n"), mode).unwrap().to_hex(), HEX.to_lowercase());
        }
        for mode in [0o640, 0o604, 0o620, 0o602, 0o610, 0o644] {
            let error = with(HEX, mode).unwrap_err().to_string();
            assert!(error.contains(&format!("mode {mode:o}")) && error.contains("chmod 600"), "{error}");
        }
        assert!(matches!(with("neither", 0o600), Err(KeyError::NotHex)));
        assert!(matches!(with(&"00".repeat(8193), 0o600), Err(KeyError::NotAFile { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(JobKey::from_file(&path), Err(KeyError::Read { .. })));
        // A pipe that nobody writes to must not be waited for.
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(matches!(JobKey::from_file(&path), Err(KeyError::NotAFile { .. })));
        std::fs::remove_file(&path).unwrap();
    }
}
