//! What the kernel lets this process do, tried for real.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use farcall::transport::{LocalAddress, interface_addresses, probe};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{PidfdFlags, Resource, getrlimit, pidfd_open};

use super::{Finding, Probe};
use crate::launch::this_program;

/// How long the child that reads this process's memory may take.
const CHILD_MAX: Duration = Duration::from_secs(3);
const TICK: Duration = Duration::from_millis(2);
const MIB: u64 = 1 << 20;
const HUGE_BYTES: u64 = 2 * MIB;
/// Below it, a worker with many peers runs out.
const DESCRIPTORS_MIN: u64 = 4096;

pub(super) const PROBES: &[Probe] = &[
    ("memfd", memfd),
    ("huge_pages", huge_pages),
    ("cma", cma),
    ("pidfd", pidfd),
    ("life", life),
    ("unix_socket", unix_socket),
    ("ipv4", || loopback(IpAddr::from([127, 0, 0, 1]), "127.0.0.1")),
    ("ipv6", || loopback(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), "::1")),
    ("interfaces", interfaces),
    ("memlock", memlock),
    ("descriptors", descriptors),
    ("io_uring", io_uring),
];

/// Memory that peers map, and that its owner cannot cut off under them nor others write to.
fn memfd() -> Finding {
    let fix = "allow memfd_create and fcntl(F_ADD_SEALS) in the container's seccomp profile";
    let fd = match memfd_create(c"farcall-doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING) {
        Ok(fd) => fd,
        Err(error) => return Finding::missing(format!("memfd_create: {error}: tensors cannot be shared"), fix),
    };
    let sized = ftruncate(&fd, MIB).and_then(|()| fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW));
    if let Err(error) = sized {
        return Finding::warn(format!("no seals: {error}"), fix);
    }
    if ftruncate(&fd, 0).is_ok() {
        return Finding::warn("the seal against shrinking holds nobody", "use a kernel that is not emulated");
    }
    match fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE) {
        Ok(()) if rustix::io::write(&fd, b"x").is_ok() => {
            Finding::warn("the seal against writers holds nobody", "use a kernel that is not emulated")
        }
        Ok(()) => Finding::ok("made, sealed against resizing and against writers; both seals hold"),
        Err(error) => Finding::warn(format!("no seal against writers: {error}"), "use Linux 5.1 or newer"),
    }
}

