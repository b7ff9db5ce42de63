//! What the machine can do without farcall, measured in the same run: copies, a futex between two processes, raw sockets.
//!
//! The other end runs in the called worker, on threads that sleep while they are not asked. A socket's message is a length and
//! so many bytes, its answer 8 bytes, or as many if the length has the bit [`ECHO`]; both ends use warm memory and block.
//! Invariant R1: a raw listener takes one connection, which must know its token, within [`ACCEPT_MAX`], and no message that is
//! longer than was agreed on over the authenticated connection of farcall.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use farcall::prelude::*;
use farcall::{Channel, TensorMut};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde::{Deserialize, Serialize};

use super::functions::sum;
use super::futex;
use super::plan::{Memory, Op};
use super::report::{Limit, RowLimit};

const ACCEPT_MAX: Duration = Duration::from_secs(10);
/// Of each figure: until both are reached.
const TIME_MIN: Duration = Duration::from_millis(60);
const ROUNDS_MIN: usize = 5;
const ROUNDS_MAX: usize = 20_000;
/// Of [`Kind::TcpTuned`], each way.
const TUNED_BYTES: usize = 512 << 10;

/// Of a message's length: all of it is wanted back.
const ECHO: u64 = 1 << 63;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// A word in shared memory, woken through the kernel, there and back.
    Futex,
    /// The same, looked at all the time.
    Polled,
    /// A copy from the program's warm memory into a warm slab.
    Copy,
    /// The sum of all words of warm memory.
    Read,
    /// A message by a blocking Unix socket, and its answer.
    Unix,
    /// The same over TCP.
    Tcp,
    /// The same with socket buffers of 512 KiB, which are better on loopback.
    TcpTuned,
    /// The first, asked for bytes all the time.
    TcpPolled,
}

impl Kind {
    const ALL: [Self; 8] =
        [Self::Futex, Self::Polled, Self::Copy, Self::Read, Self::Unix, Self::Tcp, Self::TcpTuned, Self::TcpPolled];

    fn name(self) -> &'static str {
        match self {
            Self::Futex => "futex",
            Self::Polled => "polled word",
            Self::Copy => "memcpy",
            Self::Read => "memread",
            Self::Unix => "raw unix",
            Self::Tcp => "raw tcp",
            Self::TcpTuned => "raw tcp 512K",
            Self::TcpPolled => "polled tcp",
        }
    }

    /// What the bytes of a row cannot be faster than: of each of these kinds that lead there the best, all of them added.
    fn of_row(op: Op, path: Channel, spins: bool, memory: Memory) -> Vec<&'static [Self]> {
        let wire = match path {
            Channel::Unix => &[Self::Unix][..],
            Channel::Tcp if spins => &[Self::TcpPolled],
            Channel::Tcp => &[Self::Tcp, Self::TcpTuned],
            // Nothing moves but a word.
            _ if spins => &[Self::Polled],
            _ => &[Self::Futex],
        };
        // What is in no slab is copied into one; the kernel takes it from anywhere.
        let is_copied = memory == Memory::Foreign && path == Channel::Shm;
        let copy = is_copied.then_some(&[Self::Copy][..]);
        match op {
            Op::Rate => Vec::new(),
            Op::Call => vec![wire],
            Op::Sink | Op::Echo => [wire].into_iter().chain(copy).collect(),
            Op::Read => [wire].into_iter().chain(copy).chain([&[Self::Read][..]]).collect(),
        }
    }
}

/// Where the other end of a raw connection listens, and what it must be told first.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Listening {
    address: Address,
    token: [u8; 16],
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Address {
    Tcp(SocketAddr),
    /// A name in the abstract namespace.
    Unix(Vec<u8>),
}

/// Listens for one raw connection.
#[farcall::function(name = "bench::listen")]
fn listen(cx: &Call, kind: Kind, bytes_max: u64) -> farcall::Result<Listening> {
    let own = cx.agent().workers().nth(cx.agent().worker().rank as usize);
    let address = own.map_or(IpAddr::from([127, 0, 0, 1]), |own| own.address.ip());
    Ok(serve(kind, address, bytes_max)?)
}

/// The page of a futex, shared by this worker, and a thread of it that answers, as it is asked.
#[farcall::function(name = "bench::futex")]
fn share_futex(polled: bool) -> farcall::Result<futex::Shared> {
    Ok(futex::serve(polled)?)
}

