//! A CUDA driver that is not one. Under the name `libcuda.so.1`, in a folder of `LD_LIBRARY_PATH`, it lets the real backend of
//! `farcall-device` run without a GPU, foreign calls included.
//!
//! Streams are threads, so work is really asynchronous; device memory is host memory at addresses that the host cannot read by
//! mistake; the kernels of this repository are known by name. It is stricter than a driver where that finds mistakes: host memory
//! that is not pinned is copied as late as any other, every call must find its own context current, and work that reaches memory
//! which was freed faults.
//!
//! What it is like is set by variables: see [`settings::Settings`]. It times nothing: its speed says nothing about a GPU's.
//! Source: CUDA Driver API, for what each call promises.
#![expect(unsafe_code, reason = "it is called from C, and copies between addresses")]

pub mod calls;
mod machine;
pub mod settings;
