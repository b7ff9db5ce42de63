//! A worker's side of the embedded store.

use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use farcall_device::Kept;

use super::wire::{self, CHALLENGE, GREETING, Hello, Reply, Request, TooLarge, VERSION};
use super::{Refusal, Store, StoreError};
use crate::auth::{Dialer, Realm};
use crate::key::fresh;
use crate::{AuthError, JobKey, ProtocolError};

/// How long past its due time an answer may come before the store counts as lost.
const ANSWER: Duration = Duration::from_secs(10);
/// The pauses between attempts to connect: twice as long each time, up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

/// A connection to a [`StoreServer`](super::StoreServer).
///
/// Threads may share it: their operations take turns, and one that waits occupies it until its deadline at most. Open a
/// second one, with the same identity, for a thread that must set keys meanwhile.
///
/// Dropped without [`Store::close`] it counts as gone, as after a crash: see [`gone_key`](super::gone_key).
#[derive(Debug)]
pub struct EmbeddedStore {
    address: String,
    /// A forked child does not keep it, so that the store sees the parent's end.
    _kept: Kept,
    /// `None` once closed or lost, and while an operation has it: after a panic it is not used again.
    stream: Mutex<Option<TcpStream>>,
}

impl EmbeddedStore {
    /// Connects to the store at `address` ("host:port"), which may start later than this worker.
    ///
    /// `identity` names one life of this worker; the key [`gone_key`](super::gone_key) is made of it. Names are looked
    /// up by the system, whose own timeout comes on top of `deadline` when its server does not answer.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] when nothing answered until `deadline`; what does answer and is no store of this
    /// version, or has no room, fails at once.
    pub fn connect(address: &str, identity: &str, deadline: Instant) -> Result<Self, StoreError> {
        Self::connect_with(address, identity, None, deadline)
    }

