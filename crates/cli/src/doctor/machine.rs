//! Processors, memory, devices, libraries, and what surrounds this process.

use farcall::device::cuda;
use farcall::settings::Settings;
use farcall::transport::probe;

use super::kernel::read;
use super::{Finding, Probe};

pub(super) const PROBES: &[Probe] = &[
    ("processors", processors),
    ("numa", numa),
    ("memory", memory),
    ("container", container),
    ("cuda", cuda),
    ("ucx", ucx),
    ("rdma", rdma),
    ("settings", settings),
];

fn processors() -> Finding {
    let usable = std::thread::available_parallelism().map_or(1, usize::from);
    let online = read("/sys/devices/system/cpu/online");
    let quota = read("/sys/fs/cgroup/cpu.max");
    let quota = quota.trim();
    let limit = if quota.is_empty() || quota.starts_with("max") { "none".to_owned() } else { quota.to_owned() };
    let found = format!("{usable} usable, online {}, cgroup limit {limit}", online.trim());
    if usable < 2 {
        return Finding::warn(found, "give the process a second processor: taskset, --cpus, cpu.max");
    }
    Finding::ok(found)
}

fn numa() -> Finding {
    let nodes = read("/sys/devices/system/node/online");
    match nodes.trim() {
        "" => Finding::missing("the system does not tell its nodes", "none is needed on one socket; mount /sys"),
        "0" => Finding::ok("one node"),
        nodes => Finding::warn(
            format!("nodes {nodes}: memory of another node is slower"),
            "bind each worker and its device to one node: numactl --cpunodebind=N --membind=N",
        ),
    }
}

fn memory() -> Finding {
    let field = |name: &str| {
        let text = read("/proc/meminfo");
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
        line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).map(|kib| kib << 10)
    };
    let limit = read("/sys/fs/cgroup/memory.max").trim().parse::<u64>().ok();
    let used = read("/sys/fs/cgroup/memory.current").trim().parse::<u64>().unwrap_or(0);
    let (Some(total), Some(available)) = (field("MemTotal"), field("MemAvailable")) else {
        return Finding::missing("the system does not tell", "mount /proc");
    };
    let available = limit.map_or(available, |limit| available.min(limit.saturating_sub(used)));
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let limit = limit.map_or_else(|| "none".to_owned(), gib);
    let found = format!("{} of {} available, cgroup limit {limit}", gib(available), gib(total));
    if available < 1 << 30 {
        return Finding::warn(found, "free memory, or raise the cgroup's memory.max");
    }
    Finding::ok(found)
}

/// Hints: none of them is a fault by itself.
fn container() -> Finding {
    let mut hints = Vec::new();
    let identity = read("/proc/self/uid_map").split_whitespace().eq(["0", "0", "4294967295"]);
    if !identity {
        hints.push("a user namespace");
    }
    let status = read("/proc/self/status");
    if status.lines().any(|line| line.starts_with("Seccomp:") && !line.ends_with('0')) {
        hints.push("a seccomp filter");
    }
    if status.lines().any(|line| line.starts_with("NSpid:") && line.split_whitespace().count() > 2) {
        hints.push("a process namespace");
    }
    if ["/.dockerenv", "/run/.containerenv"].iter().any(|path| std::path::Path::new(path).exists()) {
        hints.push("a container's mark");
    }
    if hints.is_empty() {
        return Finding::ok("no sign of a container");
    }
    Finding::warn(
        format!("{}: workers in different ones reach each other over TCP alone", hints.join(", ")),
        "for one host's fast paths start them in one container, or with --network=host --ipc=host --pid=host",
    )
}

fn cuda() -> Finding {
    match cuda::probe() {
        Ok((version, devices)) => {
            let devices: Vec<String> = devices
                .iter()
                .map(|device| format!("{} ({}, {} GiB)", device.name, device.capability, device.memory_bytes >> 30))
                .collect();
            Finding::ok(format!("driver for CUDA {version}: {}", devices.join(", ")))
        }
        Err(unavailable) => split(&unavailable.to_string()),
    }
}

fn ucx() -> Finding {
    match probe::ucx() {
        Ok(version) => Finding::ok(format!("UCX {version}; farcall does not use it yet")),
        Err(unavailable) => split(&unavailable.to_string()),
    }
}

/// A text that says what is wrong, then what to do.
fn split(text: &str) -> Finding {
    match text.split_once(": ") {
        Some((found, fix)) => Finding::missing(found, fix),
        None => Finding::missing(text, "look at the documentation"),
    }
}

fn rdma() -> Finding {
    let devices = std::fs::read_dir("/sys/class/infiniband");
    let mut devices: Vec<String> =
        devices.into_iter().flatten().flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    devices.sort();
    if devices.is_empty() {
        return Finding::missing(
            "no RDMA device in /sys/class/infiniband",
            "only hosts with such a NIC have one: load its driver, pass /dev/infiniband into the container",
        );
    }
    Finding::ok(format!("{}; farcall does not use them yet", devices.join(", ")))
}

fn settings() -> Finding {
    let checked =
        Settings::from_env().and_then(|settings| settings.device().map(drop).and_then(|()| settings.key().map(drop)));
    match checked {
        Ok(()) => Finding::ok("all are understood; `farcall config show --origin` lists them"),
        Err(error) => Finding::warn(error.to_string(), "correct it; `farcall config show --origin` lists all settings"),
    }
}
