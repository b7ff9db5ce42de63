//! The driver's calls that this crate makes, as the loader finds them in `libcuda.so.1`.
//!
//! Declarations only. Each call is looked up once, when the library is loaded, so that a missing one is an answer and not a panic
//! later. Statuses stay integers: a newer driver may return codes that no list here has.
//! `tests` compares every declaration with those that bindgen made from NVIDIA's header, as the crate `cudarc` ships them.
//!
//! Source: CUDA Driver API, version 12.0 and later.
#![allow(non_snake_case, reason = "the names of the driver's own documentation")]

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

/// `CUresult`.
pub(super) type Status = u32;
/// `CUdevice`: an ordinal.
pub(super) type CUdevice = c_int;
/// A device's address.
pub(super) type CUdeviceptr = u64;
pub(super) type CUcontext = *mut c_void;
pub(super) type CUstream = *mut c_void;
pub(super) type CUevent = *mut c_void;
pub(super) type CUmodule = *mut c_void;
pub(super) type CUfunction = *mut c_void;
pub(super) type CUmemoryPool = *mut c_void;
/// `CUipcMemHandle` and `CUipcEventHandle`.
pub(super) type IpcHandle = [u8; 64];

pub(super) const SUCCESS: Status = 0;
pub(super) const OUT_OF_MEMORY: Status = 2;
pub(super) const NO_DEVICE: Status = 100;
pub(super) const NOT_READY: Status = 600;
pub(super) const NOT_SUPPORTED: Status = 801;

/// `CU_STREAM_NON_BLOCKING`: no order with the legacy default stream.
pub(super) const STREAM_NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`: cheaper to record, and to wait for.
pub(super) const EVENT_DISABLE_TIMING: u32 = 2;
/// `CU_EVENT_INTERPROCESS`; only with timing disabled.
pub(super) const EVENT_INTERPROCESS: u32 = 4;
/// `CU_MEMHOSTALLOC_PORTABLE` and `CU_MEMHOSTREGISTER_PORTABLE`: pinned for every context.
pub(super) const PORTABLE: u32 = 1;
/// `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
pub(super) const RANGE_HANDLE_DMA_BUF_FD: u32 = 1;
/// `CU_MEMORYTYPE_HOST`.
pub(super) const MEMORY_HOST: u32 = 1;
/// `CU_MEMORYTYPE_DEVICE`.
pub(super) const MEMORY_DEVICE: u32 = 2;

/// `CUdevice_attribute`: those that are asked for.
pub(super) mod attribute {
    pub(in super::super) const MULTIPROCESSOR_COUNT: u32 = 16;
    pub(in super::super) const UNIFIED_ADDRESSING: u32 = 41;
    pub(in super::super) const COMPUTE_CAPABILITY_MAJOR: u32 = 75;
    pub(in super::super) const COMPUTE_CAPABILITY_MINOR: u32 = 76;
    pub(in super::super) const HOST_REGISTER_SUPPORTED: u32 = 99;
    pub(in super::super) const VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: u32 = 102;
    pub(in super::super) const HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED: u32 = 103;
    pub(in super::super) const MEMORY_POOLS_SUPPORTED: u32 = 115;
    pub(in super::super) const GPU_DIRECT_RDMA_SUPPORTED: u32 = 116;
    pub(in super::super) const GPU_DIRECT_RDMA_WRITES_ORDERING: u32 = 118;
    pub(in super::super) const CAN_USE_64_BIT_STREAM_MEM_OPS: u32 = 122;
    pub(in super::super) const DMA_BUF_SUPPORTED: u32 = 124;
    pub(in super::super) const IPC_EVENT_SUPPORTED: u32 = 125;
}

/// `CUDA_MEMCPY2D`: rows of `WidthInBytes`, `srcPitch` and `dstPitch` bytes apart.
#[repr(C)]
pub(super) struct Memcpy2D {
    pub(super) srcXInBytes: usize,
    pub(super) srcY: usize,
    pub(super) srcMemoryType: u32,
    pub(super) srcHost: *const c_void,
    pub(super) srcDevice: CUdeviceptr,
    pub(super) srcArray: *mut c_void,
    pub(super) srcPitch: usize,
    pub(super) dstXInBytes: usize,
    pub(super) dstY: usize,
    pub(super) dstMemoryType: u32,
    pub(super) dstHost: *mut c_void,
    pub(super) dstDevice: CUdeviceptr,
    pub(super) dstArray: *mut c_void,
    pub(super) dstPitch: usize,
    pub(super) WidthInBytes: usize,
    pub(super) Height: usize,
}

