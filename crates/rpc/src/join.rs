//! Joining a group of a known size, and leaving it together.
//!
//! Static join: each worker publishes its address in the store and waits for all others'. Leaving: a worker is done when
//! its own calls have their replies; it then serves on until every other is done or gone, and only then closes.
//! Invariant BOUNDED: joining and leaving have deadlines; what they miss is named.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farcall_device::Runtime;
use farcall_transport::{
    Driver, DriverConfig, EmbeddedStore, JobKey, KeyError, Limits, Store, StoreError, StoreLimits, StoreServer, Tls,
    TlsError, Transport, WorkerId, WorkerInfo, gone_key, is_forked_child,
};
use tokio::sync::oneshot;

use crate::agent::{Acceptor, Agent};
use crate::error::JoinError;
use crate::{DeviceMap, Registry};

/// Threads of one agent at most: handlers that run, and those that wait for calls of their own.
const THREADS_MAX: usize = 4096;
/// How often a leaving worker looks whether its own calls have ended.
const DRAIN_TICK: Duration = Duration::from_millis(2);
/// How long threads may take to end after everything was closed.
const STOP_WAIT: Duration = Duration::from_secs(2);
/// How long one wait for the others lasts.
const SERVE_WAIT: Duration = Duration::from_secs(600);

/// How a worker joins its group. [`Options::from_env`] reads what a launcher such as `farcall run` set.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// This worker's name, unique in the group. Default `w<rank>`.
    pub name: Option<String>,
    /// 0 to `world_size` − 1.
    pub rank: u32,
    /// Workers in the group.
    pub world_size: u32,
    /// Where the store is, as `host:port`.
    pub store: String,
    /// Host the store in this process. Default: rank 0 does.
    pub host_store: bool,
    /// Told apart from other groups that use the same store or ports.
    pub group: String,
    /// Where this worker listens; port 0 for any. Default 127.0.0.1:0. Beyond loopback only with a `key`.
    pub bind: SocketAddr,
    /// Under which address the others reach this worker, if it listens on all of them. Default: the one from which it
    /// reaches the store.
    pub advertise: Option<IpAddr>,
    /// Which sockets are used. Default: Unix sockets between workers of one user on one host, else TCP.
    pub transport: Transport,
    /// A certificate for connections over TCP, which then are encrypted: all workers of the job have one of the same CA.
    /// Only in builds with the feature `tls`. The store has no TLS: beyond loopback it needs a `key`, too.
    pub tls: Option<Tls>,
    /// The secret of this job, the same for all its workers: who cannot prove it is refused, by workers and by the store.
    /// Without one everyone on this machine can call this worker.
    pub key: Option<JobKey>,
    /// How long a call waits for its reply unless told otherwise. Default 60 s.
    pub deadline: Duration,
    /// How long joining may take. Default 60 s.
    pub join_timeout: Duration,
    /// How long a connection to another worker may take, its welcome included. Default 1.6 s.
    pub connect_timeout: Duration,
    /// How long another worker may be silent until it counts as lost; pings are sent four times as often. The same on all
    /// workers. Default 1.6 s.
    pub peer_timeout: Duration,
    /// How long [`Agent::shutdown`] waits for calls in flight and for the others. Default 60 s.
    pub shutdown_timeout: Duration,
    /// Handlers that run at a time on the agent's threads; more wait for their turn. One that waits for a reply is not counted,
    /// nor is an async one that waits. Default 1,024.
    pub handlers_max: usize,
    /// The functions served. Default: all that are linked in.
    pub registry: Option<Registry>,
    /// Where async handlers run. Default: a small runtime of the agent's own.
    pub runtime: Option<tokio::runtime::Handle>,
    /// Memory and streams. Default: the process's.
    pub device_runtime: Option<Runtime>,
    /// Which device of a worker, by name, stands for which here. A worker without a map has each device stand for the one of
    /// the same index. With a map, tensors of devices that it leaves out cannot be sent.
    pub device_maps: HashMap<String, DeviceMap>,
    /// Bounds on what peers may send.
    pub limits: Limits,
}