fn serve(kind: Kind, address: IpAddr, bytes_max: u64) -> io::Result<Listening> {
    let mut token = [0; 16];
    rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())?;
    let spawn = |run: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name("bench-raw".into()).spawn(run);
    let address = match kind {
        Kind::Unix => {
            let name = [b"farcall-bench-", token.map(|byte| b'a' + byte % 26).as_slice()].concat();
            let listener = UnixListener::bind_addr(&std::os::unix::net::SocketAddr::from_abstract_name(&name)?)?;
            listener.set_nonblocking(true)?;
            spawn(Box::new(move || {
                let accepted = accept(|| listener.accept().map(|(socket, _)| socket));
                // Its end, whatever it is, is seen by the other side, which reports it.
                let _ = accepted.and_then(|socket| {
                    socket.set_nonblocking(false)?;
                    answer(socket, token, bytes_max)
                });
            }))?;
            Address::Unix(name)
        }
        _ => {
            let listener = TcpListener::bind((address, 0))?;
            if kind == Kind::TcpTuned {
                tune(&listener)?;
            }
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            spawn(Box::new(move || {
                let accepted = accept(|| listener.accept().map(|(socket, _)| socket));
                let _ = accepted.and_then(|socket| {
                    socket.set_nonblocking(false)?;
                    socket.set_nodelay(true)?;
                    if kind == Kind::TcpPolled {
                        answer(Polling(socket), token, bytes_max)
                    } else {
                        answer(socket, token, bytes_max)
                    }
                });
            }))?;
            Address::Tcp(address)
        }
    };
    Ok(Listening { address, token })
}

fn accept<S>(mut accept: impl FnMut() -> io::Result<S>) -> io::Result<S> {
    let deadline = Instant::now() + ACCEPT_MAX;
    loop {
        match accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            accepted => return accepted,
        }
    }
}