fn huge_pages() -> Finding {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let reserved =
        memfd_create(c"farcall-doctor", flags).and_then(|fd| fallocate(&fd, FallocateFlags::empty(), 0, HUGE_BYTES));
    let transparent = |file: &str| {
        let text = read(&format!("/sys/kernel/mm/transparent_hugepage/{file}"));
        text.split(['[', ']']).nth(1).unwrap_or("unknown").to_owned()
    };
    let transparent = format!("transparent: {}, for memfd: {}", transparent("enabled"), transparent("shmem_enabled"));
    match reserved {
        Ok(()) => Finding::ok(format!("a memfd of 2 MiB pages can be had; {transparent}")),
        Err(error) => Finding::warn(
            format!("no reserved ones ({error}); {transparent}"),
            "as root: sysctl vm.nr_hugepages=512, or echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

/// A child reads this process's memory: the harder direction, as between workers, which are not each other's children.
fn cma() -> Finding {
    let expected: [u8; 16] = std::array::from_fn(|index| (index as u8).wrapping_mul(37) ^ std::process::id() as u8);
    let hex: String = expected.iter().map(|byte| format!("{byte:02x}")).collect();
    match read_by_child(&expected, &hex) {
        Ok(None) => Finding::ok("another process reads this one's memory (process_vm_readv)"),
        Ok(Some(why)) => Finding::missing(
            format!("another process cannot read this one's memory: {why}"),
            "as root: sysctl kernel.yama.ptrace_scope=0; in a container: --cap-add=SYS_PTRACE",
        ),
        Err(error) => Finding::warn(format!("not tried: {error}"), "run the installed program itself, by its path"),
    }
}

/// `None` if the child has read what is expected, else what it said.
fn read_by_child(expected: &[u8; 16], hex: &str) -> io::Result<Option<String>> {
    let address = (expected.as_ptr() as u64).to_string();
    let mut child = this_program()?
        .args(["doctor-child", &std::process::id().to_string(), &address, hex])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + CHILD_MAX;
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            return Ok(Some(format!("no answer within {CHILD_MAX:?}")));
        }
        std::thread::sleep(TICK);
    }
    let mut said = String::new();
    if let Some(output) = &mut child.stdout {
        output.read_to_string(&mut said)?;
    }
    let said = said.trim().to_owned();
    Ok((said != "read").then_some(if said.is_empty() { "it said nothing".to_owned() } else { said }))
}

/// The child of [`cma`].
pub(crate) fn child(pid: u32, address: u64, expected: &str) -> Result<ExitCode, crate::Failure> {
    let mut bytes = [0; 16];
    let found = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    match probe::read_process(pid, address, &mut bytes) {
        Ok(16) if found(&bytes) == expected => println!("read"),
        Ok(_) => println!("what was read is something else"),
        Err(error) => println!("{error}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn pidfd() -> Finding {
    match pidfd_open(rustix::process::getpid(), PidfdFlags::empty()) {
        Ok(_) => Finding::ok("pidfd_open works"),
        Err(error) => Finding::missing(format!("pidfd_open: {error}"), "use Linux 5.3 or newer, allow it in seccomp"),
    }
}

/// The page with a robust futex, by which a death is told at once.
fn life() -> Finding {
    let fix = "allow memfd_create, set_robust_list and futex in the container's seccomp profile";
    match LocalAddress::new() {
        Ok(LocalAddress { life: Some(_), boot, network, .. }) => {
            Finding::ok(format!("deaths on this host are told at once; boot {boot}, network namespace {network}"))
        }
        Ok(LocalAddress { life: None, .. }) => {
            Finding::warn("no robust futex in a shared page: deaths are told by sockets and pings", fix)
        }
        Err(error) => Finding::missing(format!("no address on this host: {error}"), "mount /proc"),
    }
}

fn unix_socket() -> Finding {
    let name = format!("farcall-doctor-{}", std::process::id());
    let tried = SocketAddr::from_abstract_name(name).and_then(|address| {
        let listener = UnixListener::bind_addr(&address)?;
        let dialer = UnixStream::connect_addr(&address)?;
        exchange(listener.accept()?.0, dialer)
    });
    match tried {
        Ok(()) => Finding::ok("an abstract name is bound, dialed and answered"),
        Err(error) => Finding::missing(format!("{error}"), "workers use TCP; allow Unix sockets in the sandbox"),
    }
}

fn loopback(address: IpAddr, name: &str) -> Finding {
    let tried = TcpListener::bind((address, 0)).and_then(|listener| {
        let dialer = TcpStream::connect_timeout(&listener.local_addr()?, Duration::from_secs(1))?;
        exchange(listener.accept()?.0, dialer)
    });
    match tried {
        Ok(()) => Finding::ok(format!("{name} is listened on, dialed and answered")),
        Err(error) if address.is_ipv6() => Finding::missing(
            format!("{name}: {error}"),
            "only jobs over IPv6 need it; as root: sysctl net.ipv6.conf.lo.disable_ipv6=0",
        ),
        Err(error) => Finding::missing(format!("{name}: {error}"), "as root: ip link set lo up"),
    }
}

fn exchange(mut one: impl Write, mut other: impl Read) -> io::Result<()> {
    one.write_all(b"x")?;
    other.read_exact(&mut [0])
}

fn interfaces() -> Finding {
    match interface_addresses() {
        Ok(found) => {
            let beyond = found.iter().filter(|found| !found.address.is_loopback());
            let beyond: Vec<String> = beyond.map(|found| format!("{} {}", found.name, found.address)).collect();
            if beyond.is_empty() {
                let fix = "jobs on several hosts need one; start the container with a network";
                return Finding::missing("only loopback", fix);
            }
            Finding::ok(format!("{}; FARCALL_INTERFACE chooses", beyond.join(", ")))
        }
        Err(error) => Finding::missing(format!("{error}"), "allow netlink sockets in the sandbox"),
    }
}

fn memlock() -> Finding {
    match getrlimit(Resource::Memlock).current {
        None => Finding::ok("unlimited"),
        Some(bytes) if bytes >= 1 << 30 => Finding::ok(format!("{} MiB", bytes / MIB)),
        Some(bytes) => Finding::warn(
            format!("{} KiB: RDMA and pinned memory need more", bytes >> 10),
            "ulimit -l unlimited; LimitMEMLOCK=infinity for systemd, --ulimit memlock=-1 for containers",
        ),
    }
}

fn descriptors() -> Finding {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.map_or_else(|| "unlimited".to_owned(), |hard| hard.to_string());
    match limit.current {
        Some(soft) if soft < DESCRIPTORS_MIN => {
            Finding::warn(format!("{soft}, at most {hard}: a worker takes 2 or 3 a peer"), format!("ulimit -n {hard}"))
        }
        soft => {
            Finding::ok(format!("{}, at most {hard}", soft.map_or("unlimited".to_owned(), |soft| soft.to_string())))
        }
    }
}

fn io_uring() -> Finding {
    match probe::io_uring() {
        Ok(()) => Finding::ok("permitted; farcall does not use it yet"),
        Err(error) => Finding::missing(
            format!("{error}; farcall does not use it yet"),
            "none is needed; as root: sysctl kernel.io_uring_disabled=0",
        ),
    }
}

/// A file's text, empty if it cannot be read.
pub(super) fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}
