//! Hosts the table: one thread that accepts, one for each client.
//!
//! A client's thread blocks in `poll` on its socket alone, bounded by its wait's deadline. The thread that completes a
//! wait writes the answer to the waiter's socket itself: no wake-up of all for one, and an end of the client is seen
//! while it waits. Shutting a socket down ends its thread, wherever it blocks (S5).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};
use socket2::{SockRef, TcpKeepalive};

use super::table::{Table, WaitId, Waiting};
use super::wire::{self, CHALLENGE, FRAME_BYTES_MAX, GREETING, HELLO_BYTES_MAX, Hello, Reply, Request, TooLarge};
use super::{Refusal, StoreError, StoreLimits};
use crate::JobKey;
use crate::auth::{Acceptor, Realm};
use crate::key::fresh;
use crate::strangers::Strangers;

/// An idle connection whose host vanished without a word ends after this and nine probes, 2 s apart.
const KEEPALIVE: TcpKeepalive =
    TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(2));

/// How many answered and refused connections are kept open, until the next ones come, for their answer to arrive.
const REFUSED_KEPT: usize = 16;

/// The store's host, on one worker of a job. Dropping it ends the store for all.
///
/// The drop joins all threads: it takes milliseconds, whatever the clients do.
#[derive(Debug)]
pub struct StoreServer {
    shared: Arc<Shared>,
    address: SocketAddr,
    /// Its end wakes the accepting thread, which then ends.
    waker: Option<UnixStream>,
    acceptor: Option<JoinHandle<()>>,
}

impl StoreServer {
    /// Hosts a store at `address` ("127.0.0.1:29500"; port 0 takes a free one) with the default limits.
    ///
    /// # Errors
    /// [`StoreError::Bind`], and [`StoreError::NotLoopback`] for addresses that other hosts can reach.
    pub fn bind(address: &str) -> Result<Self, StoreError> {
        Self::bind_with(address, StoreLimits::default(), None)
    }

    /// Hosts a store with these limits, for clients that prove `key`. A message holds 4 MiB at most, whatever the limits say.
    ///
    /// # Errors
    /// [`StoreError::Bind`], and [`StoreError::NotLoopback`] for addresses that other hosts can reach when there is no key.
    pub fn bind_with(address: &str, limits: StoreLimits, key: Option<JobKey>) -> Result<Self, StoreError> {
        let failed = |source| StoreError::Bind { address: address.to_owned(), source };
        // PEERS: who listens to other hosts must be able to tell who belongs to the job.
        let open = address.to_socket_addrs().map_err(failed)?.find(|address| !address.ip().is_loopback());
        if let (Some(open), None) = (open, &key) {
            return Err(StoreError::NotLoopback { address: open.to_string() });
        }
        Self::start(address, limits, key).map_err(failed)
    }

    fn start(address: &str, limits: StoreLimits, key: Option<JobKey>) -> io::Result<Self> {
        let listener = TcpListener::bind(address)?;
        // A client may be gone again between `poll` and `accept`, which must then not block.
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (waker, woken) = UnixStream::pair()?;
        let shared = Arc::new(Shared {
            limits,
            key,
            table: Mutex::new(Table::new(limits)),
            clients: Mutex::new(Clients::new(&limits)),
        });
        let acceptor = thread::Builder::new().name("farcall-store".into()).spawn({
            let shared = Arc::clone(&shared);
            move || accept_all(&shared, &listener, &woken)
        })?;
        Ok(Self { shared, address, waker: Some(waker), acceptor: Some(acceptor) })
    }

    /// Where the store listens, with the port it was given.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many waits are unanswered.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.shared.table().waiting()
    }

    /// How many clients have a thread.
    #[cfg(test)]
    pub(super) fn clients(&self) -> usize {
        self.shared.clients().running.len()
    }

    /// Something that is dropped with the server's last thread.
    #[cfg(test)]
    pub(super) fn alive(&self) -> std::sync::Weak<impl Sized + use<>> {
        Arc::downgrade(&self.shared)
    }
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        drop(self.waker.take());
        let running = {
            let mut clients = self.shared.clients();
            // From here on no client is taken, and ends are the server's doing: they leave no `gone/` keys.
            clients.stopping = true;
            for client in clients.running.values() {
                shut_down(&client.stream);
            }
            let running = std::mem::take(&mut clients.running).into_values().map(|client| client.thread);
            running.chain(std::mem::take(&mut clients.ended)).collect::<Vec<_>>()
        };
        running.into_iter().chain(self.acceptor.take()).for_each(join);
    }
}

/// What all threads of a server share. No lock is held while a socket can block, or while the other is taken.
#[derive(Debug)]
struct Shared {
    limits: StoreLimits,
    key: Option<JobKey>,
    table: Mutex<Table<Arc<TcpStream>>>,
    clients: Mutex<Clients>,
}

