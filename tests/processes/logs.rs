//! What workers write to standard error: nothing while all goes well, a line for a worker that is lost.

use crate::functions::relay;
use crate::harness::{bounded, eventually, step};

use super::spawn::Processes;

/// w1 has a connection to w2, by a call that this process asked for.
fn connect(agent: &farcall::Agent) {
    let sum = agent.to("w1").call(relay, (vec!["w2".to_owned()], 7)).wait().expect("w1 and w2 answer");
    assert!(sum >= 7);
}

#[test]
fn a_normal_run_and_its_shutdown_say_nothing() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_with(2, &[("FARCALL_LOG", "info")]);
        connect(&agent);
        step("the group's shutdown");
        agent.shutdown_blocking().expect("leaves in order");
        for worker in processes.workers.iter_mut().filter_map(Option::take) {
            let ended = worker.end();
            assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
        }
    });
}

/// At `debug` the same run does speak: the one above is quiet because nothing is worth a word.
#[test]
fn normal_closes_are_told_at_debug() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_with(2, &[("FARCALL_LOG", "debug")]);
        connect(&agent);
        agent.shutdown_blocking().expect("leaves in order");
        let ended = processes.workers[1].take().expect("a process").end();
        let closed =
            ended.stderr.lines().filter(|line| line.contains("DEBUG farcall_rpc::link: endpoint closed peer="));
        assert_eq!(closed.count(), 2, "{}", ended.stderr);
        assert!(ended.stderr.lines().all(|line| line.starts_with("w1 2")), "{}", ended.stderr);
    });
}

#[test]
fn a_lost_worker_is_one_line() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_with(2, &[("FARCALL_LOG_FORMAT", "json")]);
        connect(&agent);
        processes.kill(2);
        eventually("w1 knows", std::time::Duration::from_secs(10), || {
            agent.to("w1").call(relay, (vec!["w2".to_owned()], 7)).wait().is_err()
        });
        step("the group's shutdown");
        agent.shutdown_blocking().expect("leaves in order");
        let ended = processes.workers[1].take().expect("a process").end();
        let [line] = ended.stderr.lines().collect::<Vec<_>>()[..] else { panic!("{}", ended.stderr) };
        for field in ["message\":\"lost a worker", "level\":\"WARN", "peer\":\"w2", "worker\":\"w1", "rank\":1"] {
            assert!(line.contains(field), "{field}: {line}");
        }
        assert!(line.contains("process died"), "{line}");
    });
}