impl Options {
    /// Options for `rank` of `world_size` workers that meet at `store`.
    pub fn new(rank: u32, world_size: u32, store: impl Into<String>) -> Self {
        Self {
            name: None,
            rank,
            world_size,
            store: store.into(),
            host_store: rank == 0,
            group: "farcall".to_owned(),
            bind: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            advertise: None,
            transport: Transport::default(),
            tls: None,
            key: None,
            deadline: Duration::from_secs(60),
            join_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_millis(1600),
            peer_timeout: Duration::from_millis(1600),
            shutdown_timeout: Duration::from_secs(60),
            handlers_max: 1024,
            registry: None,
            runtime: None,
            device_runtime: None,
            device_maps: HashMap::new(),
            limits: Limits::default(),
        }
    }

    /// Options from the environment.
    ///
    /// `FARCALL_RANK`, `FARCALL_WORLD_SIZE` and `FARCALL_STORE` (host:port) must be set; `FARCALL_NAME`,
    /// `FARCALL_GROUP`, `FARCALL_BIND` (address:port), `FARCALL_ADVERTISE` (address), `FARCALL_TRANSPORT` (`auto`, `tcp`
    /// or `unix`) and `FARCALL_HOST_STORE` (0 or 1) may be.
    ///
    /// `FARCALL_TLS_CERT`, `FARCALL_TLS_KEY` and `FARCALL_TLS_CA` name PEM files for TLS, all or none of them.
    ///
    /// The job's key comes from `FARCALL_KEY` (hexadecimal digits) or `FARCALL_KEY_FILE` (a file with them that nobody else
    /// can read); `openssl rand -hex 32` makes one. A process's environment can be read by its own user and by root, and by
    /// the processes that it starts.
    ///
    /// # Errors
    /// [`JoinError::Setting`] names the variable.
    pub fn from_env() -> Result<Self, JoinError> {
        Self::from_variables(variable)
    }

    /// The job's key alone, from the same variables, for launchers.
    ///
    /// # Errors
    /// [`JoinError::Setting`] names the variable.
    pub fn key_from_env() -> Result<Option<JobKey>, JoinError> {
        key_from_variables(&variable)
    }

    pub(crate) fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Self, JoinError> {
        let required = |variable: &'static str| {
            let message = "not set; start this program with `farcall run -n N -- …`, or set it".to_owned();
            get(variable).ok_or(JoinError::Setting { variable, message })
        };
        fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(
            variable: &'static str,
            text: &str,
        ) -> Result<T, JoinError> {
            text.parse().map_err(|error: T::Err| JoinError::Setting { variable, message: format!("{text:?}: {error}") })
        }
        let rank: u32 = parse("FARCALL_RANK", &required("FARCALL_RANK")?)?;
        let world_size: u32 = parse("FARCALL_WORLD_SIZE", &required("FARCALL_WORLD_SIZE")?)?;
        let mut options = Self::new(rank, world_size, required("FARCALL_STORE")?);
        options.name = get("FARCALL_NAME");
        if let Some(group) = get("FARCALL_GROUP") {
            options.group = group;
        }
        if let Some(bind) = get("FARCALL_BIND") {
            options.bind = parse("FARCALL_BIND", &bind)?;
        }
        if let Some(advertise) = get("FARCALL_ADVERTISE") {
            options.advertise = Some(parse("FARCALL_ADVERTISE", &advertise)?);
        }
        if let Some(transport) = get("FARCALL_TRANSPORT") {
            options.transport = parse("FARCALL_TRANSPORT", &transport)?;
        }
        options.key = key_from_variables(&get)?;
        let files = ["FARCALL_TLS_CERT", "FARCALL_TLS_KEY", "FARCALL_TLS_CA"];
        options.tls = match files.map(&get) {
            [None, None, None] => None,
            [Some(certificate), Some(key), Some(ca)] => {
                let tls = Tls::from_files(certificate.as_ref(), key.as_ref(), ca.as_ref());
                let setting = |error: TlsError| JoinError::Setting { variable: files[0], message: error.to_string() };
                Some(tls.map_err(setting)?)
            }
            given => {
                let missing =
                    files.iter().zip(&given).find(|(_, given)| given.is_none()).map_or(files[0], |(name, _)| name);
                let message = format!("not set; TLS needs all of {}", files.join(", "));
                return Err(JoinError::Setting { variable: missing, message });
            }
        };
        if let Some(host) = get("FARCALL_HOST_STORE") {
            options.host_store = match host.as_str() {
                "0" => false,
                "1" => true,
                _ => {
                    let message = format!("{host:?}: 0 or 1 is expected");
                    return Err(JoinError::Setting { variable: "FARCALL_HOST_STORE", message });
                }
            };
        }
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<(), JoinError> {
        if self.rank >= self.world_size {
            let message = format!("rank {} of {} workers", self.rank, self.world_size);
            return Err(JoinError::Setting { variable: "FARCALL_RANK", message });
        }
        Ok(())
    }
}

