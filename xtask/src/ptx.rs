//! The kernels' PTX: `cargo xtask ptx` writes it, `cargo xtask ptx --check` compares it.
//!
//! Every `kernels/NAME.cu` becomes `kernels/ptx/NAME.TARGET.ptx` for each of [`TARGETS`]. The text is checked in, so that
//! building farcall needs no compiler of NVIDIA's; a pinned one makes the same text everywhere.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use crate::nvrtc::Compiler;
use crate::shell::{self, Shell};
use crate::wheel::{Missing, Wheel};
use crate::{Failure, Outcome, StepResult};

/// 12.8 writes PTX 8.7, which drivers from 570 on take; a later one would ask for a later driver.
const NVRTC: Wheel = Wheel {
    requirement: "nvidia-cuda-nvrtc-cu12==12.8.93",
    sha256: "a7756528852ef889772a84c6cd89d41dfa74667e24cca16bb31f8f061e3e9994",
    file: "nvidia_cuda_nvrtc_cu12-12.8.93-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl",
    members: &[(LIBRARY, 104_487_248), ("nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.8", 6_338_504)],
};
const LIBRARY: &str = "nvidia/cuda_nvrtc/lib/libnvrtc.so.12";

/// Turing; Ampere, with bf16 conversions; Ada, with f8 conversions. Drivers compile the last for later GPUs.
const TARGETS: [&str; 3] = ["compute_75", "compute_80", "compute_89"];

/// The same result as on a CPU, bit for bit: a product and a sum are rounded each, and nothing is approximated.
const OPTIONS: [&str; 2] = ["--fmad=false", "--std=c++17"];

/// File names in `kernels/ptx` with their texts.
type Texts = BTreeMap<String, String>;

/// `cargo xtask ptx` writes; `--check` is a step of its own.
pub(crate) fn run(options: &[String]) -> StepResult {
    match options {
        [] => write(),
        _ => Err(Shell::new("cargo xtask ptx").failure("it takes no option but --check")),
    }
}

/// Writes the PTX of every kernel, and removes that of kernels which are gone.
fn write() -> StepResult {
    let Some(compiled) = compile()? else { return Ok(Outcome::Skipped(NOT_HERE.to_owned())) };
    let folder = shell::root().join("kernels/ptx");
    let repeat = Shell::new("cargo xtask ptx");
    let failed = |error: io::Error| repeat.failure(format!("kernels/ptx: {error}"));
    fs::create_dir_all(&folder).map_err(failed)?;
    for name in checked_in(&folder).map_err(failed)?.into_keys().filter(|name| !compiled.contains_key(name)) {
        fs::remove_file(folder.join(&name)).map_err(failed)?;
        println!("removed {name}");
    }
    for (name, text) in &compiled {
        fs::write(folder.join(name), text).map_err(failed)?;
        println!("{:>6} bytes  {name}", text.len());
    }
    Ok(Outcome::Passed)
}

/// Compiles every kernel for every target, and compares with what is checked in.
pub(crate) fn check() -> StepResult {
    let Some(compiled) = compile()? else { return Ok(Outcome::Skipped(NOT_HERE.to_owned())) };
    let rewrite = Shell::new("cargo xtask ptx");
    let present = checked_in(&shell::root().join("kernels/ptx"));
    let present = present.map_err(|error| rewrite.failure(format!("kernels/ptx: {error}")))?;
    let drift = drift(&compiled, &present);
    if drift.is_empty() {
        println!("{} files are what their sources give; not run on a GPU by this step", compiled.len());
        return Ok(Outcome::Passed);
    }
    Err(rewrite.failure(format!("kernels/ptx is not what kernels/*.cu give: {}", drift.join(", "))))
}

/// The wheel's library is for this machine only; the texts it makes are the same for all.
const NOT_HERE: &str = "the pinned NVRTC runs on x86_64 only";

/// The PTX of every kernel for every target; `None` where the compiler cannot run.
fn compile() -> Result<Option<Texts>, Failure> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(None);
    }
    let folder = NVRTC.folder().map_err(|missing| match missing {
        Missing::NotDownloaded(Failure { what, repeat }) => {
            Failure { what: format!("NVRTC is needed once from the package index, and did not come: {what}"), repeat }
        }
        Missing::Broken(failure) => failure,
    })?;
    let repeat = Shell::new("cargo xtask ptx");
    let compiler = Compiler::load(&folder.join(LIBRARY)).map_err(|error| repeat.failure(error))?;
    let sources = texts(&shell::root().join("kernels"), "cu");
    let sources = sources.map_err(|error| repeat.failure(format!("kernels: {error}")))?;
    let mut compiled = Texts::new();
    for (file, source) in &sources {
        let name = file.trim_end_matches(".cu");
        for target in TARGETS {
            let architecture = format!("--gpu-architecture={target}");
            let options: Vec<&str> = [architecture.as_str()].into_iter().chain(OPTIONS).collect();
            let ptx = compiler.ptx(file, source, &options);
            let ptx = ptx.map_err(|error| repeat.failure(format!("kernels/{file} for {target}: {error}")))?;
            compiled.insert(format!("{name}.{target}.ptx"), ptx);
        }
    }
    if compiled.is_empty() { Err(repeat.failure("there is no kernels/*.cu")) } else { Ok(Some(compiled)) }
}

