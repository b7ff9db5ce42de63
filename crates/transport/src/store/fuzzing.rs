//! What must hold for any bytes between a store's client and its server; see [`crate::fuzzing`].

use std::fmt::Debug;

use serde::Serialize;

use super::Refusal;
use super::wire::{self, CHALLENGE, FRAME_BYTES_MAX, Hello, Reply, Request};
use crate::fuzzing::Golden;

/// The input is a frame's payload: as a hello, a request and a reply, what decodes is written and read again.
pub fn store(input: &[u8]) -> bool {
    // By macro, since each message borrows from its own bytes.
    macro_rules! decodes {
        ($message:ident) => {
            wire::decode::<$message<'_>>(input).is_some_and(|message| {
                let frame = written(&message);
                let (len, payload) = frame.split_at(4);
                assert_eq!(len, (payload.len() as u32).to_le_bytes());
                // A number has one shortest form, so the canonical bytes are never more than those that came.
                assert!(payload.len() <= input.len().min(FRAME_BYTES_MAX), "{message:?}");
                let Some(again) = wire::decode::<$message<'_>>(payload) else { panic!("{message:?} is not read back") };
                assert_eq!(format!("{again:?}"), format!("{message:?}"));
                assert_eq!(written(&again), frame);
                true
            })
        };
    }
    let hello = decodes!(Hello);
    let request = decodes!(Request);
    let reply = decodes!(Reply);
    assert!(!reply || input[0] != CHALLENGE, "a reply that a client would take for a challenge");
    hello || request || reply
}

fn written<T: Serialize + Debug>(message: &T) -> Vec<u8> {
    wire::frame(message).unwrap_or_else(|error| panic!("{message:?} does not encode: {error}"))
}

/// Hellos, every request, every reply.
pub fn golden() -> Vec<Golden> {
    fn payload(message: &impl Serialize) -> Vec<u8> {
        wire::frame(message).expect("small messages encode").split_off(4)
    }
    let refusal = |refusal| payload(&Reply::Refused(refusal));
    vec![
        ("hello", payload(&Hello { identity: "w0-1234", nonce: None })),
        ("hello-with-nonce", payload(&Hello { identity: "w1", nonce: Some([0x9d; 32]) })),
        ("set", payload(&Request::Set { key: "worker/0", value: &[1, 2, 3] })),
        ("get", payload(&Request::Get { keys: vec!["a", "", "grüße"] })),
        ("add", payload(&Request::Add { key: "barrier/0", amount: i64::MIN })),
        ("wait", payload(&Request::Wait { groups: vec![vec!["done/1", "gone/1"], vec!["x"]], timeout_ms: 60_000 })),
        ("leave", payload(&Request::Leave)),
        ("done", payload(&Reply::Done)),
        ("values", payload(&Reply::Values(vec![None, Some(&[]), Some(&[7; 9])]))),
        ("sum", payload(&Reply::Sum(-1))),
        ("missing", payload(&Reply::Missing(vec![0, 300, u32::MAX]))),
        ("key-refused", refusal(Refusal::Key { bytes: 1025, limit_bytes: 1024 })),
        ("no-number", refusal(Refusal::NotANumber { key: "k".to_owned() })),
    ]
}
