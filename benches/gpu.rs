//! What do the parts of the CUDA backend cost, and how far from the driver's own share are they?
//!
//! One subject a run, so that each can have a time limit of its own; a line of JSON for each figure on standard output.
//! `gpu capabilities|driver|host|latency|copies|alloc [--quick]`, and `gpu table FILE` prints the lines of a file for people.
//! Medians, with the 10th and 90th percentile beside them; buffers are rotated past the L2 cache. The machine is named in the
//! lines of `capabilities`. Figures of a fake driver mean nothing.
//! Run: `cargo run --release -p farcall-benches --bin gpu -- copies`, or all of it by `cargo xtask gpu-pack`.
#![expect(clippy::print_stdout, reason = "a bench prints its figures")]

use std::fmt::Write as _;
use std::hint::black_box;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use farcall::device::cuda::{self, Answer};
use farcall::device::{Check, Config, Cuda, DeviceFuture};
use farcall::{Device, DeviceError, Runtime, Storage, Stream};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const CUDA: Device = Device::Cuda(0);
const LONG: Duration = Duration::from_secs(60);
const MIB: usize = 1 << 20;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let bench = Bench { quick: arguments.iter().any(|argument| argument == "--quick") };
    let outcome = match arguments.first().map(String::as_str) {
        Some("capabilities") => bench.capabilities(),
        Some("driver") => bench.driver(),
        Some("host") => bench.host(),
        Some("latency") => bench.latency(),
        Some("copies") => bench.copies(),
        Some("alloc") => bench.alloc(),
        Some("table") => table(arguments.get(1)),
        _ => {
            println!("usage: gpu capabilities|driver|host|latency|copies|alloc [--quick], or gpu table FILE");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            Line::new("error", "this subject").text("error", &error.to_string()).print();
            // 3: what is needed is not there.
            let absent = matches!(error.downcast_ref(), Some(DeviceError::Unavailable { .. }));
            ExitCode::from(if absent { 3 } else { 1 })
        }
    }
}

/// A figure as a line of JSON.
struct Line(String);

impl Line {
    fn new(subject: &str, what: &str) -> Self {
        Self("{".to_owned()).text("subject", subject).text("what", what)
    }

    fn text(mut self, key: &str, value: &str) -> Self {
        let plain: String =
            value.chars().map(|c| if c == '"' || c == '\\' || c.is_control() { '\'' } else { c }).collect();
        let comma = if self.0.len() > 1 { "," } else { "" };
        let _ = write!(self.0, "{comma}\"{key}\":\"{plain}\"");
        self
    }

    fn number(mut self, key: &str, value: f64) -> Self {
        let _ = write!(self.0, ",\"{key}\":{value:.3}");
        self
    }

    fn print(self) {
        println!("{}}}", self.0);
    }
}

/// Times of one thing.
struct Times(Vec<f64>);

impl Times {
    /// One call in microseconds, over `rounds`.
    fn of(rounds: usize, mut call: impl FnMut() -> Result<Duration>) -> Result<Self> {
        // The first ones warm up.
        for _ in 0..rounds.div_ceil(10) {
            call()?;
        }
        let mut times = (0..rounds).map(|_| Ok(call()?.as_secs_f64() * 1e6)).collect::<Result<Vec<_>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(Self(times))
    }

    fn at(&self, share: f64) -> f64 {
        self.0[((self.0.len() - 1) as f64 * share) as usize]
    }

    fn line(&self, subject: &str, what: &str) -> Line {
        let line = Line::new(subject, what).number("median_us", self.at(0.5));
        line.number("p10_us", self.at(0.1)).number("p90_us", self.at(0.9)).number("rounds", self.0.len() as f64)
    }
}

struct Bench {
    quick: bool,
}

impl Bench {
    fn rounds(&self, rounds: usize) -> usize {
        if self.quick { 3 } else { rounds }
    }

    /// As a program would run in production: unchecked.
    fn runtime(&self) -> Result<Runtime> {
        Ok(Runtime::new(Config { cuda: Cuda::Require, check: Check::Off, ..Config::default() })?)
    }

    fn capabilities(&self) -> Result<()> {
        let runtime = self.runtime()?;
        for device in runtime.devices().iter().filter(|device| !device.is_host()) {
            let Some(info) = runtime.cuda_info(*device) else { continue };
            let line = Line::new("device", &device.to_string()).text("name", &info.name);
            let line = line.text("capability", &info.capability.to_string());
            line.number("memory_mib", (info.memory_bytes / MIB) as f64).print();
            for capability in cuda::capabilities(*device)? {
                let answer = match capability.answer {
                    Answer::Works => "works".to_owned(),
                    Answer::Value(value) => value.to_string(),
                    Answer::Refused { code, name } => format!("unsupported({code}) {name}"),
                    Answer::Missing => "unsupported(missing)".to_owned(),
                    other => format!("{other:?}"),
                };
                Line::new("capability", capability.name)
                    .text("device", &device.to_string())
                    .text("answer", &answer)
                    .print();
            }
        }
        Ok(())
    }

