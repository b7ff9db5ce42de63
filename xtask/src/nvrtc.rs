//! NVRTC, NVIDIA's compiler from CUDA C++ to PTX, loaded at run time. It needs neither a GPU nor a driver.
//!
//! Declared here is only what a compilation takes; the reference is the manual "NVRTC", its chapter "User Interface".

#![expect(unsafe_code, reason = "calls a C library that is loaded at run time")]

use std::ffi::{CStr, CString, c_char, c_int};
use std::fmt::Display;
use std::path::Path;
use std::ptr;

use libloading::Library;

/// `nvrtcResult`; 0 is success. Kept an integer: a later library may return what this one does not know.
type Status = c_int;

/// `nvrtcProgram`.
type Program = *mut std::ffi::c_void;

type Size = unsafe extern "C" fn(Program, *mut usize) -> Status;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> Status;

/// The library's functions. They are plain pointers into `_library`, which is why it is kept.
pub(crate) struct Compiler {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status,
    ptx_size: Size,
    ptx: Text,
    log_size: Size,
    log: Text,
    destroy: unsafe extern "C" fn(*mut Program) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    _library: Library,
}

impl Compiler {
    /// Loads `libnvrtc` at `path`. It finds its builtins beside itself.
    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        let failed = |error: libloading::Error| format!("{}: {error}", path.display());
        // SAFETY: the library's constructors have no precondition; its bytes were checked against a hash when it came.
        let library = unsafe { Library::new(path) }.map_err(failed)?;
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the field's type repeats the declaration in `nvrtc.h`.
                *unsafe { library.get($name) }.map_err(failed)?
            };
        }
        Ok(Self {
            create: symbol!(b"nvrtcCreateProgram\0"),
            compile: symbol!(b"nvrtcCompileProgram\0"),
            ptx_size: symbol!(b"nvrtcGetPTXSize\0"),
            ptx: symbol!(b"nvrtcGetPTX\0"),
            log_size: symbol!(b"nvrtcGetProgramLogSize\0"),
            log: symbol!(b"nvrtcGetProgramLog\0"),
            destroy: symbol!(b"nvrtcDestroyProgram\0"),
            error_string: symbol!(b"nvrtcGetErrorString\0"),
            _library: library,
        })
    }

    /// Compiles `source`, called `name` in messages, to PTX. The error is the compiler's log.
    pub(crate) fn ptx(&self, name: &str, source: &str, options: &[&str]) -> Result<String, String> {
        let (source, name) = (c_string(source)?, c_string(name)?);
        let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = Guard { compiler: self, program: ptr::null_mut() };
        // SAFETY: an out pointer and two strings that live through the call; no headers, so their arrays may be null.
        let status =
            unsafe { (self.create)(&mut program.program, source.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null()) };
        self.check("nvrtcCreateProgram", status)?;
        // SAFETY: `options` holds as many strings as is said, all alive; the program is.
        let status = unsafe { (self.compile)(program.program, options.len() as c_int, options.as_ptr()) };
        let log = program.text("nvrtcGetProgramLog", self.log_size, self.log)?;
        self.check("nvrtcCompileProgram", status).map_err(|error| format!("{error}\n{log}"))?;
        // A warning is for the author too: these sources are to be free of them.
        if !log.trim().is_empty() {
            return Err(format!("it compiled with warnings\n{log}"));
        }
        program.text("nvrtcGetPTX", self.ptx_size, self.ptx)
    }

    fn check(&self, function: &str, status: Status) -> Result<(), String> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: any integer may be asked for; the answer is a constant of the library, or null.
        let text = unsafe { (self.error_string)(status) };
        if text.is_null() {
            return Err(format!("{function}: status {status}"));
        }
        // SAFETY: not null, and a C string that lives as long as the library.
        let text = unsafe { CStr::from_ptr(text) };
        Err(format!("{function}: {}", text.to_string_lossy()))
    }
}

/// A program until it is destroyed; null before it is created.
struct Guard<'a> {
    compiler: &'a Compiler,
    program: Program,
}

impl Guard<'_> {
    /// A text of the program, whose `size` counts its terminating zero.
    fn text(&self, function: &str, size: Size, text: Text) -> Result<String, String> {
        let mut bytes = 0;
        // SAFETY: the program is alive and `bytes` an out pointer.
        self.compiler.check(function, unsafe { size(self.program, &mut bytes) })?;
        let mut buffer = vec![0_u8; bytes];
        // SAFETY: the buffer has as many bytes as the library just asked for.
        self.compiler.check(function, unsafe { text(self.program, buffer.as_mut_ptr().cast()) })?;
        buffer.pop_if(|last| *last == 0);
        String::from_utf8(buffer).map_err(in_text(function))
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: created and not destroyed yet. Of no use after this, so a failure changes nothing.
            unsafe { (self.compiler.destroy)(&mut self.program) };
        }
    }
}

fn c_string(text: &str) -> Result<CString, String> {
    CString::new(text).map_err(in_text(text))
}

fn in_text<E: Display>(text: &str) -> impl FnOnce(E) -> String {
    move |error| format!("{text:?}: {error}")
}
