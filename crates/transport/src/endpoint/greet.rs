//! The greeting of an endpoint: who both are, what they can do together, and that they may.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::epoll::EventFlags;

use super::encode::{encoded, greeting, read_greeting, write_greeting};
use super::{Endpoint, Status, lock};
use crate::address::{Hello, Role, Welcome};
use crate::auth::{Acceptor, Dialer};
use crate::driver::Peer;
use crate::error::AuthError;
use crate::frame::{FEATURE_DIGESTS, FEATURE_RINGS, FEATURE_SLABS, Kind, VERSION};
use crate::receive::Receiver;
use crate::shm::Borrower;
use crate::socket::Socket;
use crate::{CloseCause, Frame, ProtocolError, Route};

impl Endpoint {
    pub(super) fn greet(&self) -> Result<(), CloseCause> {
        let (hello, proof) = self.hello(Role::Control { target: self.expected().cloned() })?;
        *lock(&self.proof) = proof;
        self.status.store(Status::Greeting as u8, Ordering::Release);
        self.control.set(&self.driver, EventFlags::IN);
        write_greeting(self.control.socket(), &greeting(Kind::Hello, &hello))
    }

    pub(super) fn hello(&self, role: Role) -> Result<(Vec<u8>, Option<Dialer>), CloseCause> {
        let hello = {
            let features = if matches!(role, Role::Control { .. }) { self.features() } else { 0 };
            Hello::encode(self.driver.config(), role, self.peer_text(), features, || self.driver.fresh())
        };
        hello.map_err(|source| CloseCause::PeerLost { source: Some(Arc::new(source)) })
    }

    /// The acceptor proves that it has the job's key, and asks for the same.
    pub(super) fn on_challenge(&self, challenge: &[u8]) -> Result<(), CloseCause> {
        let Some(proof) = &mut *lock(&self.proof) else {
            return Err(CloseCause::Auth(AuthError::KeyWanted { peer: self.peer_text() }));
        };
        write_greeting(self.control.socket(), &greeting(Kind::Proof, &proof.on_challenge(challenge)?))
    }

    /// The acceptor's answer; from now on frames go both ways.
    pub(crate) fn welcome(
        self: &Arc<Self>,
        peer: Arc<dyn Peer>,
        features: u64,
        acceptor: Option<Acceptor>,
    ) -> Result<(), CloseCause> {
        let key = lock(&self.bulk).key;
        lock(&self.rx).receiver.place_by(Arc::downgrade(&peer));
        if self.peer.set(peer).is_err() {
            unreachable!("an endpoint is welcomed once");
        }
        let welcome = Welcome {
            worker: self.driver.config().worker.clone(),
            bulk_key: key,
            version: VERSION,
            features: features & self.features(),
        };
        if welcome.features & FEATURE_SLABS != 0 {
            self.start_slabs(&mut lock(&self.rx).receiver);
        }
        if welcome.features & FEATURE_DIGESTS != 0 {
            lock(&self.rx).receiver.take_digests();
            self.has_digests.store(true, Ordering::Release);
        }
        let mut welcome = encoded(&welcome);
        if let Some(acceptor) = acceptor {
            acceptor.seal(&mut welcome);
        }
        // Calls to the peer may wait already: they go behind the welcome.
        let mut tx = lock(&self.tx);
        write_greeting(self.control.socket(), &greeting(Kind::Welcome, &welcome))?;
        let (from, to) = (Status::Greeting as u8, Status::Open as u8);
        if self.status.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.write_control(&mut tx)?;
        }
        Ok(())
    }

    pub(super) fn on_welcome(self: &Arc<Self>, frame: &Frame) -> Result<(), CloseCause> {
        let proof = lock(&self.proof).take();
        let metadata = match proof {
            Some(mut proof) => &proof.on_welcome(&frame.metadata)?.to_vec(),
            None => &frame.metadata,
        };
        let welcome: Welcome = read_greeting("welcome", metadata)?;
        if welcome.version != VERSION {
            return Err(ProtocolError::NoCommonVersion { theirs: [welcome.version; 2], ours: VERSION }.into());
        }
        if let Some(expected) = self.expected()
            && **expected != *welcome.worker.id.name
        {
            let (found, expected) = (welcome.worker.id.name.to_string(), expected.to_string());
            return Err(ProtocolError::WrongWorker { found, expected }.into());
        }
        let (found, dialed) = (&welcome.worker, self.dialed.as_ref().map(|(worker, _)| worker));
        if let Some(dialed) = dialed
            && found.incarnation < dialed.incarnation
        {
            let (life, newest) = (found.incarnation, dialed.incarnation);
            return Err(ProtocolError::EarlierLife { worker: found.id.name.to_string(), life, newest }.into());
        }
        if self.offers_slabs && welcome.features & FEATURE_SLABS != 0 {
            // Before frames that wait leave; the reader goes on from there.
            self.has_slabs.store(true, Ordering::Release);
        }
        // Before the peer is known, as requests with digests wait for that.
        self.has_digests.store(welcome.features & FEATURE_DIGESTS != 0, Ordering::Release);
        // The only writer: frames of one connection are delivered one at a time, and a second welcome is refused.
        let _ = self.remote.set(welcome.worker);
        if let Some(peer) = self.peer.get() {
            Arc::clone(peer).on_opened(self);
        }
        self.watch_life();
        let mut tx = lock(&self.tx);
        self.send_rings(&mut tx, welcome.features)?;
        let mut bulk = lock(&self.bulk);
        bulk.key = welcome.bulk_key;
        let (from, to) = (Status::Greeting as u8, Status::Open as u8);
        if self.status.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_err() {
            return Ok(()); // closed meanwhile
        }
        if !bulk.queue.is_empty() {
            self.dial_bulk(&mut bulk)?;
        }
        drop(bulk);
        self.write_control(&mut tx)
    }

    /// What this side can do on this connection, in a hello or a welcome.
    pub(super) fn features(&self) -> u64 {
        FEATURE_DIGESTS | if self.offers_slabs { FEATURE_SLABS | FEATURE_RINGS } else { 0 }
    }

    /// Both sides pass slabs: from now on.
    pub(super) fn start_slabs(self: &Arc<Self>, rx: &mut Receiver) {
        self.returns.attach(Arc::downgrade(self));
        let limits = self.driver.config().limits.clone();
        rx.borrow_from(Borrower::new(limits, Arc::clone(&self.returns), Arc::clone(&self.lender)));
        lock(&self.lender).start();
        self.has_slabs.store(true, Ordering::Release);
    }
}

/// The outcome of a connect that made the socket writable.
pub(super) fn finish_connect(socket: &Socket, route: Option<&Route>) -> Result<(), CloseCause> {
    let outcome = match socket.take_error() {
        Ok(None) => socket.prepare(),
        Ok(Some(error)) | Err(error) => Err(error),
    };
    outcome.map_err(|source| match route.cloned() {
        Some(route) => CloseCause::Connect { route, source: Arc::new(source) },
        None => CloseCause::PeerLost { source: Some(Arc::new(source)) },
    })
}
