//! Runs a test's body in a process of its own, where the loader finds the fake driver: a process has one driver, for good.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, fs, thread};

/// Names the test that a child is to run.
const CHILD: &str = "FAKE_CUDA_TEST";
/// How long a child may take.
const CHILD_MAX: Duration = Duration::from_secs(60);

/// Which library a child finds.
#[derive(Clone, Copy)]
#[allow(dead_code, reason = "not every test program needs each")]
pub(crate) enum Library {
    None,
    Fake,
    /// The fake one without this call.
    Without(&'static str),
}

/// Runs `body` in a child with these variables. The child must succeed and write nothing to standard error, where a panic would;
/// what it wrote to standard output is given back. In the child itself `body` runs, and nothing is given back.
pub(crate) fn in_child(
    test: &str,
    library: Library,
    variables: &[(&str, &str)],
    body: impl FnOnce(),
) -> Option<String> {
    if env::var(CHILD).is_ok_and(|name| name == test) {
        body();
        return None;
    }
    let program = env::current_exe().expect("our own path");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(CHILD, test);
    command.env_clear().envs(env::vars().filter(|(name, _)| name == "PATH" || name == "RUST_BACKTRACE"));
    command.env(CHILD, test).env("LD_LIBRARY_PATH", folder(library)).envs(variables.iter().copied());
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a child");
    let (success, stdout, stderr) = end_of(child);
    assert!(success && stderr.is_empty(), "{test} in its child:\n{stdout}\n{stderr}");
    assert!(stdout.contains("1 passed"), "the child ran its test: {stdout}");
    Some(stdout)
}

/// The child's end; after [`CHILD_MAX`] it is killed.
fn end_of(mut child: Child) -> (bool, String, String) {
    fn read(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut text = String::new();
            let _ = pipe.read_to_string(&mut text);
            text
        })
    }
    let stdout = read(child.stdout.take().expect("piped"));
    let stderr = read(child.stderr.take().expect("piped"));
    let id = child.id().to_string();
    let (ended, end) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if end.recv_timeout(CHILD_MAX) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = Command::new("kill").args(["-KILL", &id]).status();
        }
    });
    // Its output ends when it does: only then is it waited for, so that the number is still its own while it may be killed.
    let (stdout, stderr) = (stdout.join().expect("read"), stderr.join().expect("read"));
    drop(ended);
    watchdog.join().expect("no panic");
    (child.wait().expect("its status").success(), stdout, stderr)
}

/// A folder where the loader finds `library` under the driver's name.
fn folder(library: Library) -> PathBuf {
    let name = match library {
        Library::None => "none".to_owned(),
        Library::Fake => "fake".to_owned(),
        Library::Without(call) => format!("without-{call}"),
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).expect("a folder");
    let mut bytes = match library {
        Library::None => return folder,
        _ => fs::read(built()).expect("cargo builds the library before its tests"),
    };
    if let Library::Without(call) = library {
        // Its name is in the string table of the library's symbols, alone between two zeros.
        let name = [&[0], call.as_bytes(), &[0]].concat();
        let found: Vec<_> = (0..bytes.len() - name.len()).filter(|at| bytes[*at..].starts_with(&name)).collect();
        assert!(!found.is_empty(), "{call} is exported");
        for at in found {
            bytes[at + call.len()] ^= 1;
        }
    }
    // Tests run at the same time: each writes the same bytes, and none sees a part of them.
    let own = folder.join(format!("{}-{:?}", std::process::id(), thread::current().id()));
    fs::write(&own, bytes).expect("room for a copy");
    fs::rename(&own, folder.join("libcuda.so.1")).expect("one folder");
    folder
}

/// The library, as cargo built it: in the folder of this program, or in the one above.
fn built() -> PathBuf {
    let program = env::current_exe().expect("our own path");
    let mut folders = program.ancestors().skip(1).take(2).map(|folder| folder.join("libfarcall_fake_cuda.so"));
    folders.find(|library| library.is_file()).expect("libfarcall_fake_cuda.so beside this program")
}

/// How often the driver's call of this name was made, in a child.
#[allow(dead_code, reason = "not every test program counts")]
pub(crate) fn calls(name: &str) -> u64 {
    let name = std::ffi::CString::new(name).expect("a name");
    type Count = unsafe extern "C" fn(*const std::ffi::c_char) -> u64;
    // SAFETY: it is loaded already, and its initialisers did run.
    let library = unsafe { libloading::Library::new("libcuda.so.1") }.expect("the fake driver");
    // SAFETY: the fake driver declares it so.
    let count = unsafe { library.get::<Count>("fake_cuda_count") }.expect("the fake driver's own call");
    // SAFETY: the name is a C string.
    unsafe { count(name.as_ptr()) }
}