/// Declares the table of calls: those without which there is no backend, and those that only a capability needs.
macro_rules! calls {
    (
        needed { $(fn $name:ident($($type:ty),* $(,)?);)* }
        optional { $(fn $extra:ident($($extra_type:ty),* $(,)?);)* }
    ) => {
        /// The calls by address, valid as long as the library is loaded.
        pub(super) struct Calls {
            $(pub(super) $name: unsafe extern "C" fn($($type),*) -> Status,)*
            $(pub(super) $extra: Option<unsafe extern "C" fn($($extra_type),*) -> Status>,)*
        }

        impl Calls {
            /// Looks every call up; the name of the first that is missing.
            ///
            /// # Safety
            /// `library` must be a CUDA driver's, whose calls are as declared here, and must stay loaded while they are used.
            pub(super) unsafe fn look_up(library: &Library) -> Result<Self, &'static str> {
                Ok(Self {
                    // SAFETY: the type is the declaration's, by the caller's promise.
                    $($name: *unsafe { library.get(stringify!($name)) }.map_err(|_| stringify!($name))?,)*
                    // SAFETY: as above.
                    $($extra: unsafe { library.get(stringify!($extra)) }.ok().map(|symbol| *symbol),)*
                })
            }
        }

        /// Each call with its shape here, and in the header's binding.
        #[cfg(test)]
        fn shapes() -> Vec<(&'static str, Vec<usize>, Vec<usize>)> {
            use cudarc::driver::sys as header;
            use tests::Shape;
            vec![
                $((
                    stringify!($name),
                    vec![size_of::<Status>(), $(size_of::<$type>()),*],
                    (header::$name as unsafe fn($(tests::inferred!($type)),*) -> _).shape(),
                ),)*
                $((
                    stringify!($extra),
                    vec![size_of::<Status>(), $(size_of::<$extra_type>()),*],
                    (header::$extra as unsafe fn($(tests::inferred!($extra_type)),*) -> _).shape(),
                ),)*
            ]
        }
    };
}

