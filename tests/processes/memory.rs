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
        // One arena: with several, what the allocator keeps depends on which threads met. And through sockets: resident memory
        // counts what a process has mapped of its peer's slabs, too.
        let variables = [("MALLOC_ARENA_MAX", "1"), ("FARCALL_SHM", "off")];
        let (processes, agent) = Processes::serving_with(2, &variables);
        // Each gives up the memory that it does not use.
        let resident = || {
            for rank in [1, 2] {
                eventually("nothing but what was there before is held", Duration::from_secs(10), || {
                    agent.to(rank).call(held, ()).wait().expect("it lives") == (0, KEPT_MIB << 20)
                });
            }
            [1, 2].map(|rank| processes.worker(rank).resident_bytes())
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
        let mut before = resident();
        for _ in 0..20 {
            let now = resident();
            before = [0, 1].map(|worker| before[worker].min(now[worker]));
        }
        for round in 0..ROUNDS {
            step(format_args!("round {round}"));
            run(CALLS);
        }
        let mut after = [0; 2];
        eventually("both have what they had, and a tenth at most", Duration::from_secs(10), || {
            after = resident();
            [0, 1].iter().all(|worker| after[*worker] <= before[*worker] + before[*worker] / 10)
        });
        println!("resident bytes: {before:?} before, {after:?} after");
        processes.shutdown(&agent);
    });
}
