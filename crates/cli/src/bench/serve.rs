//! Two hosts without any service: `bench serve` waits on one, `bench HOST:PORT` measures from the other.
//!
//! The server hosts a store. A client takes a ticket there, says by which address it came, and waits for its turn; then each side
//! starts a worker of a group of two that has the ticket's name. So every session has fresh processes, and sessions come one
//! after the other, in the order of their tickets.
//! Invariant S1: a client that vanishes, at whatever point, costs the next one at most [`SILENCE_MAX`] or the time in which a
//! dead worker is noticed.
//! Invariant S2: the job key is on no command line: it is in the environment, or in a file that only its owner can read.

use std::fs::OpenOptions;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use farcall::transport::{EmbeddedStore, Store, StoreLimits};
use farcall::{JobKey, Options, StoreServer};
use serde::{Deserialize, Serialize};

use super::report::SCHEMA;
use crate::Failure;
use crate::launch::{Interrupted, Place, Workers, this_program, told_to_end};

const TICKETS: &str = "bench/tickets";
/// How often the server looks for clients and signals.
const TICK: Duration = Duration::from_millis(20);
/// How long a client may take to say who it is, once it has its ticket.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// How long a connection to the server may take.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// How long a client waits for its turn.
const TURN_MAX: Duration = Duration::from_secs(600);
/// How long the worker of either side waits for the other's: both are started at once.
const JOIN_MAX: &str = "10s";
const GRANTED: &[u8] = b"";

/// What a client says of itself.
#[derive(Serialize, Deserialize)]
struct Visit {
    schema: String,
    version: String,
    /// The server's address as the client reached it.
    reached: IpAddr,
}

fn visit_key(ticket: i64) -> String {
    format!("bench/{ticket}/visit")
}

fn turn_key(ticket: i64) -> String {
    format!("bench/{ticket}/turn")
}

fn group(ticket: i64) -> String {
    format!("bench-{ticket}")
}

/// A key in a file of its own, removed in the end.
struct KeyFile(PathBuf);

impl KeyFile {
    fn write(key: &JobKey) -> Result<Self, Failure> {
        let path = std::env::temp_dir().join(format!("farcall-bench-{}.key", std::process::id()));
        // Not one that somebody else has put there.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let mut file = file.map_err(|error| format!("no file for the job key: {}: {error}", path.display()))?;
        writeln!(file, "{}", key.to_hex())?;
        Ok(Self(path))
    }
}

impl Drop for KeyFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Serves clients until it is told to end.
pub(super) fn serve(listen: SocketAddr) -> Result<ExitCode, Failure> {
    let told_to_end = told_to_end()?;
    let given = Options::key_from_env()?;
    let made = (given.is_none() && !listen.ip().is_loopback()).then(JobKey::random).transpose()?;
    let key = given.as_ref().or(made.as_ref());
    let server = StoreServer::bind_with(&listen.to_string(), StoreLimits::default(), key.cloned())?;
    let file = made.as_ref().map(KeyFile::write).transpose()?;
    let address = server.address();
    invite(address, given.is_some(), file.as_ref())?;
    let own = if address.ip().is_unspecified() { loopback(address) } else { address };
    let store = EmbeddedStore::connect_with(&own.to_string(), "bench-serve", key, Instant::now() + CONNECT_MAX)?;
    let mut ticket = 1;
    loop {
        match next_visit(&store, ticket, &told_to_end)? {
            Next::Interrupted(interrupted) => return Ok(ExitCode::from(interrupted.exit_code())),
            Next::Silent => println!("session {ticket}: the client said nothing"),
            Next::Visit(Err(refusal)) => {
                println!("session {ticket}: refused: {refusal}");
                store.set(&turn_key(ticket), refusal.as_bytes())?;
            }
            Next::Visit(Ok(visit)) => {
                println!("session {ticket}: a client reached {}", visit.reached);
                let mut workers = worker(own, address, &visit, ticket, made.as_ref())?;
                store.set(&turn_key(ticket), GRANTED)?;
                match workers.next() {
                    Err(interrupted) => return Ok(ExitCode::from(interrupted.exit_code())),
                    Ok(Some(ended)) if !ended.status.success() => {
                        println!("session {ticket}: it ended with {}", ended.status);
                    }
                    Ok(_) => println!("session {ticket}: done"),
                }
            }
        }
        ticket += 1;
    }
}

/// The command for the other host.
fn invite(address: SocketAddr, has_key: bool, file: Option<&KeyFile>) -> Result<(), Failure> {
    let host = if address.ip().is_unspecified() {
        std::fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned()
    } else if address.is_ipv6() {
        format!("[{}]", address.ip())
    } else {
        address.ip().to_string()
    };
    let (port, target) = (address.port(), "farcall bench");
    println!("farcall bench: serving on {address}; Ctrl-C ends it");
    match file {
        Some(KeyFile(path)) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            println!("on the other host, as one user:");
            println!("  scp {host}:{} .", path.display());
            println!("  FARCALL_KEY_FILE={name} {target} {host}:{port}");
        }
        None if has_key => {
            println!("on the other host, with the same FARCALL_KEY or FARCALL_KEY_FILE in the environment:");
            println!("  {target} {host}:{port}");
        }
        None => {
            println!("in another terminal of this host:");
            println!("  {target} {host}:{port}");
            println!("for other hosts, listen beyond loopback: farcall bench serve --listen 0.0.0.0:{port}");
        }
    }
    Ok(std::io::stdout().flush()?)
}

