//! Replies into parameters from a worker that dies in the middle of one.

use std::time::Duration;

use farcall::prelude::*;
use farcall::{DeviceError, Param};

use crate::functions::{hash, pattern};
use crate::harness::{bounded, eventually, step};

use super::spawn::Processes;

const BIG: usize = 256 << 20;

/// Nobody sees a half of a value: it is torn, says so to whoever asks, and the next reply makes it whole in the same cell.
#[test]
fn a_worker_killed_in_the_middle_of_a_reply_leaves_no_half_of_a_value() {
    bounded(|| {
        let (mut processes, agent) = Processes::serving_over_tcp(2);
        let param = Param::new(Tensor::zeros(DType::U8, &[BIG]).expect("memory"));
        for worker in ["w1", "w2"] {
            // The bulk connections are open.
            let first = agent.to(worker).call(pattern, (BIG, 1)).into(&param).wait().expect("both live");
            assert_eq!(hash::run(first).expect("bytes"), hash::run(param.value()).expect("bytes"));
        }
        step("a reply that is cut off");
        let reply = agent.to("w1").call(pattern, (BIG, 2)).into(&param);
        eventually("bytes land in the parameter", Duration::from_secs(10), || param.try_value().is_none());
        processes.kill(1);
        let error = reply.wait().expect_err("its worker is dead");
        assert!(matches!(error, CallError::PeerLost { .. }), "{error}");
        let torn = param.value();
        assert!(matches!(torn.as_slice::<u8>(), Err(DeviceError::Torn { .. })));
        let refused = agent.to("w2").call(hash, (&torn,)).wait().expect_err("it cannot be sent");
        assert!(refused.to_string().contains("torn"), "{refused}");
        drop(torn);
        step("a reply that comes whole");
        drop(agent.to("w2").call(pattern, (BIG, 3)).into(&param).wait().expect("w2 lives"));
        assert_eq!(
            hash::run(param.value()).expect("whole"),
            hash::run(pattern::run(BIG, 3).expect("memory")).expect("bytes")
        );
        processes.shutdown(&agent);
    });
}
