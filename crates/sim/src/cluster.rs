//! The workers of one simulation, the calls they make and the faults that are done to them.

use std::cell::OnceCell;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use farcall_device::{Config, Runtime, Tensor};
use farcall_rpc::{Agent, Options, Reply};
use farcall_transport::sim::{Host, World};
use farcall_transport::{CloseCause, JobKey, WorkerInfo};
use serde::de::DeserializeOwned;

use crate::Report;
use crate::functions::{Echo, Fail, Nap, Relay, Shift, Work, digest, mix, registry, report_to};
use crate::model::{Model, Outcome, Record, fits, lock, take_log};
use crate::plan::{ACTIVE, Fault, FaultKind, Plan, PlannedCall, Waiter, What};

/// How long after the last fault every connection that it broke is gone.
const SETTLE: Duration = Duration::from_secs(3);
/// How long calls have to their outcomes, then. Those with the longest deadline end before it.
const QUIET: Duration = Duration::from_secs(30);
/// Events between two looks at the limits.
const LOOK_EVERY: u32 = 64;
/// How long a leaving worker waits for its peers to take its goodbye.
const GOODBYE: Duration = Duration::from_millis(700);

/// Is given each event as a line of text.
pub type Print = Box<dyn FnMut(&str) + Send>;

thread_local! {
    static MEMORY: OnceCell<Runtime> = const { OnceCell::new() };
}

/// Inline streams, whatever the environment says: others have threads.
fn memory() -> Option<Runtime> {
    MEMORY.with(|memory| {
        if memory.get().is_none()
            && let Ok(runtime) = Runtime::new(Config::default())
        {
            let _ = memory.set(runtime);
        }
        memory.get().cloned()
    })
}

/// What happens at its time.
#[derive(Clone)]
enum Step {
    Call(PlannedCall),
    Break(Fault),
    Mend(Fault),
}

struct Member {
    host: Host,
    agent: Agent,
}

struct Cluster {
    world: World,
    plan: Plan,
    options: Options,
    infos: Vec<WorkerInfo>,
    /// The newest life of each.
    members: Vec<Member>,
    model: Arc<Mutex<Model>>,
    report: Report,
}

/// Simulates what `seed` says. Each event is given to `print`, if there is one.
pub fn run(seed: u64, print: Option<Print>) -> Report {
    let plan = Plan::of(seed);
    let world = World::new(seed, plan.conditions.clone());
    if let Some(print) = print {
        world.print_with(print);
    }
    let mut cluster = match Cluster::new(world, plan) {
        Ok(cluster) => cluster,
        Err(violation) => return Report { violations: vec![violation], ..Report::default() },
    };
    report_to(Some(&cluster.model));
    cluster.live();
    cluster.probe();
    cluster.rest();
    cluster.leave();
    report_to(None);
    cluster.report()
}

impl Cluster {
    fn new(world: World, plan: Plan) -> Result<Self, String> {
        let mut options = Options::new(0, plan.workers, "");
        options.limits = plan.limits.clone();
        options.registry = Some(registry());
        options.device_runtime = memory();
        options.key = plan.key.then(|| JobKey::new([7; 32])).transpose().map_err(|error| error.to_string())?;
        let hosts: Vec<Host> = (0..plan.workers as usize).map(|machine| world.start(machine)).collect();
        let infos: Vec<WorkerInfo> =
            hosts.iter().zip(0..).map(|(host, rank)| farcall_rpc::sim::worker(host, rank, 1)).collect();
        let mut members = Vec::new();
        for (host, info) in hosts.into_iter().zip(&infos) {
            host.set_drift_ppm(plan.drifts_ppm[members.len()]);
            let agent = Agent::simulated(&options, &host, infos.clone(), info.clone());
            members.push(Member { host, agent: agent.map_err(|error| error.to_string())? });
        }
        let model = Arc::default();
        Ok(Self { world, plan, options, infos, members, model, report: Report::default() })
    }

    /// Takes every event up to that time, and looks at what must hold in between.
    fn run_until(&mut self, time: Duration) {
        let mut steps = 0;
        while self.world.step_by(time) {
            steps += 1;
            self.pass_log();
            if steps % LOOK_EVERY == 0 {
                self.check_limits();
            }
        }
        self.world.run_until(time);
    }

