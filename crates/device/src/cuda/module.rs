//! This crate's kernels, which the driver compiles from their PTX when one is first used on a device.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use super::Version;
use super::context::Context;
use super::sys::CUfunction;
use crate::DeviceError;

/// The kernels of one context, in a module each, which lives as long as the context: for ever.
pub(super) struct Kernels {
    pub(super) delay: Function,
    pub(super) fill: Function,
}

/// A kernel of a module that is never unloaded.
#[derive(Clone, Copy)]
pub(super) struct Function(CUfunction);

// SAFETY: a function handle is an address in a module that stays; it has no thread affinity.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    pub(super) fn raw(self) -> CUfunction {
        self.0
    }
}

/// The PTX of one kernel for the three targets that `kernels/` has: the newest that the device runs is taken.
macro_rules! ptx {
    ($name:literal, $capability:expr) => {
        match ($capability.major, $capability.minor) {
            (8, 9) | (9.., _) => Some(include_str!(concat!("../../../../kernels/ptx/", $name, ".compute_89.ptx"))),
            (8, _) => Some(include_str!(concat!("../../../../kernels/ptx/", $name, ".compute_80.ptx"))),
            (7, 5..) => Some(include_str!(concat!("../../../../kernels/ptx/", $name, ".compute_75.ptx"))),
            _ => None,
        }
    };
}

fn text(name: &str, capability: Version) -> Option<&'static str> {
    match name {
        "delay" => ptx!("delay", capability),
        _ => ptx!("fill", capability),
    }
}

impl Context {
    /// The kernels, compiled at the first call.
    pub(super) fn kernels(&'static self) -> Result<&'static Kernels, DeviceError> {
        let kernels = self.kernels.get_or_init(|| {
            let _current = self.make_current()?;
            let delay = self.load("delay", c"farcall_delay")?;
            let fill = self.load("fill", c"farcall_fill")?;
            Ok(Kernels { delay, fill })
        });
        kernels.as_ref().map_err(Clone::clone)
    }

    fn load(&self, name: &str, entry: &CStr) -> Result<Function, DeviceError> {
        let old = DeviceError::Unsupported { what: "a device older than compute capability 7.5", device: self.device };
        let text = text(name, self.capability).ok_or(old)?;
        let text = CString::new(text).map_err(|error| DeviceError::os("PTX", std::io::Error::other(error)))?;
        let mut module = ptr::null_mut();
        // SAFETY: `module` is a live out pointer, the text ends with a zero, and the context is current.
        let status = unsafe { (self.calls.cuModuleLoadData)(&raw mut module, text.as_ptr().cast::<c_void>()) };
        self.check("cuModuleLoadData", status)?;
        let mut function = ptr::null_mut();
        // SAFETY: `function` is a live out pointer, the module was just loaded.
        let status = unsafe { (self.calls.cuModuleGetFunction)(&raw mut function, module, entry.as_ptr()) };
        self.check("cuModuleGetFunction", status)?;
        Ok(Function(function))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_gets_the_newest_text_that_it_runs() {
        for (major, minor, target) in [
            (7, 0, None),
            (7, 5, Some("sm_75")),
            (8, 0, Some("sm_80")),
            (8, 6, Some("sm_80")),
            (8, 9, Some("sm_89")),
            (9, 0, Some("sm_89")),
            (12, 0, Some("sm_89")),
        ] {
            for name in ["delay", "fill"] {
                let text = text(name, Version { major, minor });
                assert_eq!(text.is_some(), target.is_some(), "{major}.{minor}");
                let says = |text: &str| text.contains(&format!(".target {}", target.unwrap_or_default()));
                assert!(text.is_none_or(|text| says(text) && text.contains(&format!(".entry farcall_{name}("))));
            }
        }
    }
}
