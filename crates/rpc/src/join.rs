//! Joining a group of a known size, and leaving it together.
//!
//! Static join: each worker publishes its address in the store and waits for all others'. Leaving: a worker is done when
//! its own calls have their replies; it then serves on until every other is done or gone, and only then closes. One that was
//! started again meanwhile ([`crate::lives`]) must be done or gone, too.
//! Invariant BOUNDED: joining and leaving have deadlines; what they miss is named.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farcall_device::Runtime;
use farcall_transport::{
    Driver, DriverConfig, EmbeddedStore, InterfaceChoice, JobKey, Limits, Spin, Store, StoreError, StoreLimits,
    StoreServer, Tls, TransferError, Transport, WorkerId, WorkerInfo, gone_key, is_forked_child,
};
use tokio::sync::oneshot;

use crate::agent::{Acceptor, Agent};
use crate::error::JoinError;
use crate::lives;
use crate::settings::Settings;
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
    /// This worker's number on its host, for programs that choose a device by it.
    pub local_rank: Option<u32>,
    /// Where this worker listens; port 0 for any. Default: on the address from which it reaches the store, loopback where
    /// that is on loopback. Beyond loopback only with a `key`.
    pub bind: Option<SocketAddr>,
    /// The network interface whose address this worker listens on, in place of `bind`.
    pub interface: Option<InterfaceChoice>,
    /// The ports to listen on, unless `bind` has one: the first that is free. Default: any.
    pub ports: Option<RangeInclusive<u16>>,
    /// Under which address the others reach this worker. Default: the one that it listens on, or, if it listens on all, the one
    /// from which it reaches the store.
    pub advertise: Option<IpAddr>,
    /// Which sockets are used. Default: Unix sockets between workers of one user on one host, else TCP.
    pub transport: Transport,
    /// Whether tensors pass in shared memory to workers of the same user on this host, where the system lets them. Default: yes.
    pub slabs: bool,
    /// Whether threads look for work a while before they sleep, which is faster and takes processor time. Default: while it is
    /// seen to pay.
    pub spin: Spin,
    /// A certificate for connections over TCP, which then are encrypted: all workers of the job have one of the same CA.
    /// Only in builds with the feature `tls`. The store has no TLS: beyond loopback it needs a `key`, too.
    pub tls: Option<Tls>,
    /// The secret of this job, the same for all its workers: who cannot prove it is refused, by workers and by the store.
    /// Without one everyone on this machine can call this worker.
    pub key: Option<JobKey>,
    /// How long a call waits for its reply unless told otherwise. Default 60 s.
    pub deadline: Duration,
    /// Tensors are sent with digests, which their receivers compare, unless [`To::digests`](crate::To::digests) says otherwise.
    pub digests: bool,
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
            local_rank: None,
            bind: None,
            interface: None,
            ports: None,
            advertise: None,
            transport: Transport::default(),
            slabs: true,
            spin: Spin::default(),
            tls: None,
            key: None,
            deadline: Duration::from_secs(60),
            digests: false,
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

    /// Options from the environment: [`settings`](crate::settings) of variables, of a file and of launchers.
    ///
    /// Rank, number of workers and where they meet must be told: by a launcher, such as `farcall run`, torchrun or Slurm, or by
    /// `FARCALL_RANK`, `FARCALL_WORLD_SIZE` and `FARCALL_STORE` (host:port).
    ///
    /// `FARCALL_TLS_CERT`, `FARCALL_TLS_KEY` and `FARCALL_TLS_CA` name PEM files for TLS, all or none of them.
    ///
    /// The job's key comes from `FARCALL_KEY` (hexadecimal digits) or `FARCALL_KEY_FILE` (a file with them that nobody else
    /// can read); `openssl rand -hex 32` makes one. A process's environment can be read by its own user and by root, and by
    /// the processes that it starts.
    ///
    /// # Errors
    /// [`JoinError::Settings`] names the variable, or the line of the file, and what is expected.
    pub fn from_env() -> Result<Self, JoinError> {
        Ok(Settings::from_env()?.options()?)
    }

    /// The job's key alone, from the same places, for launchers.
    ///
    /// # Errors
    /// As [`Options::from_env`].
    pub fn key_from_env() -> Result<Option<JobKey>, JoinError> {
        Ok(Settings::from_env()?.key()?)
    }

    fn check(&self) -> Result<(), JoinError> {
        if self.rank >= self.world_size {
            let message = format!("rank {} of {} workers", self.rank, self.world_size);
            return Err(JoinError::Setting { variable: "FARCALL_RANK", message });
        }
        Ok(())
    }
}

