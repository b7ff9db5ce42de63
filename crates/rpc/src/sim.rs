//! Agents on a simulated network: the same code as elsewhere, without sockets, threads, a store or a clock of its own.
//!
//! A simulated agent is stepped by its [`World`](farcall_transport::sim::World); nothing may block in it. See
//! [`farcall_transport::sim`].

use std::sync::Arc;

use farcall_device::Runtime;
use farcall_transport::sim::Host;
use farcall_transport::{Driver, DriverConfig, Spin, TransferError, WorkerId, WorkerInfo};

use crate::agent::{Acceptor, Agent};
use crate::call::lock;
use crate::{Options, Registry};

/// What an agent holds of calls, by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Calls of this worker that have no outcome.
    pub waiting: usize,
    /// Its requests that are not answered, on all its connections.
    pub sent: usize,
    /// Its requests that wait for room in a window.
    pub queued: usize,
    /// Calls of others that are worked on, on all its connections.
    pub serving: usize,
    /// The most of them on one connection.
    pub serving_max: usize,
    /// Calls of others that were cancelled before they had come whole.
    pub cancelled_early: usize,
}

/// What a worker on `host` publishes: its name is `w` and its rank.
pub fn worker(host: &Host, rank: u32, incarnation: u64) -> WorkerInfo {
    WorkerInfo {
        id: WorkerId { name: format!("w{rank}").into(), rank },
        address: host.address(),
        pid: rank,
        incarnation,
        local: None,
    }
}

impl Agent {
    /// An agent on a simulated host: `workers` by rank are its group, which it joins without a store.
    ///
    /// Of `options`, those of sockets, the store and runtimes mean nothing here. The memory is `device_runtime`'s, else the
    /// process's.
    ///
    /// # Errors
    /// [`TransferError`]: another worker lives on that host.
    pub fn simulated(
        options: &Options,
        host: &Host,
        workers: Vec<WorkerInfo>,
        me: WorkerInfo,
    ) -> Result<Self, TransferError> {
        let driver = Driver::bind_simulated(
            DriverConfig {
                worker: me,
                group: options.group.clone(),
                limits: options.limits.clone(),
                runtime: options.device_runtime.clone().unwrap_or_else(|| Runtime::global().clone()),
                connect_timeout: options.connect_timeout,
                peer_timeout: options.peer_timeout,
                handlers_max: options.handlers_max,
                threads_max: 1,
                key: options.key.clone(),
                advertise: None,
                transport: options.transport,
                slabs: false,
                spin: Spin::Off,
                tls: None,
            },
            host,
        )?;
        let registry = options.registry.clone().unwrap_or_else(Registry::collected);
        let agent = Self::new(options, &driver, registry);
        agent.set_workers(workers);
        driver.start(Arc::new(Acceptor(Arc::downgrade(agent.inner()))))?;
        Ok(agent)
    }

    /// What this agent holds of calls.
    pub fn census(&self) -> Census {
        let mut census = Census { waiting: lock(&self.inner().local).waiting(), ..Census::default() };
        self.inner().simulated_links().iter().for_each(|link| link.count(&mut census));
        census
    }

    /// Where it lives, if that is in a simulation.
    pub fn simulated_on(&self) -> Option<&Host> {
        self.inner().driver.simulated()
    }
}