#[derive(Debug)]
struct Clients {
    running: HashMap<u64, Client>,
    /// Those of them that are still greeting.
    greeting: Strangers,
    /// Threads that are about to return; joined when the next client comes.
    ended: Vec<JoinHandle<()>>,
    next_id: u64,
    stopping: bool,
}

impl Clients {
    fn new(limits: &StoreLimits) -> Self {
        let greeting = Strangers::new(limits.greetings.min(limits.connections / 2).max(1));
        Self { running: HashMap::new(), greeting, ended: Vec::new(), next_id: 0, stopping: false }
    }
}

#[derive(Debug)]
struct Client {
    stream: Arc<TcpStream>,
    thread: JoinHandle<()>,
}

impl Shared {
    /// No code panics while it holds a lock, except by an assertion that already failed: the data stays usable.
    fn table(&self) -> MutexGuard<'_, Table<Arc<TcpStream>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a new client its thread. `Err` when that is one too many, or the system has no more threads.
    fn take(self: &Arc<Self>, stream: &Arc<TcpStream>) -> Result<(), Refusal> {
        let mut clients = self.clients();
        clients.ended.drain(..).for_each(join);
        if clients.stopping {
            return Ok(());
        }
        let limit = self.limits.connections;
        if clients.running.len() >= limit {
            return Err(Refusal::Connections { limit: limit as u64 });
        }
        let id = clients.next_id;
        clients.next_id += 1;
        let from = stream.peer_addr().ok().map(|address| address.ip());
        let displaced = clients.greeting.enter(id, from);
        if let Some(client) = displaced.and_then(|id| clients.running.get(&id)) {
            shut_down(&client.stream);
        }
        let spawned = thread::Builder::new().name(format!("farcall-store-{id}")).spawn({
            let (shared, stream) = (Arc::clone(self), Arc::clone(stream));
            move || {
                serve(&shared, &stream, id);
                // The lock is free only once the thread is in the list, so it is found.
                let mut clients = shared.clients();
                clients.greeting.leave(id);
                if let Some(client) = clients.running.remove(&id) {
                    clients.ended.push(client.thread);
                }
            }
        });
        match spawned {
            Ok(thread) => {
                clients.running.insert(id, Client { stream: Arc::clone(stream), thread });
                Ok(())
            }
            Err(error) => {
                clients.greeting.leave(id);
                crate::limited!(warn, %error, clients = clients.running.len(), "no thread for another client of the store");
                Err(Refusal::Connections { limit: clients.running.len() as u64 })
            }
        }
    }