    /// What handlers and waiters saw goes into the trace.
    fn pass_log(&self) {
        for line in take_log(&self.model) {
            self.world.note(&line);
        }
    }

    fn violation(&mut self, text: String) {
        self.report.violations.push(text);
    }

    /// LIMITS.
    fn check_limits(&mut self) {
        let limits = &self.plan.limits;
        for (rank, member) in self.members.iter().enumerate() {
            if !member.host.is_alive() {
                continue;
            }
            let (calls, bytes) = (member.agent.census(), member.host.census());
            if calls.serving_max > limits.requests_max {
                let text = format!("LIMITS: w{rank} works on {} calls of one peer", calls.serving_max);
                return self.violation(text);
            }
            if bytes.unanswered_bytes_max > limits.request_bytes_max {
                let text = format!("LIMITS: w{rank} holds {} unanswered bytes of one peer", bytes.unanswered_bytes_max);
                return self.violation(text);
            }
        }
    }

    /// The active time: calls and faults as planned, and everything mended at its end.
    fn live(&mut self) {
        let mut steps: Vec<(Duration, Step)> =
            self.plan.calls.iter().map(|(at, call)| (*at, Step::Call(call.clone()))).collect();
        for fault in &self.plan.faults {
            steps.push((fault.from, Step::Break(*fault)));
            steps.push((fault.until, Step::Mend(*fault)));
        }
        steps.sort_by_key(|(at, _)| *at);
        for (at, step) in steps {
            self.run_until(at);
            match step {
                Step::Call(call) => self.issue(&call, false),
                Step::Break(fault) => self.break_it(fault),
                Step::Mend(fault) => self.mend(fault),
            }
            self.pass_log();
        }
        self.run_until(ACTIVE + SETTLE);
        self.check_closed(true);
    }

    fn break_it(&mut self, fault: Fault) {
        let Fault { machine, kind, from, until } = fault;
        let name = kind.name();
        self.world.note(&format!("w{machine}: {name}"));
        *self.report.faults.entry(name).or_default() += 1;
        let (index, lasts) = (machine as usize, until.saturating_sub(from));
        let member = &self.members[index];
        match kind {
            FaultKind::Kill { with_machine } => {
                member.host.kill(with_machine);
                // What is left of it here has no effect there any more.
                member.agent.abort();
            }
            FaultKind::Stop => member.host.stop(),
            FaultKind::Busy => member.host.keep_busy(lasts),
            FaultKind::Leap(by) => member.host.leap(by),
            FaultKind::Cut { to, both } => {
                self.world.cut(index, to as usize);
                if both {
                    self.world.cut(to as usize, index);
                }
            }
            FaultKind::Reset { other } => self.world.reset(index, other as usize),
        }
    }

    fn mend(&mut self, fault: Fault) {
        let index = fault.machine as usize;
        self.world.note(&format!("w{index}: mended: {}", fault.kind.name()));
        match fault.kind {
            FaultKind::Kill { .. } => self.restart(index),
            FaultKind::Stop => self.members[index].host.go_on(),
            FaultKind::Cut { to, both } => {
                self.world.heal(index, to as usize);
                if both {
                    self.world.heal(to as usize, index);
                }
            }
            FaultKind::Busy | FaultKind::Leap(_) | FaultKind::Reset { .. } => {}
        }
    }

    /// Another life of that worker: the same name at the same address.
    fn restart(&mut self, index: usize) {
        let host = self.world.start(index);
        host.set_drift_ppm(self.plan.drifts_ppm[index]);
        let info = farcall_rpc::sim::worker(&host, index as u32, self.infos[index].incarnation + 1);
        self.infos[index] = info.clone();
        match Agent::simulated(&self.options, &host, self.infos.clone(), info) {
            Ok(agent) => self.members[index] = Member { host, agent },
            Err(error) => self.violation(format!("w{index} cannot be restarted: {error}")),
        }
    }