/// What leaving needs: the store, and this worker's place in it.
pub(crate) struct Group {
    store: EmbeddedStore,
    /// Kept while the group may need it.
    server: std::sync::Mutex<Option<StoreServer>>,
    prefix: String,
    rank: u32,
    life: u64,
    world_size: u32,
    shutdown_timeout: Duration,
}

impl Group {
    /// Says `what` of this worker.
    fn tell(&self, what: &str) -> Result<(), StoreError> {
        self.store.set(&lives::key(&self.prefix, what, self.rank, self.life), b"")
    }

    /// Says `what` of this worker, and waits until the newest life of every rank has said it or is gone.
    fn meet(&self, what: &str, deadline: Instant) -> Result<(), StoreError> {
        self.tell(what)?;
        let mut newest = lives::newest(&self.store, &self.prefix, self.world_size)?;
        loop {
            let key = |(rank, life)| {
                let said = lives::key(&self.prefix, what, rank, life);
                [said, gone_key(&lives::identity(&self.prefix, rank, life))]
            };
            let keys: Vec<[String; 2]> = (0..).zip(newest.iter().copied()).map(key).collect();
            let groups: Vec<[&str; 2]> = keys.iter().map(|[a, b]| [a.as_str(), b.as_str()]).collect();
            let groups: Vec<&[&str]> = groups.iter().map(<[&str; 2]>::as_slice).collect();
            self.store.wait_each(&groups, deadline)?;
            let now = lives::newest(&self.store, &self.prefix, self.world_size)?;
            if now == newest {
                return Ok(());
            }
            newest = now;
        }
    }

    /// What workers of these ranks have published of themselves. Over a connection of its own: the group's may be waiting.
    pub(crate) fn published(
        &self,
        ranks: BTreeSet<u32>,
        me: &WorkerId,
        config: &DriverConfig,
    ) -> Result<Vec<WorkerInfo>, StoreError> {
        let deadline = Instant::now() + config.connect_timeout;
        let identity = format!("{}/looking/{}/{}", self.prefix, me.rank, self.life);
        let store = EmbeddedStore::connect_with(self.store.address(), &identity, config.key.as_ref(), deadline)?;
        let mut workers = Vec::with_capacity(ranks.len());
        for rank in ranks {
            let published = store.get(&lives::worker_key(&self.prefix, rank))?;
            workers.extend(published.and_then(|info| postcard::from_bytes(&info).ok()));
        }
        store.close()?;
        Ok(workers)
    }
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
        let (group, rank) = (&options.group, options.rank);
        let life = lives::begin(&address, group, rank, options.key.as_ref(), deadline)?;
        let me = lives::identity(group, rank, life);
        let store = EmbeddedStore::connect_with(&address, &me, options.key.as_ref(), deadline)?;
        lives::await_earlier(&store, group, rank, life, deadline)?;
        let hosted = server.as_ref().map(StoreServer::address);
        let Listen { address: listen, advertise, ports } = Listen::of(&options, store.local_address(), hosted)?;

