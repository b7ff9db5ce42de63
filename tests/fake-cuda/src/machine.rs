//! Devices that are threads and memory of the host.
//!
//! Invariant F1: operations of one stream run in order; a wait lets a stream go on when the recorded point has been reached.
//! Invariant F2: an operation reaches device memory only while it is allocated, whatever was said when it was enqueued: else the
//! device faults, for good.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, mpsc};
use std::time::Duration;

use crate::settings::Settings;

pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;

/// Added to the addresses of device memory: no process of x86-64 or aarch64 has memory there.
const DEVICE_BIT: u64 = 1 << 62;

pub(crate) struct Machine {
    pub(crate) devices: Vec<Device>,
}

pub(crate) struct Device {
    /// By the address that the caller sees.
    memory: RwLock<BTreeMap<u64, Box<[u64]>>>,
    used_bytes: AtomicUsize,
    /// Operations that ran.
    ran: AtomicU64,
    /// The status of a fault, for good; 0 for none.
    fault: AtomicU32,
    fault_after: Option<u64>,
}

/// A place in memory: of the host, or of some device.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Host(u64),
    Device(u64),
}

pub(crate) enum Op {
    /// Rows of `len` bytes.
    Copy {
        from: Place,
        from_step: usize,
        to: Place,
        to_step: usize,
        len: usize,
        rows: usize,
    },
    Fill {
        to: Place,
        byte: u8,
        len: usize,
    },
    Delay(Duration),
    Wait(Arc<Event>, u64),
    Record(Arc<Event>, u64),
}

/// A point that may be recorded again and again.
#[derive(Default)]
pub(crate) struct Event {
    state: Mutex<Points>,
    reached: Condvar,
}

#[derive(Default)]
struct Points {
    recorded: u64,
    reached: u64,
}

pub(crate) struct Stream {
    pub(crate) device: usize,
    queue: Mutex<mpsc::Sender<Op>>,
    enqueued: AtomicU64,
    done: Arc<AtomicU64>,
}

pub(crate) fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let settings = Settings::of_process();
        let device = |index| Device {
            memory: RwLock::default(),
            used_bytes: AtomicUsize::new(0),
            ran: AtomicU64::new(0),
            fault: AtomicU32::new(0),
            fault_after: settings.fault_after.filter(|_| index == 0),
        };
        Machine { devices: (0..settings.devices).map(device).collect() }
    })
}

impl Device {
    pub(crate) fn fault(&self) -> u32 {
        self.fault.load(Ordering::Acquire)
    }

    /// Bytes that are not allocated.
    pub(crate) fn free_bytes(&self) -> usize {
        Settings::of_process().memory_bytes.saturating_sub(self.used_bytes.load(Ordering::Relaxed))
    }

    pub(crate) fn alloc(&self, len: usize) -> Result<u64, u32> {
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        if len > self.free_bytes() {
            return Err(OUT_OF_MEMORY);
        }
        self.used_bytes.fetch_add(len, Ordering::Relaxed);
        // Not zero: nobody may rely on what fresh memory holds.
        let words = vec![0xa5a5_a5a5_a5a5_a5a5_u64; len.div_ceil(8)].into_boxed_slice();
        let address = words.as_ptr() as u64 | DEVICE_BIT;
        self.memory.write().unwrap_or_else(PoisonError::into_inner).insert(address, words);
        Ok(address)
    }

    pub(crate) fn free(&self, address: u64) -> Result<(), u32> {
        let mut memory = self.memory.write().unwrap_or_else(PoisonError::into_inner);
        let words = memory.remove(&address).ok_or(INVALID_VALUE)?;
        self.used_bytes.fetch_sub(words.len() * 8, Ordering::Relaxed);
        Ok(())
    }
}

impl Machine {
    /// The device whose allocation has these bytes.
    pub(crate) fn owner(&self, address: u64, len: usize) -> Option<usize> {
        self.devices.iter().position(|device| {
            let memory = device.memory.read().unwrap_or_else(PoisonError::into_inner);
            let found = memory.range((Bound::Unbounded, Bound::Included(address))).next_back();
            found.is_some_and(|(start, words)| address + len as u64 <= start + 8 * words.len() as u64)
        })
    }

