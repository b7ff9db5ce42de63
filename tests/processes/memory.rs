//! What calls leave behind in their processes: nothing.

use std::time::Duration;

use crate::functions::{burst, held, keep_mib};
use crate::harness::{bounded, eventually, step};

use super::spawn::Processes;

const CALLS: usize = 10_000;
/// Of one tensor, so that both ends hold some memory for each call.
const LEN: usize = 4_096;
const WARM_UP: usize = 3;
/// What each worker holds besides: a tenth of it is more than what an allocator may do.
const KEPT_MIB: usize = 64;
const ROUNDS: usize = 10;

/// One caller has more calls at once than fit into the window. Afterwards both processes hold what they held before.
#[test]
fn ten_thousand_calls_at_once_leave_no_call_and_no_memory_behind() {
    bounded(|| {
        // One arena: with several, what the allocator keeps depends on which threads met.
        let (processes, agent) = Processes::serving_with(2, &[("MALLOC_ARENA_MAX", "1")]);
        let settled = |rank: u32| {
            let mut found = (0, 0);
            eventually("nothing but what was there before is held", Duration::from_secs(10), || {
                found = agent.to(rank).call(held, ()).wait().expect("it lives");
                found == (0, KEPT_MIB << 20)
            });
            processes.worker(rank as usize).resident_bytes()
        };
        let run = |calls| {
            let right = agent.to("w1").call(burst, ("w2", calls, LEN)).wait().expect("answers");
            assert_eq!(right, calls);
        };
        for rank in [1, 2] {
            agent.to(rank).call(keep_mib, (KEPT_MIB,)).wait().expect("memory");
        }
        // Threads are started, tables grow, pages of the program are read.
        for round in 0..WARM_UP {
            step(format_args!("round {round} of warming up"));
            run(CALLS);
        }
        let before = [settled(1), settled(2)];
        for round in 0..ROUNDS {
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
