//! Bytes on devices and the order of work on them. Knows no network and no operator.
//!
//! From the bytes up:
//! - [`DType`], [`Device`], [`Layout`]: what elements are, where they live, which bytes of a storage are a tensor;
//! - [`Slab`], [`HostPool`]: mapped memory, and its recycling by size class;
//! - [`StorageMut`] → [`Storage`]: bytes that are written once, then shared, with the fences of their write and their reads;
//! - [`TensorMut`] → [`Tensor`]: a dtype, shape and strides over a storage;
//! - [`Param`]: a cell for a tensor that changes in steps;
//! - [`Stream`], [`Event`]: an ordered queue of work, and a point in it;
//! - [`DeviceFuture`], [`Promise`]: a value that is ready when all its storages are;
//! - [`codec`]: serde values with tensors anywhere inside, as metadata bytes and tensors beside them;
//! - [`Runtime`]: the devices of this process, their memory and their streams.
//!
//! # Invariants
//! - **READY** `.await` on a [`DeviceFuture`] yields a value only when every storage of it is complete on its device;
//!   [`DeviceFuture::on`] yields it as soon as it is handed over, ordered on a stream, blocking no thread.
//! - **FENCE** A storage carries the event of its write and those of its readers. Work on a stream waits for the fences of what it
//!   touches, the host gets [`DeviceError::NotReady`] instead of unfinished bytes, and memory is recycled after the last fence.
//! - **SNAPSHOT** A [`Storage`] is never written: a holder who is alone gets a [`StorageMut`] back, any other makes a copy. Slabs
//!   are sealed against writes of other processes.
//!
//! # Devices
//! The host and, where there is a driver, CUDA devices: one set of types for both, told apart at run time ([`cuda`]). The driver is
//! looked for at the first need of a device. **The CUDA backend has not been run on a GPU yet**, only against a fake driver.
//!
//! # Modes
//! Streams of the CPU run inline, on threads, or in a seeded order ([`CpuMode`]); all give the same values, so tests run in all
//! three. Devices can be emulated: a program for several runs on a machine without any ([`Config::from_env`]). A checker finds
//! uses of storages that nothing orders, under every schedule ([`Check`]).
//!
//! ```
//! use farcall_device::{Device, Runtime, Tensor};
//!
//! let matrix = Tensor::from_slice(&[1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3])?;
//! let columns = matrix.transpose(0, 1)?; // a view: no bytes move
//! assert_eq!(columns.to_vec::<f32>()?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
//!
//! let stream = Runtime::global().stream(Device::HOST)?;
//! let packed = columns.contiguous(&stream)?; // a copy, in row-major order, when the stream comes to it
//! let packed = packed.host().wait(std::time::Duration::from_secs(5))?; // or `.await`
//! assert_eq!(packed.as_slice::<f32>()?[1], 4.0);
//! # Ok::<(), farcall_device::DeviceError>(())
//! ```

#[cfg(not(target_os = "linux"))]
compile_error!("farcall-device maps memory by memfd and runs on Linux only, so far");
#[cfg(not(target_endian = "little"))]
compile_error!("tensors travel as the machine's bytes, which must be little-endian");

mod checker;
mod clock;
pub mod codec;
mod cpu;
pub mod cuda;
mod device;
mod dtype;
mod error;
mod event;
mod fork;
mod future;
mod layout;
mod memory;
#[cfg(any(test, feature = "mutants"))]
pub mod mutants;
mod pack;
mod param;
mod pool;
mod progress;
mod runtime;
mod storage;
mod stream;
mod sync;
mod tensor;
#[cfg(test)]
mod testing;
pub mod units;
mod waiter;

pub use checker::{Access, Check, Race};
pub use codec::{CodecError, Encoded};
pub use cpu::CpuMode;
pub use cuda::Unavailable;
pub use device::{Device, ParseDeviceError};
pub use dtype::{C64, C128, DType, Element, F8E4M3, F8E5M2, ParseDTypeError};
pub use error::DeviceError;
pub use event::{Event, EventReady, Token};
pub use fork::{Kept, is_forked_child};
pub use future::{DeviceFuture, Fences, OnStreams, Ordered, Promise, Ready, SharedFuture, Storages, join_all};
pub use half::{bf16, f16};
pub use layout::{Layout, LayoutError, MAX_RANK};
pub use memory::{ALIGN_BYTES, DescriptorPermit, Release, Slab, SlabCopy, SlabRange, copy};
pub use param::{Landing, Param, ParamMut};
pub use pool::{HostBlock, HostPool, PoolStats};
pub use runtime::{Config, Cuda, Runtime};
pub use storage::{Storage, StorageMut};
pub use stream::{Stream, StreamId};
pub use tensor::{Tensor, TensorMut};

/// What tasks may send and share between threads; checked by the compiler.
#[cfg(test)]
mod auto_traits {
    use super::*;

    const fn send_and_sync<T: Send + Sync + 'static>() {}
    const fn send<T: Send + 'static>() {}

    const _: () = {
        send_and_sync::<(Tensor, TensorMut, Storage, StorageMut, Slab, SlabRange, HostBlock, HostPool, Layout)>();
        send_and_sync::<(
            Stream,
            Event,
            Token,
            Race,
            Param,
            Runtime,
            DeviceError,
            CodecError,
            Promise<Tensor>,
            SharedFuture<Tensor>,
            Ready<Tensor>,
        )>();
        send::<(DeviceFuture<Tensor>, OnStreams<Tensor>, Ordered<Tensor>, EventReady)>();
    };
}