fn checked_in(folder: &Path) -> io::Result<Texts> {
    texts(folder, "ptx")
}

/// The files of `folder` with this extension.
fn texts(folder: &Path, extension: &str) -> io::Result<Texts> {
    let mut texts = Texts::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|found| found == extension) {
            texts.insert(entry.file_name().to_string_lossy().into_owned(), fs::read_to_string(entry.path())?);
        }
    }
    Ok(texts)
}

/// What differs between what was compiled and what is there, a phrase each.
fn drift(compiled: &Texts, present: &Texts) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = compiled.keys().chain(present.keys()).collect();
    let differing = names.into_iter().filter_map(|name| match (compiled.get(name), present.get(name)) {
        (Some(_), None) => Some(format!("{name} is missing")),
        (None, Some(_)) => Some(format!("{name} has no source")),
        (Some(ours), Some(theirs)) if ours != theirs => {
            let same = ours.lines().zip(theirs.lines()).take_while(|(ours, theirs)| ours == theirs).count();
            Some(format!("{name} differs from line {}", same + 1))
        }
        _ => None,
    });
    differing.collect()
}

/// Of the text only: not run on a GPU. That the text is what its source gives is `cargo xtask ptx --check`'s business.
#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Texts {
        checked_in(&shell::root().join("kernels/ptx")).unwrap()
    }

    /// The directive `name` of a PTX text.
    fn directive<'a>(text: &'a str, name: &str) -> &'a str {
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim()
    }

    #[test]
    fn every_kernel_has_the_ptx_of_every_target() {
        let sources = texts(&shell::root().join("kernels"), "cu").unwrap();
        let expected: Vec<String> = sources
            .keys()
            .flat_map(|file| TARGETS.map(|target| format!("{}.{target}.ptx", file.trim_end_matches(".cu"))))
            .collect();
        assert!(!expected.is_empty());
        assert_eq!(all().into_keys().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn each_text_is_for_its_target_in_a_version_that_drivers_from_570_take() {
        for (name, text) in all() {
            let target = name.split('.').nth(1).unwrap().replace("compute", "sm");
            assert_eq!(directive(&text, ".target"), target, "{name}");
            assert_eq!(directive(&text, ".version"), "8.7", "{name}");
            assert_eq!(directive(&text, ".address_size"), "64", "{name}");
        }
    }

    /// Names are not mangled, and the parameters have the sizes that a launch passes.
    #[test]
    fn entries_and_parameters_are_those_of_the_sources() {
        for (name, text) in all() {
            let (kernel, _) = name.split_once('.').unwrap();
            let (_, declared) = text.split_once(".visible .entry ").unwrap();
            assert!(!declared.contains(".visible .entry"), "{name} has one entry");
            let (signature, _) = declared.split_once(')').unwrap();
            let (entry, parameters) = signature.split_once('(').unwrap();
            let types: Vec<_> = parameters.split(',').map(|one| one.split_whitespace().nth(1).unwrap()).collect();
            let expected: (_, &[_]) = match kernel {
                "delay" => ("farcall_delay", &[".u64"]),
                "fill" => ("farcall_fill", &[".u64", ".u8", ".u64"]),
                other => panic!("add {other} to this test"),
            };
            assert_eq!((entry, types.as_slice()), expected, "{name}");
        }
    }

    #[test]
    fn the_instructions_that_the_sources_are_about_are_there() {
        for (name, text) in all() {
            let instruction = if name.starts_with("delay.") { "%globaltimer" } else { "st.global.v4.u32" };
            assert!(name.starts_with("delay.") || name.starts_with("fill."), "add {name} to this test");
            assert!(text.contains(instruction), "{instruction} in {name}");
            assert!(!text.contains("fma."), "a product and a sum are rounded each: {name}");
        }
    }

    #[test]
    fn drift_names_what_is_missing_left_over_or_different() {
        let texts = |list: &[(&str, &str)]| list.iter().map(|(name, text)| ((*name).into(), (*text).into())).collect();
        let compiled: Texts = texts(&[("a", "1\n2\n3"), ("b", "1"), ("c", "1"), ("e", "1\n2")]);
        let present: Texts = texts(&[("a", "1\n2\nx"), ("b", "1"), ("d", "1"), ("e", "1")]);
        let expected = ["a differs from line 3", "c is missing", "d has no source", "e differs from line 2"];
        assert_eq!(drift(&compiled, &present), expected);
        assert!(drift(&compiled, &compiled).is_empty());
    }
}