fn answer(mut socket: impl Read + Write, token: [u8; 16], bytes_max: u64) -> io::Result<()> {
    let mut told = [0; 16];
    socket.read_exact(&mut told)?;
    if told != token {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    // Written to, so that its pages are there.
    let mut buffer = vec![1_u8; usize::try_from(bytes_max).unwrap_or(0)];
    let mut len = [0; 8];
    loop {
        socket.read_exact(&mut len)?;
        let len = u64::from_le_bytes(len);
        let target = usize::try_from(len & !ECHO).ok().and_then(|len| buffer.get_mut(..len));
        let target = target.ok_or(io::ErrorKind::InvalidData)?;
        socket.read_exact(target)?;
        socket.write_all(if len & ECHO == 0 { &[1; 8] } else { target })?;
    }
}

fn tune(socket: &impl std::os::fd::AsFd) -> io::Result<()> {
    rustix::net::sockopt::set_socket_recv_buffer_size(socket, TUNED_BYTES)?;
    Ok(rustix::net::sockopt::set_socket_send_buffer_size(socket, TUNED_BYTES)?)
}

/// A socket that is asked for bytes all the time, until there were none for long: then it sleeps.
struct Polling(TcpStream);

/// That is long.
const POLL_MAX: Duration = Duration::from_millis(5);

impl Read for Polling {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let began = Instant::now();
        loop {
            match rustix::net::recv(&self.0, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((len, _)) => return Ok(len),
                Err(Errno::AGAIN | Errno::INTR) if began.elapsed() < POLL_MAX => {}
                Err(Errno::AGAIN | Errno::INTR) => return self.0.read(buffer),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for Polling {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// This end of what is measured.
enum Instrument {
    Memory,
    Futex(futex::Page),
    Unix(UnixStream),
    Tcp(TcpStream),
    Polling(Polling),
}

/// The instruments, and why some are missing.
pub(crate) struct Limits {
    instruments: BTreeMap<Kind, Instrument>,
    pub(crate) skipped: Vec<(&'static str, String)>,
    source: Vec<u8>,
    target: Vec<u8>,
    /// For copies; `None` if there is no memory for it.
    slab: Option<TensorMut>,
}

impl Limits {
    /// Connects to worker 1 by each kind that leads there.
    pub(crate) fn connect(agent: &Agent, bytes_max: u64, same_host: bool) -> Self {
        let len = bytes_max as usize;
        let (source, target) = (vec![7; len], vec![1; len]);
        let slab = TensorMut::empty(DType::U8, &[len]).ok();
        let mut limits = Self { instruments: BTreeMap::new(), skipped: Vec::new(), source, target, slab };
        for kind in Kind::ALL {
            match limits.instrument(agent, kind, bytes_max, same_host) {
                Ok(instrument) => drop(limits.instruments.insert(kind, instrument)),
                Err(error) => limits.skipped.push((kind.name(), error)),
            }
        }
        limits
    }

    fn instrument(&mut self, agent: &Agent, kind: Kind, bytes_max: u64, same_host: bool) -> Result<Instrument, String> {
        let text = |error: io::Error| error.to_string();
        if matches!(kind, Kind::Futex | Kind::Polled | Kind::Unix) && !same_host {
            return Err("the other worker is on another host".to_owned());
        }
        match kind {
            Kind::Copy => {
                let slab = self.slab.as_mut().ok_or("no memory for a slab")?;
                return slab.fill(1_u8).map(|()| Instrument::Memory).map_err(|error| error.to_string());
            }
            Kind::Read => return Ok(Instrument::Memory),
            Kind::Futex | Kind::Polled => {
                let polled = kind == Kind::Polled;
                let shared = agent.to(1).call(share_futex, (polled,)).wait().map_err(|error| error.to_string())?;
                return futex::Page::open(&shared).map(Instrument::Futex).map_err(text);
            }
            _ => {}
        }
        let listening = agent.to(1).call(listen, (kind, bytes_max)).wait().map_err(|error| error.to_string())?;
        let instrument = match &listening.address {
            Address::Unix(name) => {
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name).map_err(text)?;
                Instrument::Unix(UnixStream::connect_addr(&address).map_err(text)?)
            }
            Address::Tcp(address) => {
                let socket = TcpStream::connect_timeout(address, ACCEPT_MAX).map_err(text)?;
                socket.set_nodelay(true).map_err(text)?;
                if kind == Kind::TcpTuned {
                    tune(&socket).map_err(text)?;
                }
                Instrument::Tcp(socket)
            }
        };
        match &instrument {
            Instrument::Unix(socket) => {
                begin(socket, |socket, within| socket.set_read_timeout(within), listening.token)
            }
            Instrument::Tcp(socket) => begin(socket, |socket, within| socket.set_read_timeout(within), listening.token),
            _ => Ok(()),
        }
        .map_err(text)?;
        Ok(match instrument {
            Instrument::Tcp(socket) if kind == Kind::TcpPolled => Instrument::Polling(Polling(socket)),
            instrument => instrument,
        })
    }

    /// Every kind at every size: the table of limits.
    pub(crate) fn table(&mut self, sizes: &[u64]) -> io::Result<Vec<Limit>> {
        let mut limits = Vec::new();
        for kind in Kind::ALL {
            let is_word = matches!(kind, Kind::Futex | Kind::Polled);
            let sizes = if is_word { &[8][..] } else { sizes };
            for size_bytes in sizes.iter().copied() {
                let Some(us) = self.measure(kind, size_bytes, false)? else { continue };
                let gb_per_s = (!is_word).then_some(size_bytes as f64 / us / 1e3);
                limits.push(Limit { name: kind.name().to_owned(), size_bytes, p50_us: us, gb_per_s });
            }
        }
        Ok(limits)
    }

    /// What a row is compared with, measured now.
    pub(crate) fn of_row(
        &mut self,
        op: Op,
        size_bytes: u64,
        path: Channel,
        spins: bool,
        memory: Memory,
    ) -> io::Result<Option<RowLimit>> {
        let (mut names, mut us, echo) = (Vec::new(), 0.0, op == Op::Echo);
        for kinds in Kind::of_row(op, path, spins, memory) {
            let mut best: Option<(f64, Kind)> = None;
            for kind in kinds {
                if let Some(us) = self.measure(*kind, size_bytes, echo)?
                    && best.is_none_or(|(least, _)| us < least)
                {
                    best = Some((us, *kind));
                }
            }
            let Some((least, kind)) = best else { return Ok(None) };
            us += least;
            names.push(if echo && !matches!(kind, Kind::Futex | Kind::Polled) {
                format!("{} echo", kind.name())
            } else {
                kind.name().to_owned()
            });
        }
        Ok((!names.is_empty()).then(|| RowLimit { name: names.join(" + "), p50_us: us }))
    }

    /// The median time, microseconds; `None` without the instrument.
    fn measure(&mut self, kind: Kind, size_bytes: u64, echo: bool) -> io::Result<Option<f64>> {
        let Some(instrument) = self.instruments.get_mut(&kind) else { return Ok(None) };
        let len = size_bytes as usize;
        let (source, target) = (&self.source[..len], &mut self.target[..len]);
        let slab = self.slab.as_mut().and_then(|slab| slab.as_mut_slice::<u8>().ok()).unwrap_or_default();
        let mut short = [0; 8];
        let started = Instant::now();
        let mut times = Vec::new();
        while times.len() < ROUNDS_MAX && (times.len() < ROUNDS_MIN || started.elapsed() < TIME_MIN) {
            let answer = if echo { Answer::Echo(&mut *target) } else { Answer::Short(&mut short) };
            let began = Instant::now();
            match (kind, &mut *instrument) {
                (Kind::Read, _) => drop(black_box(sum(black_box(source)))),
                (_, Instrument::Memory) => black_box(&mut slab[..len]).copy_from_slice(black_box(source)),
                (_, Instrument::Futex(page)) => page.round_trip()?,
                (_, Instrument::Unix(socket)) => exchange(socket, source, answer)?,
                (_, Instrument::Tcp(socket)) => exchange(socket, source, answer)?,
                (_, Instrument::Polling(socket)) => exchange(socket, source, answer)?,
            }
            times.push(began.elapsed().as_nanos() as u64);
        }
        // The first were cold.
        let times = &mut times[ROUNDS_MIN / 2..];
        times.sort_unstable();
        Ok(Some(times[times.len() / 2] as f64 / 1e3))
    }
}

/// Tells the token; from now on no answer may take long.
fn begin<S>(socket: &S, bound: impl FnOnce(&S, Option<Duration>) -> io::Result<()>, token: [u8; 16]) -> io::Result<()>
where
    for<'a> &'a S: Write,
{
    bound(socket, Some(Duration::from_secs(30)))?;
    let mut socket = socket;
    socket.write_all(&token)
}

/// Where an answer goes.
enum Answer<'a> {
    Short(&'a mut [u8; 8]),
    /// As long as the message.
    Echo(&'a mut [u8]),
}

fn exchange(socket: &mut (impl Read + Write), source: &[u8], answer: Answer<'_>) -> io::Result<()> {
    let (flag, answer) = match answer {
        Answer::Short(answer) => (0, answer.as_mut_slice()),
        Answer::Echo(answer) => (ECHO, answer),
    };
    let len = (source.len() as u64 | flag).to_le_bytes();
    // A small message is one packet.
    if source.len() <= 1024 {
        let mut message = [0; 1032];
        message[..8].copy_from_slice(&len);
        message[8..8 + source.len()].copy_from_slice(source);
        socket.write_all(&message[..8 + source.len()])?;
    } else {
        socket.write_all(&len)?;
        socket.write_all(source)?;
    }
    socket.read_exact(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(listening: &Listening) -> TcpStream {
        let Address::Tcp(address) = listening.address else { panic!("{listening:?}") };
        let socket = TcpStream::connect(address).expect("connects");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a bound");
        socket
    }

    #[test]
    fn a_message_is_answered_and_one_that_is_too_long_ends_the_connection() {
        let listening = serve(Kind::Tcp, IpAddr::from([127, 0, 0, 1]), 4096).expect("listens");
        let mut socket = connect(&listening);
        socket.write_all(&listening.token).expect("writes");
        for len in [0, 8, 1024, 1025, 4096] {
            let (source, mut back) = (vec![3; len], vec![0; len]);
            exchange(&mut socket, &source, Answer::Short(&mut [0; 8])).expect("an answer");
            exchange(&mut socket, &source, Answer::Echo(&mut back)).expect("an echo");
            assert_eq!(source, back);
        }
        assert!(exchange(&mut socket, &[3; 4097], Answer::Short(&mut [0; 8])).is_err());
    }

    /// R1
    #[test]
    fn a_wrong_token_gets_no_answer() {
        let listening = serve(Kind::Tcp, IpAddr::from([127, 0, 0, 1]), 64).expect("listens");
        let mut socket = connect(&listening);
        socket.write_all(&listening.token.map(|byte| !byte)).expect("writes");
        assert!(exchange(&mut socket, &[3; 8], Answer::Short(&mut [0; 8])).is_err());
    }
}
