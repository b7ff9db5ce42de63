//! The errors of this crate: one enum whose fields hold what a person needs to act.
//!
//! [`DeviceError`] is `Clone`, since one lost device fails every waiter with the same cause.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::{DType, Device, LayoutError};

/// Why memory could not be had, or work on a device did not complete. Programs match the variant; people read the text.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// This process cannot use the device: no such device, no driver, or one that is too old.
    #[error("{device} is not available: {reason}")]
    Unavailable {
        /// The device asked for.
        device: Device,
        /// What is missing, and where known how to provide it.
        reason: Arc<str>,
    },
    /// The device has not enough memory left, or its limit is lower than what was asked for.
    #[error("out of memory on {device}: wanted {want_bytes} bytes, {mapped_bytes} are mapped already")]
    OutOfMemory {
        /// The device whose memory ran out.
        device: Device,
        /// Bytes asked for.
        want_bytes: usize,
        /// Bytes that this runtime held on the device at that time, idle ones included.
        mapped_bytes: usize,
    },
    /// The device failed while work was queued: all pending work on it ends this way, and new work is refused.
    #[error("{device} was lost: {reason}")]
    Lost {
        /// The device that failed.
        device: Device,
        /// The driver's code and name of the fault.
        reason: Arc<str>,
    },
    /// The driver refused a call. The device goes on.
    #[error("{device}: {call} failed: {name} ({code})")]
    Driver {
        /// The device it was asked of.
        device: Device,
        /// The driver's call.
        call: &'static str,
        /// Its status.
        code: u32,
        /// The status' name in the driver's documentation.
        name: &'static str,
    },
    /// A kernel found that it cannot work on its bytes, such as an index that is out of range. What it was to write is unspecified.
    #[error("`{op}` failed: {reason}")]
    Kernel {
        /// The operation.
        op: &'static str,
        /// What it found, and what to do about it.
        reason: Arc<str>,
    },
    /// The [`Promise`](crate::Promise) was dropped without a value: its producer panicked or gave up.
    #[error("the producer of this value went away without completing it")]
    BrokenPromise,
    /// The work was cancelled before it completed.
    #[error("cancelled")]
    Cancelled,
    /// The wait ended before what it waited for. The work itself goes on.
    #[error("timed out after {waited:?} waiting for {what}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The bound that was given.
        waited: Duration,
    },
    /// Nothing that is left can run, in chaos mode: a hang, if streams were threads.
    #[error("deadlock: {event} cannot pass; stuck are {stuck}")]
    Deadlock {
        /// What was waited for.
        event: Arc<str>,
        /// The oldest operation of each stream, and what it waits for.
        stuck: Arc<str>,
    },
    /// A variable of the environment has a value that means nothing.
    #[error("{variable}={value} is not understood: expected {expected}")]
    InvalidSetting {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: Arc<str>,
        /// Values that are understood.
        expected: &'static str,
    },
    /// The bytes are not written yet. Await the value, or call `wait`, before reading it on the host.
    #[error("the bytes on {device} are not ready: await the value (or `ready_event().block(..)`) before reading it")]
    NotReady {
        /// Where the pending work is.
        device: Device,
    },
    /// Bytes that came from elsewhere into these did not all come.
    #[error(
        "the bytes on {device} are torn: receiving them ended before all were there; receive or write them whole again"
    )]
    Torn {
        /// Where they are.
        device: Device,
    },
    /// The bytes are not in host memory. Copy them with `tensor.host().await`.
    #[error("the bytes are on {device}, not on the host: copy them with `tensor.host().await`")]
    NotHost {
        /// Where the bytes are.
        device: Device,
    },
    /// Work was queued on a stream of another device than its storages'.
    #[error("a storage on {found} was given to a stream of {expected}: copy it there first")]
    WrongDevice {
        /// The stream's device.
        expected: Device,
        /// The storage's device.
        found: Device,
    },
    /// This process was forked from the one that has the bytes: memory is not inherited.
    #[error(
        "this process was forked from the one that has these bytes: use them there, or start processes by spawning"
    )]
    ForkedProcess,
    /// A slice was asked of a strided view. Pack it with `tensor.contiguous(&stream)`, or read it with `to_vec`.
    #[error(
        "the tensor of shape {shape:?} with strides {strides:?} is not contiguous: use `contiguous(&stream)` or `to_vec`"
    )]
    NotContiguous {
        /// The view's shape.
        shape: Arc<[usize]>,
        /// The view's strides in elements.
        strides: Arc<[i64]>,
    },
    /// The tensor holds elements of another type than the one asked for.
    #[error("the tensor holds {found}, not {expected}")]
    DTypeMismatch {
        /// The dtype of the Rust type asked for.
        expected: DType,
        /// The dtype of the tensor.
        found: DType,
    },
    /// Two sizes that must agree do not.
    #[error("{what}: expected {expected}, found {found}")]
    LengthMismatch {
        /// What was compared.
        what: &'static str,
        /// The size required.
        expected: usize,
        /// The size given.
        found: usize,
    },
    /// The bytes are no valid values of the element type, such as a `bool` that is neither 0 nor 1.
    #[error("the bytes are no valid {dtype} values")]
    InvalidBits {
        /// The element type asked for.
        dtype: DType,
    },
    /// Foreign memory starts at an address that the element type cannot be read from. Copy it with `contiguous`.
    #[error("the memory is not aligned for {dtype}: copy it first, for example with `to_vec`")]
    Misaligned {
        /// The element type asked for.
        dtype: DType,
    },
    /// A shape, stride or offset is impossible, or does not fit the storage.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The operation is not available for this device or these arguments.
    #[error("{what} is not supported on {device}")]
    Unsupported {
        /// The operation.
        what: &'static str,
        /// The device it was asked of.
        device: Device,
    },
    /// The operating system refused a call.
    #[error("{call} failed: {source}")]
    Os {
        /// The system call.
        call: &'static str,
        /// Its error.
        source: Arc<io::Error>,
    },
}

impl DeviceError {
    /// Wraps the error of a system call.
    pub(crate) fn os(call: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Os { call, source: Arc::new(source.into()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_device_and_the_remedy() {
        let not_host = DeviceError::NotHost { device: Device::Cuda(3) };
        assert_eq!(
            not_host.to_string(),
            "the bytes are on cuda:3, not on the host: copy them with `tensor.host().await`"
        );
        let memory = DeviceError::OutOfMemory { device: Device::HOST, want_bytes: 64, mapped_bytes: 128 };
        assert_eq!(memory.to_string(), "out of memory on cpu:0: wanted 64 bytes, 128 are mapped already");
    }
}