    fn issue(&mut self, planned: &PlannedCall, after_healing: bool) {
        let member = &self.members[planned.caller as usize];
        if !member.host.is_alive() || member.host.is_stopped() {
            return;
        }
        let now = self.world.now();
        let record = |what, callee, caller| Record {
            what,
            caller,
            callee,
            process: member.host.process(),
            issued: now,
            deadline: planned.deadline,
            inner: Vec::new(),
            fails: matches!(planned.what, What::Fail),
            after_healing,
            runs: 0,
            outcome: None,
        };
        let name = match planned.what {
            What::Echo => "echo",
            What::Work => "work",
            What::Fail => "fail",
            What::Nap(_) => "nap",
            What::Relay(_) => "relay",
            What::Shift(_) => "shift",
        };
        let mut model = lock(&self.model);
        let token = model.add(record(name, planned.callee, planned.caller));
        model.log.push(format!("call {token}: {planned:?}"));
        // The last hop comes first in the list of hops.
        let mut hops: Vec<(u64, u32)> = Vec::new();
        if let What::Relay(ranks) = &planned.what {
            let mut caller = planned.callee;
            for rank in ranks {
                let inner =
                    model.add(Record { outcome: Some((now, Outcome::Dropped)), ..record("hop", *rank, caller) });
                hops.insert(0, (inner, *rank));
                caller = *rank;
            }
            model.calls[token as usize].inner = hops.iter().map(|(token, _)| *token).collect();
        }
        drop(model);
        let x = token.wrapping_mul(7) + 1;
        let expected = mix(token, x);
        let to = member.agent.to(planned.callee).deadline(planned.deadline);
        match &planned.what {
            What::Echo => self.watch(token, member, planned, to.call(Echo, (token, x)), move |v| *v == expected),
            What::Work => self.watch(token, member, planned, to.call(Work, (token, x)), move |v| *v == expected),
            What::Fail => self.watch(token, member, planned, to.call(Fail, (token, x)), |_| false),
            What::Nap(nap) => {
                let reply = to.call(Nap, (token, x, nap.as_micros() as u64));
                self.watch(token, member, planned, reply, move |v| *v == expected);
            }
            What::Relay(_) => {
                let expected = hops.iter().chain([&(token, 0)]).fold(x, |value, (token, _)| mix(*token, value));
                let reply = to.call(Relay, (token, x, hops));
                self.watch(token, member, planned, reply, move |v| *v == expected);
            }
            What::Shift(len) => {
                let numbers: Vec<u32> = (0..*len as u32).map(|i| i.wrapping_mul(token as u32 | 1)).collect();
                let expected = mix(token, digest(&numbers));
                let Ok(tensor) = Tensor::from_slice(&numbers, &[*len]) else { return };
                let reply = to.call(Shift, (token, tensor));
                self.watch(token, member, planned, reply, move |(sum, shifted): &(u64, Tensor)| {
                    let shifted = shifted.as_slice::<u32>().unwrap_or_default();
                    let back = shifted.iter().map(|number| number.wrapping_sub(token as u32));
                    *sum == expected && back.eq(numbers.iter().copied())
                });
            }
        }
    }