/// What is not UTF-8 must not count as not set: it is refused, with its variable's name.
fn variable(name: &str) -> Option<String> {
    Some(std::env::var_os(name)?.to_string_lossy().into_owned())
}

fn key_from_variables(get: &impl Fn(&str) -> Option<String>) -> Result<Option<JobKey>, JoinError> {
    let bad = |variable| move |error: KeyError| JoinError::Setting { variable, message: error.to_string() };
    Ok(match (get("FARCALL_KEY"), get("FARCALL_KEY_FILE")) {
        (None, None) => None,
        (Some(key), None) => Some(JobKey::from_hex(&key).map_err(bad("FARCALL_KEY"))?),
        (None, Some(path)) => Some(JobKey::from_file(path.as_ref()).map_err(bad("FARCALL_KEY_FILE"))?),
        (Some(_), Some(_)) => {
            let message = "FARCALL_KEY_FILE is set, too; set one of them".to_owned();
            return Err(JoinError::Setting { variable: "FARCALL_KEY", message });
        }
    })
}

/// What leaving needs: the store, and this worker's place in it.
pub(crate) struct Group {
    store: EmbeddedStore,
    /// Kept while the group may need it.
    server: std::sync::Mutex<Option<StoreServer>>,
    prefix: String,
    world_size: u32,
    shutdown_timeout: Duration,
}

impl Group {
    fn key(&self, what: &str, rank: u32) -> String {
        format!("{}/{what}/{rank}", self.prefix)
    }

    /// Publishes `what` for `rank`, and waits until every rank has published it or is gone.
    fn meet(&self, what: &str, rank: u32, deadline: Instant) -> Result<(), StoreError> {
        self.store.set(&self.key(what, rank), b"")?;
        let keys: Vec<[String; 2]> =
            (0..self.world_size).map(|rank| [self.key(what, rank), gone_key(&identity(&self.prefix, rank))]).collect();
        let groups: Vec<[&str; 2]> = keys.iter().map(|[a, b]| [a.as_str(), b.as_str()]).collect();
        let groups: Vec<&[&str]> = groups.iter().map(<[&str; 2]>::as_slice).collect();
        self.store.wait_each(&groups, deadline)
    }
}

fn identity(prefix: &str, rank: u32) -> String {
    format!("{prefix}/{rank}")
}

impl Agent {
    /// Joins the group: resolves once all `world_size` workers are known. Connections are made at first use.
    ///
    /// # Errors
    /// [`JoinError`]: a bad setting, a name given twice, or workers that did not come within `join_timeout`, by rank.
    /// # Cancel safety
    /// Dropping the future lets the join go on in its thread; the agent it gives is closed at once.
    pub async fn join(options: Options) -> Result<Self, JoinError> {
        on_thread("farcall-join", move || Self::join_blocking(options)).await?
    }