fn loopback(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if address.is_ipv6() { [0, 0, 0, 0, 0, 0, 0, 1].into() } else { [127, 0, 0, 1].into() };
    SocketAddr::new(ip, address.port())
}

enum Next {
    Visit(Result<Visit, String>),
    /// It took a ticket, and was not heard of again.
    Silent,
    Interrupted(Interrupted),
}

fn next_visit(store: &EmbeddedStore, ticket: i64, told_to_end: &AtomicUsize) -> Result<Next, Failure> {
    let mut taken_at: Option<Instant> = None;
    loop {
        if let Some(visit) = store.get(&visit_key(ticket))? {
            return Ok(Next::Visit(read_visit(&visit)));
        }
        if taken_at.is_none() && store.add(TICKETS, 0)? >= ticket {
            taken_at = Some(Instant::now());
        }
        if taken_at.is_some_and(|taken| taken.elapsed() > SILENCE_MAX) {
            return Ok(Next::Silent);
        }
        match told_to_end.load(Ordering::SeqCst) {
            0 => std::thread::sleep(TICK),
            signal => return Ok(Next::Interrupted(Interrupted(signal))),
        }
    }
}

fn read_visit(bytes: &[u8]) -> Result<Visit, String> {
    let visit: Visit =
        serde_json::from_slice(bytes).map_err(|error| format!("not a client of this version: {error}"))?;
    let own = env!("CARGO_PKG_VERSION");
    if visit.schema != SCHEMA || visit.version != own {
        return Err(format!("the client is farcall {}, the server {own}: use the same on both hosts", visit.version));
    }
    Ok(visit)
}

/// Starts the worker that answers in a session.
fn worker(
    store: SocketAddr,
    listening: SocketAddr,
    visit: &Visit,
    ticket: i64,
    made: Option<&JobKey>,
) -> Result<Workers, Failure> {
    let mut command: Command = this_program()?;
    command.arg("bench-worker").stdin(Stdio::piped()).env("FARCALL_JOIN_TIMEOUT", JOIN_MAX);
    if listening.ip().is_unspecified() {
        // The store was reached over loopback, the client must reach this worker as it reached the store.
        command.env("FARCALL_BIND", SocketAddr::new(listening.ip(), 0).to_string());
        command.env("FARCALL_ADVERTISE", visit.reached.to_string());
    }
    let (store, group) = (store.to_string(), group(ticket));
    Workers::start_one(command, &Place { rank: 1, world_size: 2, store: &store, group: &group, key: made })
}

/// A turn at a server.
pub(super) struct Turn {
    store: EmbeddedStore,
    address: SocketAddr,
    ticket: i64,
}

impl Turn {
    /// Takes a ticket at `target`, HOST:PORT, and waits until it is its turn.
    pub(super) fn wait(target: &str, told_to_end: &AtomicUsize) -> Result<Result<Self, Interrupted>, Failure> {
        let key = Options::key_from_env()?;
        let deadline = Instant::now() + CONNECT_MAX;
        let mut last: Option<Failure> = None;
        let addresses = target.to_socket_addrs().map_err(|error| format!("{target}: {error}"))?;
        let identity = format!("bench-client-{}-{}", std::process::id(), JobKey::random()?.to_hex());
        let connect = |address: SocketAddr| {
            let store = EmbeddedStore::connect_with(&address.to_string(), &identity, key.as_ref(), deadline);
            store.map(|store| (store, address))
        };
        let mut connected = None;
        for address in addresses {
            match connect(address) {
                Ok(found) => {
                    connected = Some(found);
                    break;
                }
                Err(error) => last = Some(error.into()),
            }
        }
        let Some((store, address)) = connected else {
            let error = last.map_or_else(|| "no address".to_owned(), |error| error.to_string());
            return Err(format!("{target}: {error}; is `farcall bench serve` running there?").into());
        };
        let ticket = store.add(TICKETS, 1)?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let visit = Visit { schema: SCHEMA.to_owned(), version, reached: address.ip() };
        store.set(&visit_key(ticket), &serde_json::to_vec(&visit)?)?;
        let deadline = Instant::now() + TURN_MAX;
        loop {
            if let Some(answer) = store.get(&turn_key(ticket))? {
                return match answer.as_slice() {
                    GRANTED => Ok(Ok(Self { store, address, ticket })),
                    refusal => Err(format!("{target}: {}", String::from_utf8_lossy(refusal)).into()),
                };
            }
            if Instant::now() > deadline {
                return Err(format!("{target}: others are measured there for more than {TURN_MAX:?}").into());
            }
            match told_to_end.load(Ordering::SeqCst) {
                0 => std::thread::sleep(TICK),
                signal => return Ok(Err(Interrupted(signal))),
            }
        }
    }

    /// Whether the server is on this host, as far as its address tells.
    pub(super) fn is_same_host(&self) -> bool {
        self.address.ip().is_loopback()
    }

    /// Starts the worker that measures.
    pub(super) fn start(&self, mut command: Command) -> Result<Workers, Failure> {
        command.env("FARCALL_JOIN_TIMEOUT", JOIN_MAX);
        let (store, group) = (self.store.address(), group(self.ticket));
        Workers::start_one(command, &Place { rank: 0, world_size: 2, store, group: &group, key: None })
    }
}