    /// The driver's own calls.
    fn driver(&self) -> Result<()> {
        for (call, nanoseconds) in cuda::driver_costs(CUDA, self.rounds(200))? {
            Line::new("driver", call).number("median_us", nanoseconds / 1e3).print();
        }
        Ok(())
    }

    /// What enqueuing costs the host.
    fn host(&self) -> Result<()> {
        let runtime = self.runtime()?;
        let [stream, other] = [runtime.stream(CUDA)?, runtime.stream(CUDA)?];
        let mut target = stream.alloc(256)?;
        let rounds = self.rounds(300);
        // Ten of each, so that the clock's own cost does not show; then idle again, out of the measurement.
        let ten = |what: &str, call: &mut dyn FnMut() -> Result<()>| -> Result<()> {
            let times = Times::of(rounds, || {
                let started = Instant::now();
                for _ in 0..10 {
                    call()?;
                }
                let taken = started.elapsed() / 10;
                stream.synchronize(LONG)?;
                other.synchronize(LONG)?;
                Ok(taken)
            })?;
            times.line("host", what).print();
            Ok(())
        };
        ten("fill of 256 bytes", &mut || Ok(stream.fill(&mut target, 1)?))?;
        ten("fill of 256 bytes, by our kernel", &mut || Ok(stream.fill_by_kernel(&mut target, 1)?))?;
        ten("launch of an empty delay", &mut || Ok(stream.delay(Duration::ZERO)?))?;
        ten("launch and record", &mut || {
            stream.delay(Duration::ZERO)?;
            drop(black_box(stream.record()));
            Ok(())
        })?;
        ten("launch, record, another stream waits", &mut || {
            stream.delay(Duration::ZERO)?;
            other.wait(&stream.record());
            Ok(other.delay(Duration::ZERO)?)
        })?;
        let past = stream.record();
        past.block(LONG)?;
        ten("query of a past event", &mut || {
            black_box(past.query()?);
            Ok(())
        })?;
        ten("lease of a stream", &mut || {
            black_box(runtime.stream(CUDA)?);
            Ok(())
        })
    }

    /// From the enqueuing of work that takes a known time until the host knows, by each way of waiting.
    fn latency(&self) -> Result<()> {
        let runtime = self.runtime()?;
        let stream = runtime.stream(CUDA)?;
        let rounds = self.rounds(100);
        for work_us in [0_u64, 50, 500, 5000] {
            let work = Duration::from_micros(work_us);
            let rounds = if work_us >= 5000 { rounds.min(40) } else { rounds };
            let measure = |way: &str, know: &mut dyn FnMut() -> Result<()>| -> Result<()> {
                let times = Times::of(rounds, || {
                    let started = Instant::now();
                    stream.delay(work)?;
                    know()?;
                    Ok(started.elapsed())
                })?;
                times
                    .line("latency", &format!("{way}, work of {work_us} us"))
                    .number("work_us", work_us as f64)
                    .print();
                Ok(())
            };
            measure("query in a loop", &mut || {
                let event = stream.record();
                while !event.query()? {
                    std::hint::spin_loop();
                }
                Ok(())
            })?;
            measure("block", &mut || Ok(stream.record().block(LONG)?))?;
            measure("future, thread parked", &mut || {
                let mut bytes = stream.alloc(8)?;
                stream.fill(&mut bytes, 1)?;
                DeviceFuture::<Storage>::ready(bytes.freeze(&stream)).wait(LONG)?;
                Ok(())
            })?;
            measure("callback", &mut || {
                let (told, hear) = mpsc::channel();
                stream.record().on_ready(move |outcome| drop(told.send(outcome)));
                Ok(hear.recv_timeout(LONG)??)
            })?;
        }
        Ok(())
    }

