//! What this machine's kernel and libraries offer, tried for real, for `farcall doctor`.
//!
//! Nothing here is needed to move bytes. Invariant P1: a probe changes nothing that outlives it, but for a library that stays
//! loaded, and what is missing is an error, never a panic or a line on standard error.
#![expect(unsafe_code, reason = "system calls and a library's function that have no safe wrapper")]

use std::ffi::{CStr, c_char};
use std::io;
use std::sync::Arc;

use libloading::{Library, Symbol};

/// UCX's protocol layer, by the name of the interface that all its versions since 1.0 have.
const UCX_LIBRARY: &str = "libucp.so.0";

/// Reads `target.len()` bytes at `address` of the process `pid` (process_vm_readv): how many came.
///
/// # Errors
/// What the kernel says: `PermissionDenied` where tracing is restricted.
pub fn read_process(pid: u32, address: u64, target: &mut [u8]) -> io::Result<usize> {
    let local = libc::iovec { iov_base: target.as_mut_ptr().cast(), iov_len: target.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: target.len() };
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: the local range is `target`, borrowed for the call; the kernel checks the remote one in the other process.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Whether io_uring can be set up.
///
/// # Errors
/// What the kernel says: no such call, or not permitted.
pub fn io_uring() -> io::Result<()> {
    // SAFETY: without a place for its parameters the call sets nothing up: it fails once it is found permitted.
    let called = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, std::ptr::null_mut::<libc::c_void>()) };
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        _ if called >= 0 => Ok(()),
        Some(libc::EFAULT | libc::EINVAL) => Ok(()),
        _ => Err(error),
    }
}

/// Why UCX cannot be used. Each text says what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UcxUnavailable {
    /// There is no library, or it cannot be loaded.
    #[error(
        "no libucp.so.0: install UCX (libucx0 on Debian and Ubuntu, ucx on Fedora), or add its folder to LD_LIBRARY_PATH; the loader says: {reason}"
    )]
    NoLibrary {
        /// What the loader said.
        reason: Arc<str>,
    },
    /// A library of that name is not UCX.
    #[error("libucp.so.0 has no {name}: it is not UCX, look at LD_LIBRARY_PATH")]
    MissingSymbol {
        /// The function.
        name: &'static str,
    },
}

/// The version of UCX, if it can be loaded. It stays loaded.
///
/// # Errors
/// [`UcxUnavailable`].
pub fn ucx() -> Result<String, UcxUnavailable> {
    // SAFETY: loading runs the library's initialisers; by this name it is the system's UCX.
    let library = unsafe { Library::new(UCX_LIBRARY) };
    let library = library.map_err(|error| {
        let said = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        UcxUnavailable::NoLibrary { reason: said.into() }
    })?;
    const NAME: &str = "ucp_get_version_string";
    // SAFETY: ucp.h declares `const char *ucp_get_version_string(void)`.
    let found: Result<Symbol<'_, unsafe extern "C" fn() -> *const c_char>, _> = unsafe { library.get(NAME) };
    let version = match found {
        Ok(version) => {
            // SAFETY: as declared; it takes nothing and changes nothing.
            let text = unsafe { version() };
            // SAFETY: if it is not null, it is a string constant of the library, which is loaded.
            (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        }
        Err(_) => None,
    };
    // A library that has threads of its own must not be unloaded under them.
    std::mem::forget(library);
    version.ok_or(UcxUnavailable::MissingSymbol { name: NAME })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_reads_itself_and_what_is_not_there_is_an_error() {
        let source = *b"bytes of this process";
        let mut target = [0; 21];
        let read = read_process(std::process::id(), source.as_ptr() as u64, &mut target);
        match read {
            Ok(read) => assert_eq!((read, target), (21, source)),
            Err(error) => println!("skipped: 1 check, process_vm_readv: {error}"),
        }
        assert!(read_process(std::process::id(), 0, &mut target).is_err(), "nothing is mapped at 0");
        assert!(read_process(u32::MAX, 0, &mut target).is_err());
    }

    /// Whatever the machine has, the answer is one of these, and the same each time.
    #[test]
    fn probes_answer_twice_the_same() {
        assert_eq!(ucx(), ucx());
        assert_eq!(io_uring().map_err(|error| error.kind()), io_uring().map_err(|error| error.kind()));
        if let Err(error @ UcxUnavailable::NoLibrary { .. }) = ucx() {
            assert!(error.to_string().contains("install UCX"), "{error}");
        }
    }
}