    /// [`Agent::join`] for threads that may block.
    ///
    /// # Errors
    /// As [`Agent::join`].
    pub fn join_blocking(options: Options) -> Result<Self, JoinError> {
        if is_forked_child() {
            return Err(JoinError::ForkedProcess);
        }
        options.check()?;
        let registry = options.registry.clone().unwrap_or_else(Registry::collected);
        registry.check()?;
        let deadline = Instant::now() + options.join_timeout;
        let host = || StoreServer::bind_with(&options.store, StoreLimits::default(), options.key.clone());
        let server = options.host_store.then(host).transpose()?;
        let address = server.as_ref().map_or_else(|| options.store.clone(), |server| server.address().to_string());
        let me = identity(&options.group, options.rank);
        let store = EmbeddedStore::connect_with(&address, &me, options.key.as_ref(), deadline)?;
        // Who hosts a store on all addresses reaches it over loopback, which tells nothing.
        let reached = store.local_address().filter(|address| {
            let hosted_on_all = server.as_ref().is_some_and(|server| server.address().ip().is_unspecified());
            address.is_ipv4() == options.bind.is_ipv4() && !hosted_on_all
        });
        let advertise = options.advertise.or_else(|| reached.filter(|_| options.bind.ip().is_unspecified()));

        let name = options.name.clone().unwrap_or_else(|| format!("w{}", options.rank));
        let worker = WorkerInfo {
            id: WorkerId { name: name.into(), rank: options.rank },
            address: options.bind,
            pid: std::process::id(),
            local: None,
            incarnation: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |age| age.as_nanos() as u64),
        };
        let driver = Driver::bind(DriverConfig {
            worker,
            group: options.group.clone(),
            limits: options.limits.clone(),
            runtime: options.device_runtime.clone().unwrap_or_else(|| Runtime::global().clone()),
            connect_timeout: options.connect_timeout,
            peer_timeout: options.peer_timeout,
            handlers_max: options.handlers_max,
            threads_max: THREADS_MAX,
            key: options.key.clone(),
            advertise,
            transport: options.transport,
            tls: options.tls.clone(),
        })?;
        for (worker, map) in &options.device_maps {
            let wrong = |message| JoinError::DeviceMap { worker: worker.clone(), message };
            map.check(&driver.config().runtime).map_err(wrong)?;
        }
        let agent = Self::new(&options, &driver, registry);
        let group = Group {
            store,
            server: std::sync::Mutex::new(server),
            prefix: options.group.clone(),
            world_size: options.world_size,
            shutdown_timeout: options.shutdown_timeout,
        };
        let workers = meet_workers(&group, &driver.config().worker, deadline)?;
        if let Some(unknown) =
            options.device_maps.keys().find(|name| workers.iter().all(|worker| *worker.id.name != ***name))
        {
            let message = "there is no such worker in the group".to_owned();
            return Err(JoinError::DeviceMap { worker: unknown.clone(), message });
        }
        agent.set_workers(workers);
        // Set once, here.
        let _ = agent.inner().group.set(group);
        // Who joined faster may dial already: the socket listens. It is answered now, when handlers know the group.
        driver.start(Arc::new(Acceptor(Arc::downgrade(agent.inner()))))?;
        Ok(agent)
    }

    /// Leaves the group in order: waits for this agent's own calls, serves the others until each is done or gone, then
    /// closes every connection. Calls made after it fail with `ShutDown`; while it serves, handlers may still call.
    ///
    /// # Errors
    /// [`StoreError::Missing`] (in [`JoinError::Store`]) names who was not done in `shutdown_timeout`; the agent is
    /// closed all the same. Shutting down twice is no error.
    /// # Cancel safety
    /// Dropping the future lets the shutdown go on in its thread.
    pub async fn shutdown(&self) -> Result<(), JoinError> {
        let agent = self.clone();
        on_thread("farcall-leave", move || agent.shutdown_blocking()).await?
    }

    /// [`Agent::shutdown`] for threads that may block.
    ///
    /// # Errors
    /// As [`Agent::shutdown`].
    pub fn shutdown_blocking(&self) -> Result<(), JoinError> {
        let within = self.inner().group.get().map_or(Duration::ZERO, |group| group.shutdown_timeout);
        self.leave(Some(Instant::now() + within))
    }

    /// Serves the others for as long as they need it, then leaves: [`Agent::shutdown`] without a limit of time.
    ///
    /// It ends when each of the others has begun to leave or is gone.
    ///
    /// # Errors
    /// As [`Agent::shutdown`], but for the deadline.
    pub async fn serve(&self) -> Result<(), JoinError> {
        let agent = self.clone();
        on_thread("farcall-serve", move || agent.serve_blocking()).await?
    }

    /// [`Agent::serve`] for threads that may block.
    ///
    /// # Errors
    /// As [`Agent::serve`].
    pub fn serve_blocking(&self) -> Result<(), JoinError> {
        self.leave(None)
    }

    fn leave(&self, deadline: Option<Instant>) -> Result<(), JoinError> {
        if is_forked_child() {
            return Err(JoinError::ForkedProcess);
        }
        let inner = self.inner();
        let Some(group) = inner.group.get() else { return Ok(()) };
        if inner.left.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let in_time = || deadline.is_none_or(|deadline| Instant::now() < deadline);
        while self.in_flight() > 0 && in_time() {
            std::thread::sleep(DRAIN_TICK);
        }
        let rank = self.worker().rank;
        let met = loop {
            // A store bounds each wait: who has longer asks again.
            let slice = Instant::now() + SERVE_WAIT;
            match group.meet("done", rank, deadline.map_or(slice, |deadline| deadline.min(slice))) {
                Err(StoreError::Missing { .. }) if in_time() => {}
                met => break met,
            }
        };
        inner.stop(STOP_WAIT);
        // Who hosts the store keeps it until the others know that all are done.
        let hosts = group.server.lock().is_ok_and(|server| server.is_some());
        if hosts {
            if let Err(error) = group.meet("left", rank, Instant::now() + STOP_WAIT) {
                tracing::warn!(%error, "closing the store before everybody left it");
            }
        } else if met.is_ok() {
            // If the host is gone already, it knows.
            let _ = group.store.set(&group.key("left", rank), b"");
        }
        let _ = group.store.close();
        if let Ok(mut server) = group.server.lock() {
            *server = None;
        }
        Ok(met?)
    }

    /// Closes every connection at once: calls in flight fail here and at the peers. Idempotent.
    pub fn abort(&self) {
        self.inner().stop(STOP_WAIT);
    }
}

