//! Checkpoints in the safetensors format: mapped, checked, and copied once into memory that farcall recycles.
//!
//! Invariant: what a header says is compared with the file before any of it is believed; the error names the file, and the tensor.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use farcall::prelude::*;
use farcall::{Param, TensorMut};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::Failure;

fn dtype(dtype: Dtype) -> Result<DType, Failure> {
    Ok(match dtype {
        Dtype::BOOL => DType::Bool,
        Dtype::U8 => DType::U8,
        Dtype::I8 => DType::I8,
        Dtype::U16 => DType::U16,
        Dtype::I16 => DType::I16,
        Dtype::U32 => DType::U32,
        Dtype::I32 => DType::I32,
        Dtype::U64 => DType::U64,
        Dtype::I64 => DType::I64,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        Dtype::F8_E4M3 => DType::F8E4M3,
        Dtype::F8_E5M2 => DType::F8E5M2,
        other => return Err(format!("dtype {other:?} is not one of farcall's").into()),
    })
}

fn map(file: &Path) -> Result<Mmap, Failure> {
    let opened = File::open(file).map_err(|error| format!("cannot open {}: {error}", file.display()))?;
    #[expect(unsafe_code, reason = "memmap2 cannot know that nobody truncates the file meanwhile")]
    // SAFETY: the file is only read; who truncates a checkpoint while it is loaded ends this demo with SIGBUS.
    let mapped = unsafe { Mmap::map(&opened) };
    Ok(mapped.map_err(|error| format!("cannot map {}: {error}", file.display()))?)
}

fn parse<'a>(file: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>, Failure> {
    SafeTensors::deserialize(bytes)
        .map_err(|error| format!("{} is not a valid safetensors file: {error}", file.display()).into())
}

/// Whether `file` can be sent, found out before any worker starts.
pub(crate) fn check(file: &Path) -> Result<(), Failure> {
    let bytes = map(file)?;
    for (name, view) in parse(file, &bytes)?.tensors() {
        dtype(view.dtype()).map_err(|error| format!("{}: tensor {name}: {error}", file.display()))?;
    }
    Ok(())
}

/// The file's tensors by their names.
pub(super) fn load(file: &Path) -> Result<BTreeMap<String, Param>, Failure> {
    let bytes = map(file)?;
    let mut weights = BTreeMap::new();
    for (name, view) in parse(file, &bytes)?.tensors() {
        let mut tensor = TensorMut::empty(dtype(view.dtype())?, view.shape())?;
        tensor.storage_mut().as_bytes_mut()?.copy_from_slice(view.data());
        weights.insert(name, Param::new(tensor.freeze_ready()));
    }
    Ok(weights)
}