    /// Has the caller wait for the reply as planned, and the model hear of it.
    fn watch<T: DeserializeOwned + 'static>(
        &self,
        token: u64,
        member: &Member,
        planned: &PlannedCall,
        reply: Reply<T>,
        right: impl Fn(&T) -> bool + Send + 'static,
    ) {
        let (model, world) = (Arc::clone(&self.model), self.world.downgrade());
        let resolve = move |outcome| {
            if let Some(world) = world.upgrade() {
                lock(&model).resolve(token, world.now(), outcome);
            }
        };
        let patience = match planned.waiter {
            Waiter::Stays => None,
            Waiter::DropsAfter(patience) => Some(patience),
            Waiter::Detaches => {
                reply.detach();
                return resolve(Outcome::Dropped);
            }
        };
        let mut sleep = patience.map(|patience| member.host.sleep(patience));
        let mut reply = Some(reply.into_future());
        member.host.spawn(async move {
            let outcome = std::future::poll_fn(|cx| {
                if let Some(waiting) = &mut reply
                    && let Poll::Ready(outcome) = Pin::new(waiting).poll(cx)
                {
                    return Poll::Ready(Some(outcome));
                }
                match &mut sleep {
                    Some(sleep) => Pin::new(sleep).poll(cx).map(|()| None),
                    None => Poll::Pending,
                }
            });
            let outcome = outcome.await;
            drop(reply);
            resolve(match outcome {
                Some(Ok(value)) => Outcome::Value { right: right(&value) },
                Some(Err(error)) => Outcome::Error(error),
                None => Outcome::Dropped,
            });
        });
    }

    /// All is healed: everybody reaches everybody.
    fn probe(&mut self) {
        for caller in 0..self.plan.workers {
            for callee in 0..self.plan.workers {
                let (what, waiter) = (What::Shift(3_000), Waiter::Stays);
                let deadline = Duration::from_secs(5);
                self.issue(&PlannedCall { caller, callee, what, deadline, waiter }, true);
            }
        }
        self.pass_log();
    }

    /// Waits until every call has its outcome; then nothing of them is left anywhere.
    fn rest(&mut self) {
        let end = self.world.now() + QUIET;
        let alive: Vec<usize> = self.members.iter().map(|member| member.host.process()).collect();
        while self.world.now() < end && lock(&self.model).pending(|process| alive.contains(&process)) > 0 {
            let next = self.world.now() + Duration::from_millis(200);
            self.run_until(next);
        }
        // Answers that nobody waits for, and cancellations, arrive.
        let next = self.world.now() + Duration::from_secs(2);
        self.run_until(next);
        self.check_closed(true);
        for rank in 0..self.members.len() {
            let Member { host, agent } = &self.members[rank];
            let (calls, held) = (agent.census(), host.census());
            let left = calls.waiting + calls.sent + calls.queued + calls.serving + calls.cancelled_early;
            if left > 0 || agent.in_flight() > 0 {
                self.violation(format!("left over at w{rank}: {calls:?}, {} in flight", agent.in_flight()));
            }
            // Heartbeats may be on their way.
            if held.parked + held.leaving > 0 || held.unanswered_bytes > 0 || held.backlog_bytes > 1 << 10 {
                self.violation(format!("left over at w{rank}: {held:?}"));
            }
        }
    }

    /// The causes that endpoints closed with: each has its reason.
    fn check_closed(&mut self, active: bool) {
        for closed in self.world.take_closed() {
            let peer = closed.peer.strip_prefix('w').and_then(|rank| rank.parse().ok());
            let leaves = matches!(*closed.cause, CloseCause::LocalShutdown | CloseCause::PeerShutdown { .. });
            let explained = match peer {
                Some(peer) if active => fits(&closed.cause, closed.machine as u32, peer, closed.at, &self.plan.faults),
                _ => leaves,
            };
            if !explained {
                let (at, machine, cause) = (closed.at, closed.machine, &closed.cause);
                let text =
                    format!("nothing that was done explains, at {at:?}, that w{machine} lost {}: {cause}", closed.peer);
                self.violation(text);
            }
        }
    }

    /// Everybody leaves, one after the other, and leaves nothing behind.
    fn leave(&mut self) {
        for index in 0..self.members.len() {
            let end = self.world.now() + GOODBYE;
            self.members[index].host.leave();
            while self.world.now() < end && !self.members[index].host.has_left() {
                let next = self.world.now() + Duration::from_millis(10);
                self.run_until(next);
            }
            let member = &self.members[index];
            member.agent.abort();
            let (host, held) = (member.host.clone(), member.host.census());
            if held.connections + held.bulk_keys > 0 {
                self.violation(format!("left over at w{index}, which has left: {held:?}"));
            }
            host.kill(false);
        }
        self.check_closed(false);
    }

    fn report(mut self) -> Report {
        self.pass_log();
        let alive: Vec<usize> = self.members.iter().map(|member| member.host.process()).collect();
        let model = lock(&self.model);
        self.report.violations.extend(model.check(&self.plan.faults, |process| alive.contains(&process)));
        for record in &model.calls {
            let name = match &record.outcome {
                None => "caller died",
                Some((_, Outcome::Dropped)) if record.what == "hop" => "made by handlers",
                Some((_, Outcome::Dropped)) => "dropped or detached",
                Some((_, Outcome::Value { .. })) => "value",
                Some((_, Outcome::Error(farcall_rpc::CallError::PeerLost { .. }))) => "peer lost",
                Some((_, Outcome::Error(farcall_rpc::CallError::Deadline { .. }))) => "deadline passed",
                Some((_, Outcome::Error(_))) => "handler's error",
            };
            *self.report.calls.entry(name).or_default() += 1;
        }
        drop(model);
        self.report.hash = self.world.hash();
        self.report.events = self.world.events();
        self.report
    }
}
