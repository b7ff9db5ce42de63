//! What calls leave behind in their processes: nothing.

use std::time::Duration;

use crate::functions::{burst, held};
use crate::harness::{bounded, eventually, step};

use super::spawn::Processes;

const CALLS: usize = 10_000;
/// Of one tensor, so that both ends hold some memory for each call.
const LEN: usize = 4_096;

/// One caller has more calls at once than fit into the window. Afterwards both processes hold what they held before.
#[test]
fn ten_thousand_calls_at_once_leave_no_call_and_no_memory_behind() {
    bounded(|| {
        let (processes, agent) = Processes::serving(2);
        let settled = |rank: u32| {
            let mut found = (0, 0);
            eventually("nothing but what was there before is held", Duration::from_secs(10), || {
                found = agent.to(rank).call(held, ()).wait().expect("it lives");
                found == (0, 0)
            });
            processes.worker(rank as usize).resident_bytes()
        };
        let run = |calls| {
            let right = agent.to("w1").call(burst, ("w2", calls, LEN)).wait().expect("answers");
            assert_eq!(right, calls);
        };
        // What is kept for the next time grows for some rounds: slabs, and each thread's share of the allocator.
        for _ in 0..10 {
            run(CALLS);
        }
        let before = [settled(1), settled(2)];
        for round in 0..10 {
            step(format_args!("round {round}"));
            run(CALLS);
        }
        for (rank, before) in (1..).zip(before) {
            let after = settled(rank);
            println!("w{rank}: {} KiB resident before, {} KiB after", before >> 10, after >> 10);
            assert!(after <= before + before / 10, "w{rank}: {before} bytes resident before, {after} after");
        }
        processes.shutdown(&agent);
    });
}