/// Publishes this worker and reads all others.
fn meet_workers(group: &Group, worker: &WorkerInfo, deadline: Instant) -> Result<Vec<WorkerInfo>, JoinError> {
    let malformed = |rank: u32, message: String| JoinError::Malformed { rank, message };
    let rank = worker.id.rank;
    let published = postcard::to_stdvec(worker).map_err(|error| malformed(rank, error.to_string()))?;
    group.store.set(&group.key("worker", rank), &published)?;
    let keys: Vec<String> = (0..group.world_size).map(|rank| group.key("worker", rank)).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    let mut workers: Vec<WorkerInfo> = Vec::with_capacity(keys.len());
    for (value, rank) in group.store.wait(&keys, deadline)?.iter().zip(0..) {
        let info: WorkerInfo = postcard::from_bytes(value).map_err(|error| malformed(rank, error.to_string()))?;
        if info.id.rank != rank {
            return Err(malformed(rank, format!("it says it is rank {}", info.id.rank)));
        }
        if let Some(other) = workers.iter().find(|other| other.id.name == info.id.name) {
            return Err(JoinError::DuplicateWorker { name: info.id.name, ranks: [other.id.rank, rank] });
        }
        workers.push(info);
    }
    Ok(workers)
}

/// Runs what blocks in a thread of its own, so that no runtime's thread waits for it.
async fn on_thread<T: Send + 'static>(
    what: &'static str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    let (sender, receiver) = oneshot::channel();
    // A receiver that is gone drops the value: an agent closes its connections.
    let body = move || drop(sender.send(run()));
    let started = std::thread::Builder::new().name(what.into()).spawn(body);
    started.map_err(|error| JoinError::Thread { what, message: error.to_string() })?;
    receiver.await.map_err(|_| JoinError::Thread { what, message: "ended early".to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(variables: &[(&str, &str)]) -> Result<Options, JoinError> {
        Options::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn settings_are_read_from_the_environment() {
        let options = from(&[
            ("FARCALL_RANK", "1"),
            ("FARCALL_WORLD_SIZE", "4"),
            ("FARCALL_STORE", "127.0.0.1:2950"),
            ("FARCALL_NAME", "trainer"),
            ("FARCALL_HOST_STORE", "1"),
        ])
        .expect("complete settings");
        assert_eq!((options.rank, options.world_size, options.host_store), (1, 4, true));
        assert_eq!(options.name.as_deref(), Some("trainer"));
    }

    #[test]
    fn a_wrong_or_missing_setting_is_named() {
        let named = |variables: &[(&str, &str)]| match from(variables) {
            Err(JoinError::Setting { variable, .. }) => variable,
            other => panic!("{other:?}"),
        };
        assert_eq!(named(&[]), "FARCALL_RANK");
        assert_eq!(named(&[("FARCALL_RANK", "x")]), "FARCALL_RANK");
        assert_eq!(
            named(&[("FARCALL_RANK", "4"), ("FARCALL_WORLD_SIZE", "4"), ("FARCALL_STORE", "a:1")]),
            "FARCALL_RANK"
        );
        assert_eq!(named(&[("FARCALL_RANK", "0"), ("FARCALL_WORLD_SIZE", "4")]), "FARCALL_STORE");
        let with = |variable, value| {
            let complete = [("FARCALL_RANK", "0"), ("FARCALL_WORLD_SIZE", "1"), ("FARCALL_STORE", "a:1")];
            named(&[&complete[..], &[(variable, value)]].concat())
        };
        assert_eq!(with("FARCALL_KEY", ""), "FARCALL_KEY");
        assert_eq!(with("FARCALL_KEY", "not hexadecimal"), "FARCALL_KEY");
        assert_eq!(with("FARCALL_KEY_FILE", "/nowhere/farcall-key"), "FARCALL_KEY_FILE");
        assert_eq!(with("FARCALL_ADVERTISE", "host"), "FARCALL_ADVERTISE");
        assert_eq!(with("FARCALL_TRANSPORT", "udp"), "FARCALL_TRANSPORT");
    }

    #[test]
    fn a_key_is_read_from_one_place() {
        let complete = [("FARCALL_RANK", "0"), ("FARCALL_WORLD_SIZE", "1"), ("FARCALL_STORE", "a:1")];
        let hex = "00112233445566778899aabbccddeeff";
        let with = |more: &[(&str, &str)]| from(&[&complete[..], more].concat());
        assert!(with(&[]).expect("complete settings").key.is_none());
        let key = with(&[("FARCALL_KEY", hex)]).expect("complete settings").key.expect("a key");
        assert_eq!(key.to_hex(), hex);
        let error = with(&[("FARCALL_KEY", hex), ("FARCALL_KEY_FILE", "/a")]).expect_err("which one?").to_string();
        assert_eq!(error, "FARCALL_KEY: FARCALL_KEY_FILE is set, too; set one of them");
    }
}