    /// As [`EmbeddedStore::connect`], with the job's key: the store must have the same one, or neither may have any.
    ///
    /// # Errors
    /// As [`EmbeddedStore::connect`]; [`StoreError::Unproven`] or a [`Refusal`] when the keys differ.
    pub fn connect_with(
        address: &str,
        identity: &str,
        key: Option<&JobKey>,
        deadline: Instant,
    ) -> Result<Self, StoreError> {
        let start = Instant::now();
        let mut pause = PAUSES.0;
        loop {
            let source = match dial(address, deadline) {
                Ok(stream) => match greet(&stream, address, identity, key, deadline) {
                    Ok(()) => {
                        let (address, kept) = (address.to_owned(), Kept::new(&stream));
                        return Ok(Self { address, _kept: kept, stream: Mutex::new(Some(stream)) });
                    }
                    // It is ending, or its host is not done starting: as good as refused.
                    Err(StoreError::Lost { source, .. }) => source,
                    Err(error) => return Err(error),
                },
                Err(source) => source,
            };
            let now = Instant::now();
            // "no such port" and the like stay so; a name may still appear while a job starts.
            if now + pause >= deadline || source.kind() == io::ErrorKind::InvalidInput {
                let waited_ms = now.duration_since(start).as_millis();
                return Err(StoreError::Unreachable { address: address.to_owned(), waited_ms, source });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// The address as it was given to [`EmbeddedStore::connect`].
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Which of this host's addresses the store is reached from; `None` once closed or lost.
    #[must_use]
    pub fn local_address(&self) -> Option<IpAddr> {
        let address = self.stream().as_ref()?.local_addr();
        address.ok().map(|address| address.ip())
    }

    /// One request and its reply, which must come within [`ANSWER`] beyond `wait`. `read` sees no refusals.
    fn exchange<T>(
        &self,
        request: &Request<'_>,
        wait: Duration,
        read: impl FnOnce(Reply<'_>) -> Option<T>,
    ) -> Result<T, StoreError> {
        let frame = wire::frame(request).map_err(|error| match TooLarge::bytes(&error) {
            Some(bytes) => self.refused(Refusal::Message { bytes, limit_bytes: wire::FRAME_BYTES_MAX as u64 }),
            None => self.lost(error),
        })?;
        let mut slot = self.stream();
        let stream = slot.take().ok_or_else(|| StoreError::Closed { address: self.address.clone() })?;
        let answer = wire::write(&stream, &frame, Instant::now() + ANSWER)
            .and_then(|()| wire::read_frame(&stream, Instant::now() + wait + ANSWER))
            .map_err(|error| self.lost(error))?;
        let reply = wire::decode(&answer);
        if let Some(Reply::Refused(refusal)) = reply {
            // It may have ended the conversation; then the next operation finds it lost.
            *slot = Some(stream);
            return Err(self.refused(refusal));
        }
        let value = reply.and_then(read).ok_or_else(|| self.lost(io::ErrorKind::InvalidData.into()))?;
        *slot = Some(stream);
        Ok(value)
    }

    /// Waits for a key of each group; the positions of those that have none at `deadline`.
    fn wait_groups(&self, groups: Vec<Vec<&str>>, deadline: Instant) -> Result<Vec<u32>, StoreError> {
        let count = groups.len();
        let wait = deadline.saturating_duration_since(Instant::now());
        let timeout_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        self.exchange(&Request::Wait { groups, timeout_ms }, wait, |reply| match reply {
            Reply::Done => Some(Vec::new()),
            Reply::Missing(missing) if missing.iter().all(|index| (*index as usize) < count) => Some(missing),
            _ => None,
        })
    }

    /// The values of the first keys: at least one, unless there are no keys.
    fn values(&self, keys: &[&str]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        self.exchange(&Request::Get { keys: keys.to_vec() }, Duration::ZERO, |reply| match reply {
            Reply::Values(values) if (1..=keys.len()).contains(&values.len()) => {
                Some(values.into_iter().map(|value| value.map(<[u8]>::to_vec)).collect())
            }
            _ => None,
        })
    }

    fn missing(&self, start: Instant, missing: Vec<String>) -> StoreError {
        StoreError::Missing { address: self.address.clone(), waited_ms: start.elapsed().as_millis(), missing }
    }

    fn refused(&self, refusal: Refusal) -> StoreError {
        StoreError::Refused { address: self.address.clone(), refusal }
    }

    fn lost(&self, source: io::Error) -> StoreError {
        StoreError::Lost { address: self.address.clone(), source }
    }

    fn stream(&self) -> MutexGuard<'_, Option<TcpStream>> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for EmbeddedStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.exchange(&Request::Set { key, value }, Duration::ZERO, |reply| matches!(reply, Reply::Done).then_some(()))
    }

    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.values(&[key])?.pop().flatten())
    }

    fn wait(&self, keys: &[&str], deadline: Instant) -> Result<Vec<Vec<u8>>, StoreError> {
        let start = Instant::now();
        let missing = self.wait_groups(keys.iter().map(|key| vec![*key]).collect(), deadline)?;
        if !missing.is_empty() {
            let named = missing.into_iter().map(|index| keys[index as usize].to_owned()).collect();
            return Err(self.missing(start, named));
        }
        let mut values = Vec::with_capacity(keys.len());
        while values.len() < keys.len() {
            for value in self.values(&keys[values.len()..])? {
                // S2 of the store: it was there, so it is.
                values.push(value.ok_or_else(|| self.lost(io::ErrorKind::InvalidData.into()))?);
            }
        }
        Ok(values)
    }

    fn wait_each(&self, groups: &[&[&str]], deadline: Instant) -> Result<(), StoreError> {
        let start = Instant::now();
        let missing = self.wait_groups(groups.iter().map(|group| group.to_vec()).collect(), deadline)?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(self.missing(start, missing.into_iter().map(|index| groups[index as usize].join(" or ")).collect()))
    }

    fn add(&self, key: &str, amount: i64) -> Result<i64, StoreError> {
        self.exchange(&Request::Add { key, amount }, Duration::ZERO, |reply| match reply {
            Reply::Sum(sum) => Some(sum),
            _ => None,
        })
    }

    fn close(&self) -> Result<(), StoreError> {
        let left = self.exchange(&Request::Leave, Duration::ZERO, |reply| matches!(reply, Reply::Done).then_some(()));
        if let Some(stream) = self.stream().take() {
            // The peer may have been faster.
            drop(stream.shutdown(Shutdown::Both));
        }
        match left {
            Err(StoreError::Closed { .. }) => Ok(()),
            left => left,
        }
    }
}

/// Connects to the first of the addresses behind `address` that takes it.
fn dial(address: &str, deadline: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for target in address.to_socket_addrs()? {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match TcpStream::connect_timeout(&target, left) {
            Ok(stream) if is_itself(&stream, target) => last = io::ErrorKind::ConnectionRefused.into(),
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether a connection to a port of this machine met itself: its own port was picked to be the one that is dialed,
/// while no one listens there. Nothing but retries make it likely, and it would even answer the greeting.
pub(super) fn is_itself(stream: &TcpStream, target: SocketAddr) -> bool {
    stream.local_addr().is_ok_and(|local| local == target)
}

/// Greets and reads the answer. [`StoreError::Lost`] means that another attempt may succeed.
fn greet(
    stream: &TcpStream,
    address: &str,
    identity: &str,
    key: Option<&JobKey>,
    deadline: Instant,
) -> Result<(), StoreError> {
    let address = || address.to_owned();
    let lost = |source| StoreError::Lost { address: address(), source };
    let nonce = key.map(|_| fresh()).transpose().map_err(lost)?;
    let hello = wire::frame(&Hello { identity, nonce }).map_err(lost)?;
    wire::write(stream, &[&GREETING, &hello[..]].concat(), deadline).map_err(lost)?;
    let theirs: [u8; GREETING.len()] = wire::read_array(stream, deadline).map_err(lost)?;
    match theirs {
        GREETING => {}
        [b'F', b'C', b'S', b'T', b'O', b'R', b'E', theirs] => {
            return Err(StoreError::Version { address: address(), ours: VERSION, theirs });
        }
        _ => return Err(StoreError::NotAStore { address: address() }),
    }
    let mut answer = wire::read_frame_of(stream, wire::HELLO_BYTES_MAX, deadline).map_err(lost)?;
    if let Some(key) = key
        && !matches!(wire::decode(&answer), Some(Reply::Refused(_)))
    {
        // Whoever goes on without a challenge has no key: nothing else that it says counts.
        let mut dialer = Dialer::new(key, Realm::Store, &hello[4..], "it".to_owned());
        let proof = match answer.split_first() {
            Some((&CHALLENGE, challenge)) => dialer.on_challenge(challenge),
            _ => Err(AuthError::NoKey { peer: "it".to_owned() }.into()),
        };
        let proof = proof.map_err(|error| match error {
            ProtocolError::Auth(source) => StoreError::Unproven { address: address(), source },
            _ => StoreError::NotAStore { address: address() },
        })?;
        wire::write(stream, &wire::raw_frame(&proof).map_err(lost)?, deadline).map_err(lost)?;
        answer = wire::read_frame_of(stream, wire::HELLO_BYTES_MAX, deadline).map_err(lost)?;
    }
    match wire::decode(&answer) {
        Some(Reply::Done) => Ok(()),
        Some(Reply::Refused(refusal)) => Err(StoreError::Refused { address: address(), refusal }),
        _ => Err(StoreError::NotAStore { address: address() }),
    }
}
