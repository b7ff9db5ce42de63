//! Stored inputs: `fuzz/corpus/TARGET/NAME`, a file each.

use std::path::PathBuf;
use std::{fs, io};

use crate::{Random, Target};

/// A target's inputs: the golden ones, and those that libFuzzer found to reach something new.
#[derive(Debug)]
pub struct Corpus {
    inputs: Vec<(String, Vec<u8>)>,
}

/// Where the corpus of `target` lies, in the checkout that this was built from.
#[must_use]
pub fn folder(target: &Target) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus")).join(target.name)
}

impl Corpus {
    /// Reads the stored inputs, in the order of their names.
    ///
    /// # Errors
    /// The file system's; and `NotFound` if there are none.
    pub fn load(target: &Target) -> io::Result<Self> {
        let folder = folder(target);
        let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", folder.display()));
        let mut inputs = Vec::new();
        for entry in fs::read_dir(&folder).map_err(at)? {
            let entry = entry.map_err(at)?;
            inputs.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).map_err(at)?));
        }
        inputs.sort();
        if inputs.is_empty() { Err(at(io::ErrorKind::NotFound.into())) } else { Ok(Self { inputs }) }
    }

    /// Writes the golden inputs of `target`, in place of those that were there; gives their number.
    ///
    /// # Errors
    /// The file system's.
    pub fn write_golden(target: &Target) -> io::Result<usize> {
        let folder = folder(target);
        fs::create_dir_all(&folder)?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(GOLDEN) {
                fs::remove_file(entry.path())?;
            }
        }
        let golden = golden(target);
        golden.iter().try_for_each(|(name, bytes)| fs::write(folder.join(name), bytes))?;
        Ok(golden.len())
    }

    /// An input to change: as often a golden one, most of which decode, as a find, most of which do not.
    pub(crate) fn one(&self, random: &mut Random) -> &[u8] {
        let golden = self.inputs.partition_point(|(name, _)| name.as_str() < GOLDEN);
        let (finds, golden) = self.inputs.split_at(golden);
        let from = if finds.is_empty() || (!golden.is_empty() && random.below(2) == 0) { golden } else { finds };
        &random.one_of(from).1
    }

    /// Each with its file's name.
    #[must_use]
    pub fn inputs(&self) -> &[(String, Vec<u8>)] {
        &self.inputs
    }
}

/// What the file names of golden inputs start with; the others are named by their content, in hexadecimal digits.
const GOLDEN: &str = "golden-";

fn golden(target: &Target) -> Vec<(String, Vec<u8>)> {
    (target.golden)().into_iter().map(|(name, bytes)| (format!("{GOLDEN}{name}"), bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TARGETS;

    /// A change of a format changes its golden inputs: `cargo xtask fuzz --write-golden` stores them.
    #[test]
    fn golden_inputs_are_stored() {
        for target in TARGETS {
            let corpus = Corpus::load(target).unwrap();
            let stored = corpus.inputs.into_iter().filter(|(name, _)| name.starts_with(GOLDEN));
            let mut expected = golden(target);
            expected.sort();
            assert_eq!(stored.collect::<Vec<_>>(), expected, "{}", target.name);
        }
    }
}