    /// Tells the clients whose waits just ended. Nothing else is on its way to them, so it fits their sockets' buffers.
    fn tell(&self, woken: Vec<Arc<TcpStream>>) {
        for client in woken {
            let sent = send(&*client, &wire::DONE_FRAME, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            if sent != Ok(wire::DONE_FRAME.len()) {
                // It asks without reading the answers. Its own thread sees the end.
                shut_down(&client);
            }
        }
    }
}

fn accept_all(shared: &Arc<Shared>, listener: &TcpListener, woken: &UnixStream) {
    let mut refused = VecDeque::with_capacity(REFUSED_KEPT + 1);
    // After an error, such as no free descriptors, `accept` rests, but not the wait for the end.
    let mut resting = None;
    loop {
        let mut fds = [PollFd::new(woken, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        let watched = if resting.is_some() { &mut fds[..1] } else { &mut fds[..] };
        match poll(watched, resting.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "the store takes no more clients");
                return;
            }
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        resting = None;
        match listener.accept() {
            Ok((stream, _)) => {
                let stream = Arc::new(stream);
                if let Err(refusal) = prepare(&stream).map_or(Ok(()), |()| shared.take(&stream)) {
                    answer_greeting(&stream, false, &Reply::Refused(refusal), shared.limits.frame);
                    // Closed at once, its unread greeting would turn into a reset that overtakes the answer.
                    refused.push_back(stream);
                    if refused.len() > REFUSED_KEPT {
                        refused.pop_front();
                    }
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                crate::limited!(warn, %error, "the store could not accept a client");
                resting = Some(Timespec { tv_sec: 0, tv_nsec: 50_000_000 });
            }
        }
    }
}

/// Sets a new socket up; `None` if it is gone already.
fn prepare(stream: &TcpStream) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    stream.set_nodelay(true).ok()?;
    SockRef::from(stream).set_tcp_keepalive(&KEEPALIVE).ok()
}

/// One client, from its greeting to its end.
fn serve(shared: &Shared, stream: &Arc<TcpStream>, id: u64) {
    let limits = shared.limits;
    let mut greeted = false;
    let identity = match greet(shared, stream, &mut greeted) {
        Ok(identity) => identity,
        Err(refusal) => {
            tracing::debug!(peer = ?stream.peer_addr(), ?refusal, "the store refused a client");
            if let Some(refusal) = refusal {
                answer_greeting(stream, greeted, &Reply::Refused(refusal), limits.frame);
                linger(stream);
            }
            return shut_down(stream);
        }
    };
    shared.clients().greeting.leave(id);
    answer_greeting(stream, greeted, &Reply::Done, limits.frame);
    let end = converse(shared, stream);
    if let End::Refused(refusal) = &end {
        crate::limited!(warn, identity, %refusal, "the store ended a client");
        // A client that does not take it has ended all the same.
        if reply(stream, &Reply::Refused(refusal.clone()), limits.frame).is_ok() {
            linger(stream);
        }
    }
    shut_down(stream);
    let in_order = matches!(end, End::Left) || shared.clients().stopping;
    let woken = shared.table().end(&identity, in_order);
    shared.tell(woken);
}

/// Reads the greeting, lets the client prove the job's key, and enters it. `Err(None)` when it is gone; `greeted` once it
/// has this side's greeting.
fn greet(shared: &Shared, stream: &TcpStream, greeted: &mut bool) -> Result<String, Option<Refusal>> {
    let hello = shared.limits.hello;
    let deadline = Instant::now() + hello;
    let greeting: [u8; GREETING.len()] =
        wire::read_array(stream, deadline).map_err(|error| refusal_of(&error, hello, HELLO_BYTES_MAX))?;
    if greeting != GREETING {
        return Err(Some(Refusal::Greeting));
    }
    let read = || wire::read_frame_of(stream, HELLO_BYTES_MAX, deadline);
    let message = read().map_err(|error| refusal_of(&error, hello, HELLO_BYTES_MAX))?;
    let Hello { identity, nonce } = wire::decode(&message).ok_or(Some(Refusal::Malformed))?;
    match (&shared.key, nonce) {
        (None, None) => {}
        (Some(_), None) => return Err(Some(Refusal::KeyWanted)),
        (None, Some(_)) => return Err(Some(Refusal::NoKey)),
        (Some(key), Some(_)) => {
            let nonce = fresh().map_err(|_| None)?;
            let (mut acceptor, challenge) = Acceptor::new(key, Realm::Store, &message, &nonce, identity.to_owned());
            let challenge = wire::raw_frame(&[&[CHALLENGE], &challenge[..]].concat()).map_err(|_| None)?;
            wire::write(stream, &[&GREETING, &challenge[..]].concat(), deadline).map_err(|_| None)?;
            *greeted = true;
            let proof = read().map_err(|error| refusal_of(&error, hello, HELLO_BYTES_MAX))?;
            acceptor.on_proof(&proof).map_err(|error| {
                tracing::debug!(%error, "the store refused a client");
                Some(Refusal::WrongKey)
            })?;
        }
    }
    shared.table().enter(identity)?;
    Ok(identity.to_owned())
}

/// How a conversation ended.
enum End {
    /// With a `Leave`.
    Left,
    /// By the client's end or silence, or the server's end.
    Lost,
    /// After a message that makes no sense of what may follow.
    Refused(Refusal),
}

/// Takes requests in turn until the client's end.
fn converse(shared: &Shared, stream: &Arc<TcpStream>) -> End {
    let limits = shared.limits;
    let mut pending: Option<(WaitId, Instant)> = None;
    loop {
        let Ok(readable) = wait_readable(stream, pending.map(|(_, deadline)| deadline)) else { return End::Lost };
        if let Some((wait, _)) = pending.take() {
            let missing = shared.table().withdraw(wait);
            // None: answered by the set that completed it.
            if let Some(missing) = missing {
                if readable {
                    let more = matches!(stream.peek(&mut [0]), Ok(1));
                    return if more { End::Refused(Refusal::Pipelined) } else { End::Lost };
                }
                if reply(stream, &Reply::Missing(missing), limits.frame).is_err() {
                    return End::Lost;
                }
            }
        }
        if !readable {
            continue;
        }
        let bytes = match wire::read_frame(stream, Instant::now() + limits.frame) {
            Ok(bytes) => bytes,
            Err(error) => return refusal_of(&error, limits.frame, FRAME_BYTES_MAX).map_or(End::Lost, End::Refused),
        };
        let Some(request) = wire::decode(&bytes) else { return End::Refused(Refusal::Malformed) };
        let left = matches!(request, Request::Leave);
        let answered = match handle(shared, stream, request) {
            Ok(Answer::Sent(sent)) => sent,
            Ok(Answer::Later(wait, deadline)) => {
                pending = Some((wait, deadline));
                Ok(())
            }
            Err(refusal) => reply(stream, &Reply::Refused(refusal), limits.frame),
        };
        match answered {
            _ if left => return End::Left,
            Ok(()) => {}
            Err(_) => return End::Lost,
        }
    }
}

enum Answer {
    Sent(io::Result<()>),
    /// Until then the answer comes from a set.
    Later(WaitId, Instant),
}

fn handle(shared: &Shared, stream: &Arc<TcpStream>, request: Request<'_>) -> Result<Answer, Refusal> {
    let limits = shared.limits;
    let done = |reply_with: &Reply<'_>| Answer::Sent(reply(stream, reply_with, limits.frame));
    Ok(match request {
        Request::Set { key, value } => {
            let woken = shared.table().set(key, value)?;
            shared.tell(woken);
            done(&Reply::Done)
        }
        Request::Add { key, amount } => {
            let (sum, woken) = shared.table().add(key, amount)?;
            shared.tell(woken);
            done(&Reply::Sum(sum))
        }
        Request::Get { keys } => {
            let values = values_in_a_frame(&shared.table(), &keys);
            done(&Reply::Values(values.iter().map(Option::as_deref).collect()))
        }
        Request::Wait { groups, timeout_ms } => {
            let limit_ms = limits.wait.as_millis() as u64;
            if timeout_ms > limit_ms {
                return Err(Refusal::Wait { ms: timeout_ms, limit_ms });
            }
            let deadline = Instant::now() + Duration::from_millis(timeout_ms);
            let waiting = shared.table().wait(&groups, Arc::clone(stream))?;
            match waiting {
                Waiting::Over => done(&Reply::Done),
                Waiting::For(id) => Answer::Later(id, deadline),
            }
        }
        Request::Leave => done(&Reply::Done),
    })
}

/// The values of the first `keys`, as many as fit in one answer.
fn values_in_a_frame(table: &Table<Arc<TcpStream>>, keys: &[&str]) -> Vec<Option<Arc<[u8]>>> {
    /// More than an encoded `Some` and its length need.
    const EACH_BYTES: usize = 8;
    let mut left = FRAME_BYTES_MAX - EACH_BYTES;
    let mut values = Vec::new();
    for key in keys {
        let value = table.get(key);
        let bytes = value.as_ref().map_or(0, |value| value.len()) + EACH_BYTES;
        if bytes > left && !values.is_empty() {
            break;
        }
        left = left.saturating_sub(bytes);
        values.push(value);
    }
    values
}

/// What to tell a client whose message could not be read; `None` when no one is there to be told.
fn refusal_of(error: &io::Error, limit: Duration, bytes_max: usize) -> Option<Refusal> {
    match (TooLarge::bytes(error), error.kind()) {
        (Some(bytes), _) => Some(Refusal::Message { bytes, limit_bytes: bytes_max as u64 }),
        (None, io::ErrorKind::TimedOut) => Some(Refusal::Slow { limit_ms: limit.as_millis() as u64 }),
        _ => None,
    }
}

/// Answers a greeting, with this side's own unless the client has it. A failure shows in whatever comes next.
fn answer_greeting(stream: &TcpStream, greeted: bool, answer: &Reply<'_>, limit: Duration) {
    let own: &[u8] = if greeted { &[] } else { &GREETING };
    let sent =
        wire::frame(answer).and_then(|frame| wire::write(stream, &[own, &frame].concat(), Instant::now() + limit));
    if let Err(error) = sent {
        tracing::debug!(%error, "a client of the store did not take its answer");
    }
}

fn reply(stream: &TcpStream, reply: &Reply<'_>, limit: Duration) -> io::Result<()> {
    wire::write(stream, &wire::frame(reply)?, Instant::now() + limit)
}

/// Lets a last answer arrive: closed with bytes unread, a socket sends a reset that overtakes it.
fn linger(stream: &TcpStream) {
    const LINGER: Duration = Duration::from_millis(500);
    let deadline = Instant::now() + LINGER;
    if stream.shutdown(Shutdown::Write).is_ok() {
        // Bounded twice: a stranger that keeps sending is cut off.
        for _ in 0..64 {
            if wire::discard(stream, deadline).is_err() {
                break;
            }
        }
    }
}

/// Ends a connection at both sides and wakes its thread. Fails only where the peer was faster.
fn shut_down(stream: &TcpStream) {
    drop(stream.shutdown(Shutdown::Both));
}

fn join(thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!("a thread of the store panicked");
    }
}

/// Blocks until there is something to read, or the end, or `deadline`: then `false`.
fn wait_readable(stream: &TcpStream, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