    /// Runs an operation, under the locks of all memory that a free would take (F2).
    fn run(&self, device: &Device, op: &Op) {
        let held: Vec<_> =
            self.devices.iter().map(|device| device.memory.read().unwrap_or_else(PoisonError::into_inner)).collect();
        let real = |place: Place, len: usize| match place {
            Place::Host(address) => Some(address as usize),
            Place::Device(address) => held.iter().find_map(|memory| {
                let (start, words) = memory.range((Bound::Unbounded, Bound::Included(address))).next_back()?;
                let inside = address + len as u64 <= start + 8 * words.len() as u64;
                inside.then_some((address & !DEVICE_BIT) as usize)
            }),
        };
        let ran = device.ran.fetch_add(1, Ordering::AcqRel);
        let mut good = device.fault_after.is_none_or(|last| ran < last);
        match *op {
            Op::Copy { from, from_step, to, to_step, len, rows } if good => {
                let span = |step: usize| step * rows.saturating_sub(1) + len;
                if let (Some(from), Some(to)) = (real(from, span(from_step)), real(to, span(to_step))) {
                    for row in 0..rows {
                        let (from, to) = ((from + row * from_step) as *const u8, (to + row * to_step) as *mut u8);
                        // SAFETY: device memory was looked up and is held; host memory is the caller's, which keeps it until then.
                        unsafe { std::ptr::copy(from, to, len) };
                    }
                } else {
                    good = false;
                }
            }
            Op::Fill { to, byte, len } if good => match real(to, len) {
                // SAFETY: as above.
                Some(to) => unsafe { std::ptr::write_bytes(to as *mut u8, byte, len) },
                None => good = false,
            },
            _ => {}
        }
        if !good {
            device.fault.store(ILLEGAL_ADDRESS, Ordering::Release);
        }
    }
}

impl Event {
    /// Notes a recording; the point that reaches it.
    pub(crate) fn record(&self) -> u64 {
        let mut state = lock(&self.state);
        state.recorded += 1;
        state.recorded
    }

    /// The newest recording.
    pub(crate) fn recorded(&self) -> u64 {
        lock(&self.state).recorded
    }

    pub(crate) fn is_reached(&self) -> bool {
        let state = lock(&self.state);
        state.reached >= state.recorded
    }

    fn reach(&self, point: u64) {
        let mut state = lock(&self.state);
        state.reached = state.reached.max(point);
        drop(state);
        self.reached.notify_all();
    }

    fn wait(&self, point: u64) {
        let mut state = lock(&self.state);
        while state.reached < point {
            state = self.reached.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Stream {
    pub(crate) fn start(device: usize) -> std::io::Result<Self> {
        static STARTED: AtomicU64 = AtomicU64::new(0);
        let (queue, ops) = mpsc::channel::<Op>();
        let done = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&done);
        let seed = Settings::of_process().seed;
        let mut random =
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ STARTED.fetch_add(1, Ordering::Relaxed).rotate_left(32);
        std::thread::Builder::new().name(format!("fake-gpu-{device}")).spawn(move || {
            let machine = machine();
            for op in ops {
                if seed != 0 {
                    pause(&mut random);
                }
                machine.perform(device, op);
                counter.fetch_add(1, Ordering::Release);
            }
        })?;
        Ok(Self { device, queue: Mutex::new(queue), enqueued: AtomicU64::new(0), done })
    }

    pub(crate) fn enqueue(&self, op: Op) {
        let queue = lock(&self.queue);
        self.enqueued.fetch_add(1, Ordering::Relaxed);
        // The thread ends with the process: it takes whatever comes.
        let _ = queue.send(op);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.done.load(Ordering::Acquire) >= self.enqueued.load(Ordering::Relaxed)
    }
}

impl Machine {
    fn perform(&self, device: usize, op: Op) {
        let device = &self.devices[device];
        match op {
            // Points are reached on a device that failed, too: nobody hangs, and every query says that it failed.
            Op::Wait(event, point) => event.wait(point),
            Op::Record(event, point) => event.reach(point),
            _ if device.fault() != 0 => {}
            Op::Delay(duration) => {
                device.ran.fetch_add(1, Ordering::AcqRel);
                std::thread::sleep(duration);
            }
            op => self.run(device, &op),
        }
    }
}

/// Nothing most of the time, sometimes others' turn, sometimes up to a quarter of a millisecond.
fn pause(random: &mut u64) {
    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    match *random >> 61 {
        0..=4 => {}
        5 | 6 => std::thread::yield_now(),
        _ => std::thread::sleep(Duration::from_micros((*random >> 32) % 250)),
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
