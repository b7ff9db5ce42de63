//! Many workers on one machine: how soon they meet, and what those cost that have nothing to say.

use std::time::{Duration, Instant};

use crate::functions::{add, meet_all};
use crate::harness::{bounded_by, eventually, step};

use super::spawn::Processes;

const WORKERS: u32 = 64;
const JOIN_MAX: Duration = Duration::from_secs(10);
/// After which an idle connection has given back what it needs while frames pass; see `shm::ring`.
const IDLE_MAX: Duration = Duration::from_secs(25);
const IDLE_BYTES_MAX: u64 = 32 << 10;
const IDLE_DESCRIPTORS_MAX: usize = 3;

#[test]
fn sixty_four_workers_meet_and_cost_little_while_they_are_silent() {
    bounded_by(Duration::from_secs(100), || {
        step("joining");
        let began = Instant::now();
        let (processes, agent) = Processes::serving_with(WORKERS as usize - 1, &[("FARCALL_CONNECT_TIMEOUT", "10s")]);
        let joined = began.elapsed();
        assert!(joined < JOIN_MAX, "{joined:?} to start and to join");
        let sample = processes.worker(1);
        assert_eq!(agent.to(1).call(add, (2, 3)).wait().expect("an answer"), 5);
        let before = (sample.descriptors(), sample.data_bytes());
        step("all to all");
        let began = Instant::now();
        // One after the other: all at once, they would keep two processors from the tests beside this one for seconds.
        for rank in 1..WORKERS {
            assert_eq!(agent.to(rank).call(meet_all, ()).wait().expect("they meet"), WORKERS - 1);
        }
        let met = began.elapsed();
        step("silence");
        let peers = WORKERS as usize - 2;
        let each = || {
            let (descriptors, bytes) = (sample.descriptors(), sample.data_bytes());
            ((descriptors - before.0).div_ceil(peers), bytes.saturating_sub(before.1) / peers as u64)
        };
        let mut cost = each();
        let loud = cost;
        eventually("a silent peer costs little", IDLE_MAX, || {
            cost = each();
            cost.0 <= IDLE_DESCRIPTORS_MAX && cost.1 <= IDLE_BYTES_MAX
        });
        println!(
            "{WORKERS} workers: {joined:?} to start and join, {met:?} to meet; a peer costs {} descriptors and {} KiB, {} KiB once silent",
            cost.0,
            loud.1 >> 10,
            cost.1 >> 10
        );
        assert_eq!(agent.to(1).call(meet_all, ()).wait().expect("they still know each other"), WORKERS - 1);
        processes.shutdown(&agent);
    });
}