calls! {
    needed {
        fn cuInit(u32);
        fn cuDriverGetVersion(*mut c_int);
        fn cuDeviceGetCount(*mut c_int);
        fn cuDeviceGet(*mut CUdevice, c_int);
        fn cuDeviceGetName(*mut c_char, c_int, CUdevice);
        fn cuDeviceGetAttribute(*mut c_int, u32, CUdevice);
        fn cuDeviceTotalMem_v2(*mut usize, CUdevice);
        fn cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        fn cuCtxGetCurrent(*mut CUcontext);
        fn cuCtxSetCurrent(CUcontext);
        fn cuStreamCreate(*mut CUstream, u32);
        fn cuStreamQuery(CUstream);
        fn cuStreamWaitEvent(CUstream, CUevent, u32);
        fn cuEventCreate(*mut CUevent, u32);
        fn cuEventRecord(CUevent, CUstream);
        fn cuEventQuery(CUevent);
        fn cuEventDestroy_v2(CUevent);
        fn cuMemAlloc_v2(*mut CUdeviceptr, usize);
        fn cuMemFree_v2(CUdeviceptr);
        fn cuMemHostAlloc(*mut *mut c_void, usize, u32);
        fn cuMemFreeHost(*mut c_void);
        fn cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        fn cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        fn cuMemcpyDtoDAsync_v2(CUdeviceptr, CUdeviceptr, usize, CUstream);
        fn cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, usize, CUstream);
        fn cuMemcpy2DAsync_v2(*const Memcpy2D, CUstream);
        fn cuMemsetD8Async(CUdeviceptr, u8, usize, CUstream);
        fn cuModuleLoadData(*mut CUmodule, *const c_void);
        fn cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        fn cuLaunchKernel(
            CUfunction, u32, u32, u32, u32, u32, u32, u32, CUstream, *mut *mut c_void, *mut *mut c_void,
        );
    }
    optional {
        fn cuMemGetInfo_v2(*mut usize, *mut usize);
        fn cuDeviceCanAccessPeer(*mut c_int, CUdevice, CUdevice);
        fn cuDeviceGetDefaultMemPool(*mut CUmemoryPool, CUdevice);
        fn cuMemAllocAsync(*mut CUdeviceptr, usize, CUstream);
        fn cuMemFreeAsync(CUdeviceptr, CUstream);
        fn cuMemHostRegister_v2(*mut c_void, usize, u32);
        fn cuMemHostUnregister(*mut c_void);
        fn cuIpcGetMemHandle(*mut IpcHandle, CUdeviceptr);
        fn cuIpcGetEventHandle(*mut IpcHandle, CUevent);
        fn cuMemGetHandleForAddressRange(*mut c_void, CUdeviceptr, usize, u32, u64);
        fn cuStreamWriteValue64_v2(CUstream, CUdeviceptr, u64, u32);
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use cudarc::driver::sys as header;

    use super::*;

    macro_rules! inferred {
        ($type:ty) => {
            _
        };
    }
    pub(super) use inferred;

    /// The bytes of a call's status and of each parameter: what the C ABI passes.
    pub(super) trait Shape {
        fn shape(&self) -> Vec<usize>;
    }

    macro_rules! shape {
        ($($parameter:ident)*) => {
            impl<R, $($parameter),*> Shape for unsafe fn($($parameter),*) -> R {
                fn shape(&self) -> Vec<usize> {
                    vec![size_of::<R>(), $(size_of::<$parameter>()),*]
                }
            }
        };
    }
    shape!(A);
    shape!(A B);
    shape!(A B C);
    shape!(A B C D);
    shape!(A B C D E);
    shape!(A B C D E F);
    shape!(A B C D E F G H I J K);

    #[test]
    fn every_call_has_the_parameters_that_the_drivers_header_gives_it() {
        let shapes = shapes();
        assert!(shapes.len() > 30);
        for (name, ours, theirs) in shapes {
            assert_eq!(ours, theirs, "{name}");
        }
    }

    #[test]
    fn constants_and_structures_are_the_headers() {
        use header::CUdevice_attribute as Attribute;
        for (ours, theirs) in [
            (attribute::MULTIPROCESSOR_COUNT, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            (attribute::UNIFIED_ADDRESSING, Attribute::CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING),
            (attribute::COMPUTE_CAPABILITY_MAJOR, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            (attribute::COMPUTE_CAPABILITY_MINOR, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
            (attribute::HOST_REGISTER_SUPPORTED, Attribute::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED),
            (
                attribute::VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
                Attribute::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED,
            ),
            (
                attribute::HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                Attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
            ),
            (attribute::MEMORY_POOLS_SUPPORTED, Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED),
            (attribute::GPU_DIRECT_RDMA_SUPPORTED, Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED),
            (
                attribute::GPU_DIRECT_RDMA_WRITES_ORDERING,
                Attribute::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING,
            ),
            (attribute::CAN_USE_64_BIT_STREAM_MEM_OPS, Attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS),
            (attribute::DMA_BUF_SUPPORTED, Attribute::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED),
            (attribute::IPC_EVENT_SUPPORTED, Attribute::CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED),
        ] {
            assert_eq!(ours, theirs as u32, "{theirs:?}");
        }
        assert_eq!(STREAM_NON_BLOCKING, header::CUstream_flags::CU_STREAM_NON_BLOCKING as u32);
        assert_eq!(EVENT_DISABLE_TIMING, header::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32);
        assert_eq!(EVENT_INTERPROCESS, header::CUevent_flags::CU_EVENT_INTERPROCESS as u32);
        assert_eq!(PORTABLE, header::CU_MEMHOSTALLOC_PORTABLE);
        assert_eq!(PORTABLE, header::CU_MEMHOSTREGISTER_PORTABLE);
        let dma_buf = header::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        assert_eq!(RANGE_HANDLE_DMA_BUF_FD, dma_buf as u32);
        assert_eq!(MEMORY_HOST, header::CUmemorytype::CU_MEMORYTYPE_HOST as u32);
        assert_eq!(MEMORY_DEVICE, header::CUmemorytype::CU_MEMORYTYPE_DEVICE as u32);
        assert_eq!(size_of::<IpcHandle>(), size_of::<header::CUipcMemHandle>());

        assert_eq!(size_of::<Memcpy2D>(), size_of::<header::CUDA_MEMCPY2D>());
        assert_eq!(offset_of!(Memcpy2D, srcPitch), offset_of!(header::CUDA_MEMCPY2D, srcPitch));
        assert_eq!(offset_of!(Memcpy2D, dstDevice), offset_of!(header::CUDA_MEMCPY2D, dstDevice));
        assert_eq!(offset_of!(Memcpy2D, Height), offset_of!(header::CUDA_MEMCPY2D, Height));
    }
}