    fn copies(&self) -> Result<()> {
        let runtime = self.runtime()?;
        let stream = runtime.stream(CUDA)?;
        let sizes: &[usize] =
            if self.quick { &[4096, MIB] } else { &[4096, 64 << 10, MIB, 16 * MIB, 64 * MIB, 256 * MIB] };
        for &len in sizes {
            // Buffers of 256 MiB in all: several times the L2 cache of any GPU.
            let count = if self.quick { 2 } else { (256 * MIB / len).clamp(1, 64) };
            let rounds = self.rounds(if len >= 64 * MIB { 30 } else { 60 });
            let filled = |mut bytes: farcall::device::StorageMut, stream: &Stream| -> Result<Storage> {
                if bytes.device().is_host() {
                    bytes.as_bytes_mut()?.fill(0x5a);
                } else {
                    stream.fill(&mut bytes, 0x5a)?;
                }
                Ok(bytes.freeze(stream))
            };
            for (what, from, to) in [
                ("pinned to device", Memory::Pinned, Memory::Device),
                ("pageable to device", Memory::Pageable, Memory::Device),
                ("device to pinned", Memory::Device, Memory::Pinned),
                ("device to pageable", Memory::Device, Memory::Pageable),
                ("device to device", Memory::Device, Memory::Device),
            ] {
                let sources =
                    (0..count).map(|_| filled(from.alloc(&runtime, len)?, &stream)).collect::<Result<Vec<_>>>()?;
                let mut targets =
                    (0..count).map(|_| to.alloc(&runtime, len)).collect::<std::result::Result<Vec<_>, _>>()?;
                let mut turn = 0;
                stream.synchronize(LONG)?;
                let mut enqueued = Duration::ZERO;
                let times = Times::of(rounds, || {
                    turn = (turn + 1) % count;
                    let started = Instant::now();
                    stream.copy(&sources[turn], &mut targets[turn])?;
                    enqueued = started.elapsed();
                    stream.synchronize(LONG)?;
                    Ok(started.elapsed())
                })?;
                // As many in a row as there are buffers, for the rate without the wait between them.
                let repeats = if self.quick { 2 } else { (512 * MIB / len).clamp(4, 200) };
                let started = Instant::now();
                for index in 0..repeats {
                    stream.copy(&sources[index % count], &mut targets[index % count])?;
                }
                stream.synchronize(LONG)?;
                let rate = (repeats * len) as f64 / started.elapsed().as_secs_f64() / 1e9;
                let line = times.line("copies", &format!("{what}, {len} bytes")).number("bytes", len as f64);
                line.number("gb_per_s", rate).number("last_enqueue_us", enqueued.as_secs_f64() * 1e6).print();
                if let Some(target) = targets.pop() {
                    self.expect_bytes(&runtime, target.freeze(&stream))?;
                }
            }
        }
        Ok(())
    }

    /// A copy that is fast and wrong would be a figure, too.
    fn expect_bytes(&self, runtime: &Runtime, storage: Storage) -> Result<()> {
        let stream = runtime.stream(CUDA)?;
        let host = if storage.device().is_host() {
            storage
        } else {
            let mut back = runtime.alloc_pinned(storage.len())?;
            stream.copy(&storage, &mut back)?;
            back.freeze(&stream)
        };
        host.ready_event().block(LONG)?;
        let wrong = host.as_bytes()?.iter().filter(|byte| **byte != 0x5a).count();
        if wrong == 0 { Ok(()) } else { Err(format!("{wrong} of {} bytes are wrong", host.len()).into()) }
    }

    fn alloc(&self) -> Result<()> {
        let runtime = self.runtime()?;
        let stream = runtime.stream(CUDA)?;
        for len in [4096, MIB, 64 * MIB] {
            let times = Times::of(self.rounds(1000), || {
                let started = Instant::now();
                drop(black_box(stream.alloc(len)?));
                Ok(started.elapsed())
            })?;
            times.line("alloc", &format!("warm block of {len} bytes, and back")).print();
            let times = Times::of(self.rounds(300), || {
                let started = Instant::now();
                let mut bytes = stream.alloc(len)?;
                stream.fill(&mut bytes, 1)?;
                drop(bytes.freeze(&stream));
                let taken = started.elapsed();
                stream.synchronize(LONG)?;
                Ok(taken)
            })?;
            times.line("alloc", &format!("block of {len} bytes, filled, back while in use")).print();
            let times = Times::of(self.rounds(20), || {
                runtime.trim();
                let started = Instant::now();
                drop(black_box(stream.alloc(len)?));
                Ok(started.elapsed())
            })?;
            times.line("alloc", &format!("cold block of {len} bytes")).print();
            let times = Times::of(self.rounds(10), || {
                runtime.trim();
                let started = Instant::now();
                drop(black_box(runtime.alloc_pinned(len)?));
                Ok(started.elapsed())
            })?;
            times.line("alloc", &format!("cold pinned block of {len} bytes")).print();
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Memory {
    Pinned,
    Pageable,
    Device,
}

impl Memory {
    fn alloc(self, runtime: &Runtime, len: usize) -> std::result::Result<farcall::device::StorageMut, DeviceError> {
        match self {
            Self::Pinned => runtime.alloc_pinned(len),
            Self::Pageable => runtime.alloc_host(len),
            Self::Device => runtime.alloc(CUDA, len),
        }
    }
}

/// The lines of a file, for people. It reads what this program writes, and no JSON beyond that.
fn table(file: Option<&String>) -> Result<()> {
    let text = std::fs::read_to_string(file.ok_or("which file?")?)?;
    let field = |line: &str, key: &str| -> Option<String> {
        let rest = line.split_once(&format!("\"{key}\":"))?.1;
        let value = match rest.strip_prefix('"') {
            Some(text) => text.split('"').next()?,
            None => rest.split([',', '}']).next()?,
        };
        Some(value.to_owned())
    };
    for line in text.lines() {
        let [subject, what] = ["subject", "what"].map(|key| field(line, key).unwrap_or_default());
        let value = |key| field(line, key);
        let figure = match (value("median_us"), value("gb_per_s")) {
            (Some(median), Some(rate)) => format!("{median:>12} us {rate:>9} GB/s"),
            (Some(median), None) => format!("{median:>12} us"),
            _ => value("answer").or_else(|| value("name")).or_else(|| value("error")).unwrap_or_default(),
        };
        println!("{subject:<11} {what:<52} {figure}");
    }
    Ok(())
}
