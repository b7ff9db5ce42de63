//! The frames of a greeting: a stranger's first bytes, read by the acceptor's parser and by the connection's, and proofs.

use std::fmt::Debug;
use std::net::SocketAddr;

use farcall_device::Runtime;
use serde::{Deserialize, Serialize};

use super::{Golden, Numbers, limits};
use crate::address::{Goodbye, Hello, Reason, Role, Welcome};
use crate::auth::{Acceptor, Dialer, Realm};
use crate::driver::{Awaited, Parsed, parse_message};
use crate::endpoint::{encoded, greeting as frame, read_greeting};
use crate::frame::{HEADER_BYTES, Kind};
use crate::receive::{Received, Receiver};
use crate::{Frame, JobKey, LifeAddress, LocalAddress, ProtocolError, WorkerId, WorkerInfo};

/// A greeting is read alike however its bytes come in, no byte behind it is taken, and what is read is written again.
pub fn greeting(input: &[u8]) -> bool {
    let mut numbers = Numbers::of(input);
    let whole = hello(input, || usize::MAX);
    let cut = hello(input, || numbers.up_to(40));
    assert_eq!(format!("{whole:?}"), format!("{cut:?}"));

    let Some(frame) = first_frame(input) else {
        assert!(!matches!(whole, Some(Ok(_))), "a hello that the connection's parser refuses: {whole:?}");
        return false;
    };
    if let Some(Ok(metadata)) = &whole {
        assert_eq!((frame.kind, metadata), (Kind::Hello, &frame.metadata));
    }
    match frame.kind {
        Kind::Hello => check::<Hello>(&frame),
        Kind::Welcome => check::<Welcome>(&frame) | welcome_is_sealed(&frame.metadata),
        Kind::Close => check::<Goodbye>(&frame),
        Kind::Challenge => is_only_the_challenge(&frame.metadata),
        Kind::Proof => is_only_the_proof(&frame.metadata),
        _ => false,
    }
}

/// The metadata of a hello, as the acceptor reads a stranger's bytes that arrive in pieces of at most so many.
fn hello(input: &[u8], mut piece: impl FnMut() -> usize) -> Option<Result<Vec<u8>, ProtocolError>> {
    let mut len = 0;
    loop {
        match parse_message(&input[..len], Awaited::Hello, &limits()) {
            Ok(Parsed::Message { metadata, .. }) => {
                assert!(len <= HEADER_BYTES + (16 << 10), "{len} bytes of a stranger are kept");
                return Some(Ok(metadata.to_vec()));
            }
            Ok(Parsed::Wants(want)) => {
                assert!(want > 0);
                if len == input.len() {
                    return None;
                }
                len += want.min(piece()).min(input.len() - len);
            }
            Err(error) => return Some(Err(error)),
        }
    }
}

/// What comes before a challenge in the golden inputs.
const HELLO: &[u8] = b"a hello";

fn sides() -> (Dialer, Acceptor, Vec<u8>) {
    let key = JobKey::new([1; 32]).unwrap_or_else(|error| panic!("{error}"));
    let (acceptor, challenge) = Acceptor::new(&key, Realm::Worker, HELLO, &[7; 32], String::new());
    (Dialer::new(&key, Realm::Worker, HELLO, String::new()), acceptor, challenge)
}

/// PEERS: no other bytes count as the acceptor's proof.
fn is_only_the_challenge(message: &[u8]) -> bool {
    let (mut dialer, _, challenge) = sides();
    let accepted = dialer.on_challenge(message).is_ok();
    assert_eq!(accepted, message == challenge);
    accepted
}

fn is_only_the_proof(message: &[u8]) -> bool {
    let (mut dialer, mut acceptor, challenge) = sides();
    let accepted = acceptor.on_proof(message).is_ok();
    assert_eq!(accepted, dialer.on_challenge(&challenge).is_ok_and(|proof| proof == message));
    accepted
}