        let name = options.name.clone().unwrap_or_else(|| format!("w{}", options.rank));
        let worker = WorkerInfo {
            id: WorkerId { name: name.into(), rank: options.rank },
            address: listen,
            pid: std::process::id(),
            local: None,
            incarnation: life,
        };
        let config = DriverConfig {
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
            slabs: options.slabs,
            spin: options.spin,
            tls: options.tls.clone(),
        };
        let driver = bind(&config, ports)?;
        for (worker, map) in &options.device_maps {
            let wrong = |message| JoinError::DeviceMap { worker: worker.clone(), message };
            map.check(&driver.config().runtime).map_err(wrong)?;
        }
        let agent = Self::new(&options, &driver, registry);
        let group = Group {
            store,
            server: std::sync::Mutex::new(server),
            prefix: options.group.clone(),
            rank: options.rank,
            life,
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
        let met = loop {
            // A store bounds each wait: who has longer asks again.
            let slice = Instant::now() + SERVE_WAIT;
            match group.meet("done", deadline.map_or(slice, |deadline| deadline.min(slice))) {
                Err(StoreError::Missing { .. }) if in_time() => {}
                met => break met,
            }
        };
        inner.stop(STOP_WAIT);
        // Who hosts the store keeps it until the others know that all are done.
        let hosts = group.server.lock().is_ok_and(|server| server.is_some());
        if hosts {
            if let Err(error) = group.meet("left", Instant::now() + STOP_WAIT) {
                tracing::warn!(%error, "closing the store before everybody left it");
            }
        } else if met.is_ok() {
            // If the host is gone already, it knows.
            let _ = group.tell("left");
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

/// Where a worker listens, and what it tells the others of it.
#[derive(Debug, PartialEq, Eq)]
struct Listen {
    address: SocketAddr,
    advertise: Option<IpAddr>,
    ports: RangeInclusive<u16>,
}

impl Listen {
    /// `reached` is this host's address of the connection to the store, `hosted` where this process hosts it, if it does.
    fn of(options: &Options, reached: Option<IpAddr>, hosted: Option<SocketAddr>) -> Result<Self, JoinError> {
        let setting = |variable, message| JoinError::Setting { variable, message };
        // Who hosts a store on all addresses reaches it over loopback, which tells nothing.
        let everywhere = hosted.map(|address| address.ip()).filter(IpAddr::is_unspecified);
        let reached = reached.filter(|_| everywhere.is_none());
        let address = match (options.bind, &options.interface) {
            (Some(_), Some(_)) => {
                return Err(setting("FARCALL_BIND", "`interface` is set, too; set one of them".into()));
            }
            (Some(bind), None) => bind,
            (None, Some(interface)) => {
                let found = interface.find(reached.or(options.advertise));
                let found = found.map_err(|error| setting("FARCALL_INTERFACE", error.to_string()))?;
                SocketAddr::new(found.address, 0)
            }
            (None, None) => SocketAddr::new(reached.or(everywhere).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), 0),
        };
        let ports = match (&options.ports, address.port()) {
            (None, port) => port..=port,
            (Some(ports), 0) if !ports.is_empty() => ports.clone(),
            (Some(_), 0) => return Err(setting("FARCALL_PORTS", "there is no port in this range".into())),
            (Some(_), _) => return Err(setting("FARCALL_PORTS", "`bind` has a port, too; set one of them".into())),
        };
        let same_family = |reached: &IpAddr| reached.is_ipv4() == address.is_ipv4();
        let reached = reached.filter(|reached| address.ip().is_unspecified() && same_family(reached));
        Ok(Self { address, advertise: options.advertise.or(reached), ports })
    }
}

/// Binds the driver to the first of `ports` that is free.
fn bind(config: &DriverConfig, ports: RangeInclusive<u16>) -> Result<Arc<Driver>, JoinError> {
    let taken = |error: &TransferError| matches!(error, TransferError::Os { source, .. } if source.kind() == io::ErrorKind::AddrInUse);
    for port in ports.clone() {
        let mut config = config.clone();
        config.worker.address.set_port(port);
        match Driver::bind(config) {
            Err(error) if taken(&error) => {}
            bound => return Ok(bound?),
        }
    }
    let (first, last, address) = (ports.start(), ports.end(), config.worker.address.ip());
    let message = format!("no port from {first} to {last} is free on {address}; set a wider range");
    Err(JoinError::Setting { variable: "FARCALL_PORTS", message })
}

/// Publishes this worker and reads all others.
fn meet_workers(group: &Group, worker: &WorkerInfo, deadline: Instant) -> Result<Vec<WorkerInfo>, JoinError> {
    let malformed = |rank: u32, message: String| JoinError::Malformed { rank, message };
    let rank = worker.id.rank;
    let published = postcard::to_stdvec(worker).map_err(|error| malformed(rank, error.to_string()))?;
    group.store.set(&lives::worker_key(&group.prefix, rank), &published)?;
    let keys: Vec<String> = (0..group.world_size).map(|rank| lives::worker_key(&group.prefix, rank)).collect();
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

    fn listen(change: impl FnOnce(&mut Options), reached: &str, hosted: Option<&str>) -> Result<Listen, String> {
        let mut options = Options::new(0, 1, "");
        change(&mut options);
        let hosted = hosted.map(|hosted| hosted.parse().expect("an address and a port"));
        let listen = Listen::of(&options, Some(reached.parse().expect("an address")), hosted);
        listen.map_err(|error| error.to_string())
    }

    fn told(change: impl FnOnce(&mut Options), reached: &str, hosted: Option<&str>) -> (String, Option<String>) {
        let listen = listen(change, reached, hosted).expect("settings that go together");
        (listen.address.to_string(), listen.advertise.map(|address| address.to_string()))
    }

    #[test]
    fn a_worker_listens_where_it_reaches_the_store() {
        for reached in ["127.0.0.1", "10.0.0.4"] {
            assert_eq!(told(|_| {}, reached, None), (format!("{reached}:0"), None));
        }
        for reached in ["::1", "fd00::4"] {
            assert_eq!(told(|_| {}, reached, None), (format!("[{reached}]:0"), None));
        }
        assert_eq!(told(|_| {}, "10.0.0.4", Some("10.0.0.4:2950")), ("10.0.0.4:0".into(), None));
        // Who hosts the store on all addresses cannot tell by which one; the driver asks for it.
        assert_eq!(told(|_| {}, "127.0.0.1", Some("0.0.0.0:2950")), ("0.0.0.0:0".into(), None));
        assert_eq!(told(|_| {}, "::1", Some("[::]:2950")), ("[::]:0".into(), None));
    }

    #[test]
    fn who_listens_on_all_addresses_tells_the_one_it_reaches_the_store_by() {
        let all = |options: &mut Options| options.bind = Some(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 7)));
        assert_eq!(told(all, "10.0.0.4", None), ("0.0.0.0:7".into(), Some("10.0.0.4".into())));
        assert_eq!(told(all, "fd00::4", None).1, None, "not one of the other family");
        assert_eq!(told(all, "127.0.0.1", Some("0.0.0.0:1")).1, None);
        let told = told(
            |options| {
                all(options);
                options.advertise = Some(Ipv4Addr::new(192, 0, 2, 1).into());
            },
            "10.0.0.4",
            None,
        );
        assert_eq!(told.1.as_deref(), Some("192.0.2.1"));
    }

    #[test]
    fn interface_bind_and_ports_go_together_or_are_refused() {
        let lo: InterfaceChoice = "lo".parse().expect("a name");
        assert_eq!(told(|options| options.interface = Some(lo.clone()), "127.0.0.1", None).0, "127.0.0.1:0");
        let bind = SocketAddr::from((Ipv4Addr::LOCALHOST, 7));
        let both = |options: &mut Options| (options.bind, options.interface) = (Some(bind), Some(lo.clone()));
        assert!(listen(both, "::1", None).expect_err("which?").starts_with("FARCALL_BIND: `interface` is set, too"));
        let ports = |options: &mut Options| (options.bind, options.ports) = (Some(bind), Some(7..=8));
        assert!(listen(ports, "::1", None).expect_err("which?").starts_with("FARCALL_PORTS: `bind` has a port, too"));
        let none = |options: &mut Options| options.interface = Some("=nowhere0".parse().expect("a name"));
        let error = listen(none, "::1", None).expect_err("no such interface");
        assert!(error.starts_with("FARCALL_INTERFACE: no network interface matches `=nowhere0`"), "{error}");
    }
}