/// Only what the acceptor sealed is opened.
fn welcome_is_sealed(message: &[u8]) -> bool {
    let (mut dialer, mut acceptor, challenge) = sides();
    assert!(dialer.on_welcome(message).is_err(), "a welcome before the challenge");
    let Ok(proof) = dialer.on_challenge(&challenge) else { panic!("the genuine challenge") };
    assert!(acceptor.on_proof(&proof).is_ok());
    let Ok(body) = dialer.on_welcome(message) else { return false };
    let mut sealed = body.to_vec();
    acceptor.seal(&mut sealed);
    assert_eq!(sealed, message);
    true
}

fn first_frame(mut input: &[u8]) -> Option<Frame> {
    let mut receiver = Receiver::new(limits(), Runtime::global().clone());
    match receiver.feed(&mut input) {
        Ok(Some(Received::Frame(frame))) => Some(frame),
        _ => None,
    }
}

fn check<'a, T: Serialize + Deserialize<'a> + Debug>(received: &'a Frame) -> bool {
    let Ok(value) = read_greeting::<T>("greeting", &received.metadata) else { return false };
    let written = frame(received.kind, &encoded(&value));
    let Some(again) = first_frame(&written) else { panic!("{value:?} is not read back") };
    // As text: what `T` borrows lives no longer than the frame.
    assert_eq!(again.kind, received.kind);
    let bytes = encoded(&value);
    assert_eq!(again.metadata, bytes, "{value:?}");
    // A number has one shortest form, so the canonical bytes are never more than those that came.
    assert!(bytes.len() <= received.metadata.len(), "{value:?}");
    true
}

/// Greetings as workers send them, and a stranger that speaks HTTP.
pub fn golden() -> Vec<Golden> {
    let worker = |name: &str, address: &str| WorkerInfo {
        id: WorkerId { name: name.into(), rank: 1 },
        address: address.parse::<SocketAddr>().expect("a literal address"),
        pid: 4321,
        incarnation: 0x0123_4567_89ab_cdef,
        local: Some(LocalAddress {
            name: "farcall-1".into(),
            boot: "b-1".into(),
            network: 1 << 31,
            user: 1000,
            life: Some(LifeAddress { descriptor: 9, id: 1 << 127 }),
        }),
    };
    let hello = |role: Role, nonce| {
        let group = "job-1".to_owned();
        let mut worker = worker("w1", "127.0.0.1:29501");
        // One that is reached by TCP alone.
        worker.local = worker.local.filter(|_| matches!(role, Role::Bulk { .. }));
        let hello = Hello { group, worker, role, versions: [1, 1], features: 0, nonce };
        frame(Kind::Hello, &encoded(&hello))
    };
    let welcome =
        Welcome { worker: worker("grüße", "[::1]:65535"), bulk_key: u128::MAX - 1, version: 1, features: u64::MAX };
    let goodbye = |reason, text: &str| frame(Kind::Close, &encoded(&Goodbye { reason, text: text.to_owned() }));
    // An extension that this version does not know, before the metadata.
    let mut extended = hello(Role::Control { target: None }, None);
    extended[30] = 3;
    extended.splice(HEADER_BYTES..HEADER_BYTES, [7, 8, 9]);
    let (mut dialer, mut acceptor, challenge) = sides();
    let proof = dialer.on_challenge(&challenge).expect("the genuine challenge");
    acceptor.on_proof(&proof).expect("the genuine proof");
    let mut sealed = encoded(&welcome);
    acceptor.seal(&mut sealed);
    vec![
        ("hello-control", hello(Role::Control { target: Some("w2".into()) }, None)),
        ("hello-with-nonce", hello(Role::Control { target: None }, Some([0xa5; 32]))),
        ("hello-bulk", hello(Role::Bulk { key: 1 << 100 }, None)),
        ("hello-extended", extended),
        ("challenge", frame(Kind::Challenge, &challenge)),
        ("proof", frame(Kind::Proof, &proof)),
        ("welcome", frame(Kind::Welcome, &encoded(&welcome))),
        ("welcome-sealed", frame(Kind::Welcome, &sealed)),
        ("goodbye", goodbye(Reason::Shutdown, "this worker shut down")),
        ("goodbye-refused", goodbye(Reason::Refused, "")),
        ("goodbye-wrong-key", goodbye(Reason::WrongKey, "")),
        ("refused-http", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
    ]
}
