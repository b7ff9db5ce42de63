//! Who cannot prove the job's key: told what to do, told nothing else, and in nobody's way.
//!
//! Proofs are made by hand here (`raw::Transcript`), from the header of `transport::auth`.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use farcall::prelude::*;
use farcall::transport::{AuthError, StoreError, StoreLimits};
use farcall::{CloseCause, JobKey, JoinError, Options, StoreServer, Transport};

use crate::functions::add;
use crate::harness::{Group, bounded, step};

use super::raw::{
    CHALLENGE, CLOSE, Descriptor, Frame, OFFER, PROOF, RawPeer, Target, Transcript, WELCOME, assert_says, bulk_role,
    chunk, control, echo_request, hello, timed, with_nonce,
};

// Reasons of a Close frame.
const KEY_WANTED: u128 = 2;
const NO_KEY: u128 = 3;
const WRONG_KEY: u128 = 4;
const OTHER_USER: u128 = 5;

fn key() -> JobKey {
    JobKey::random().expect("random bytes")
}

/// A group whose workers share a key.
fn keyed() -> Target {
    Target::with_key(Some(key()))
}

/// A stranger's hello to w0 that asks for a proof, and the challenge it is answered with.
fn challenged(target: &Target) -> (RawPeer, Frame, Vec<u8>) {
    let mut peer = target.stranger();
    let hello = with_nonce(&hello(target.group_name(), &control(Some("w0"))), [3; 32]);
    peer.send(&hello.bytes());
    let challenge = peer.expect(CHALLENGE).metadata;
    (peer, hello, challenge)
}

/// What covers a hello and the challenge that answered it.
fn transcript(key: &JobKey, hello: &Frame, challenge: &[u8]) -> Transcript {
    Transcript::worker(key).with(&hello.metadata).with(&challenge[..32]).with(&challenge[32..])
}

fn proof(metadata: Vec<u8>) -> Vec<u8> {
    Frame { metadata, ..Frame::new(PROOF) }.bytes()
}

#[test]
fn a_peer_without_a_key_is_told_so_and_nothing_else() {
    bounded(|| {
        let target = keyed();
        // Right or wrong in everything else: before the proof nobody is told which.
        for (group, role) in [
            (target.group_name(), control(Some("w0"))),
            (target.group_name(), control(Some("w9"))),
            ("other", control(None)),
            (target.group_name(), bulk_role(1)),
        ] {
            let mut peer = target.stranger();
            peer.send(&hello(group, &role).bytes());
            assert_eq!(peer.close(), (KEY_WANTED, String::new()));
            target.serves_others();
        }
        target.shutdown();
    });
}

#[test]
fn a_peer_with_a_key_is_refused_where_there_is_none() {
    bounded(|| {
        let target = Target::new();
        let mut peer = target.stranger();
        peer.send(&with_nonce(&hello(target.group_name(), &control(Some("w0"))), [3; 32]).bytes());
        assert_eq!(peer.close(), (NO_KEY, String::new()));
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_peer_with_the_key_is_still_refused_for_what_else_is_wrong() {
    bounded(|| {
        let target = keyed();
        for (group, role, why) in [
            ("other", control(None), "the peer belongs to group \"other\""),
            (target.group_name(), control(Some("w9")), "worker w0 answered where w9 was dialed"),
            (target.group_name(), bulk_role(1), "bulk connection with an unknown key"),
        ] {
            let mut peer = target.stranger();
            peer.introduce(&hello(group, &role), target.job_key());
            assert_says(&peer.close_text(), why);
        }
        target.serves_others();
        target.shutdown();
    });
}

/// Extensions of a later version are passed over, but nobody adds them on the way: proofs cover them.
#[test]
fn extensions_of_a_hello_are_passed_over_and_covered_by_its_proof() {
    bounded(|| {
        let target = keyed();
        let right = target.job_key().expect("a keyed group").clone();
        let extended = |hello: &Frame| {
            let mut bytes = hello.patched(30, &3_u16.to_le_bytes());
            bytes.splice(64..64, [7, 8, 9]);
            bytes
        };
        for covered in [true, false] {
            let mut peer = target.stranger();
            let hello = with_nonce(&hello(target.group_name(), &control(Some("w0"))), [3; 32]);
            peer.send(&extended(&hello));
            let challenge = peer.expect(CHALLENGE).metadata;
            let known = if covered { [&[7, 8, 9], &hello.metadata[..]].concat() } else { hello.metadata };
            let transcript = Transcript::worker(&right).with(&known).with(&challenge[..32]);
            assert_eq!(transcript.proof("challenge") == challenge[32..], covered);
            peer.send(&proof(transcript.with(&challenge[32..]).proof("proof")));
            if covered {
                peer.expect(WELCOME);
            } else {
                assert_eq!(peer.close(), (WRONG_KEY, String::new()));
            }
        }
        target.shutdown();
        // Where there is no key, they are passed over just so.
        let target = Target::new();
        let mut peer = target.stranger();
        peer.send(&extended(&hello(target.group_name(), &control(Some("w0")))));
        peer.expect(WELCOME);
        target.shutdown();
    });
}

/// A proof made of the true key, a hello and the challenge that answered it.
type Forgery = fn(&JobKey, &Frame, &[u8]) -> Vec<u8>;

#[test]
fn forged_proofs_are_refused() {
    bounded(|| {
        let target = keyed();
        let right = target.job_key().expect("a keyed group").clone();
        let forgeries: [(&str, Forgery); 6] = [
            ("zeros", |_, _, _| vec![0; 32]),
            ("another key", |_, hello, challenge| transcript(&key(), hello, challenge).proof("proof")),
            ("its own, sent back", |_, _, challenge| challenge[32..].to_vec()),
            ("its own nonce", |_, _, challenge| challenge[..32].to_vec()),
            ("of another role", |right, hello, challenge| transcript(right, hello, challenge).proof("welcome")),
            // As someone on the way would leave it, who has changed the hello that the dialer signs for.
            ("of an older offer", |right, hello, challenge| {
                let mut changed = hello.clone();
                let at = changed.metadata.len() - 33 - (OFFER.len() - 1);
                changed.metadata[at] = 0;
                transcript(right, &changed, challenge).proof("proof")
            }),
        ];
        for (what, forge) in forgeries {
            step(format_args!("a forgery: {what}"));
            let (mut peer, hello, challenge) = challenged(&target);
            assert_ne!(Transcript::worker(&key()).with(&hello.metadata).proof("challenge"), challenge[32..]);
            peer.send(&proof(forge(&right, &hello, &challenge)));
            assert_eq!(peer.close(), (WRONG_KEY, String::new()), "{what}");
            target.serves_others();
        }
        // The same by hand and right is let in: it is the proof that the others lack.
        let (mut peer, hello, challenge) = challenged(&target);
        peer.send(&proof(transcript(&right, &hello, &challenge).proof("proof")));
        peer.expect(WELCOME);
        target.shutdown();
    });
}

/// All that a worker with the key sent to get in, byte by byte, gets nobody else in.
#[test]
fn a_replayed_greeting_is_refused() {
    bounded(|| {
        let target = keyed();
        let (mut peer, hello, first) = challenged(&target);
        let right = target.job_key().expect("a keyed group");
        let recorded = proof(transcript(right, &hello, &first).proof("proof"));
        peer.send(&recorded);
        peer.expect(WELCOME);
        for _ in 0..3 {
            let mut replay = target.stranger();
            replay.send(&[hello.bytes(), recorded.clone()].concat());
            let challenge = replay.expect(CHALLENGE).metadata;
            assert_ne!(challenge[..32], first[..32], "a fresh nonce");
            assert_eq!(replay.close(), (WRONG_KEY, String::new()));
        }
        peer.announce();
        peer.adds(1);
        target.serves_others();
        target.shutdown();
    });
}

/// Also not on a connection that names the key of a true peer's bulk connection.
#[test]
fn a_bulk_connection_needs_the_proof_too() {
    bounded(|| {
        let target = keyed();
        let (mut peer, bulk_key) = target.peer_with_key();
        let hello = hello(target.group_name(), &bulk_role(bulk_key));
        let mut without = target.stranger();
        without.send(&hello.bytes());
        assert_eq!(without.close(), (KEY_WANTED, String::new()));
        let mut forged = target.stranger();
        forged.send(&with_nonce(&hello, [3; 32]).bytes());
        forged.expect(CHALLENGE);
        forged.send(&proof(vec![1; 32]));
        assert_eq!(forged.close(), (WRONG_KEY, String::new()));
        // The place is still free for who can.
        let mut bulk = target.bulk(bulk_key);
        peer.send(&echo_request(1, &Descriptor::bulk(1, 70_000), &[]).bytes());
        bulk.send(&chunk(1, 0, &[5; 70_000]).bytes());
        assert_eq!(bulk.expect(super::raw::CHUNK).payload, [5; 70_000]);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn nothing_but_a_proof_follows_the_challenge() {
    bounded(|| {
        let target = keyed();
        let request = super::raw::add_request(1).bytes();
        let hello = hello(target.group_name(), &control(None)).bytes();
        let noise = [0xa5; 64].to_vec();
        let long = Frame::new(PROOF).patched(super::raw::AT_META_LEN, &2048_u32.to_le_bytes());
        let short = proof(vec![0; 31]);
        for (bytes, why) in [
            (request, "Request frame where a proof of the job key is expected"),
            (hello, "Hello frame where a proof of the job key is expected"),
            (noise, "not a farcall frame: magic 0xa5a5a5a5"),
            (long, "2048 proof bytes exceed the limit of 1024"),
            (short, "malformed proof: 31 bytes"),
        ] {
            step(why);
            let (mut peer, ..) = challenged(&target);
            peer.send(&bytes);
            assert_says(&peer.close_text(), why);
            target.serves_others();
        }
        target.shutdown();
    });
}

#[test]
fn a_proof_that_stalls_or_trickles_is_refused_in_time() {
    bounded(|| {
        let target = keyed();
        let (mut silent, ..) = challenged(&target);
        let (mut slow, hello, challenge) = challenged(&target);
        let right = target.job_key().expect("a keyed group");
        let bytes = proof(transcript(right, &hello, &challenge).proof("proof"));
        let took = timed(|| {
            let mut bytes = bytes.chunks(1);
            while slow.peek(Duration::from_millis(100)).is_none() {
                slow.send(bytes.next().expect("the refusal comes before the proof's end"));
            }
            for peer in [&mut silent, &mut slow] {
                assert_says(&peer.close_text(), "no complete proof of the job key within ");
            }
        });
        assert!(took < Duration::from_secs(9), "{took:?}");
        target.serves_others();
        target.shutdown();
    });
}

/// More silent connections than may be in their greeting: the oldest of them go, who can prove the key gets in at once.
#[test]
fn a_flood_of_half_open_connections_locks_nobody_out() {
    bounded(|| {
        let target = keyed();
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(4096);
        let max = (descriptors / 4).min(1024) as usize;
        let mut flood: Vec<RawPeer> = (0..max).map(|_| target.stranger()).collect();
        let mut displaced = 0;
        for round in 0..8 {
            step(format_args!("round {round} of the flood"));
            for peer in &mut flood[round * 20..(round + 1) * 20] {
                let newer = target.stranger();
                // On a slow machine its time may be over before its turn comes.
                displaced += usize::from(peer.close_text().contains("this one was the oldest"));
                *peer = newer;
            }
            let took = timed(|| target.serves_others());
            assert!(took < Duration::from_millis(1500), "not only once the flood's time is over: {took:?}");
        }
        assert!(displaced > 0);
        println!("{displaced} of a flood displaced, {max} in their greeting");
        target.shutdown();
    });
}

// ---- Unix sockets ----

/// A stranger's connection to a worker's Unix socket.
pub(super) fn by_unix(target: &Target) -> std::io::Result<UnixStream> {
    let local = target.agent().workers().next().and_then(|worker| worker.local.clone()).expect("a Unix socket");
    let stream = UnixStream::connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(&*local.name)?)?;
    stream.set_read_timeout(Some(Duration::from_secs(15)))?;
    Ok(stream)
}

/// All that a worker says on a Unix socket.
fn last_words(stream: &mut UnixStream) -> Vec<u8> {
    let mut frames = Vec::new();
    // Reset or ended: what came before counts.
    let _ = stream.read_to_end(&mut frames);
    frames
}

/// To be the same user is no proof of the key.
#[test]
fn a_unix_socket_asks_for_the_key_too() {
    bounded(|| {
        let target = Target::with_options(Some(key()), |options| options.transport = Transport::Auto);
        let mut stream = by_unix(&target).expect("connects");
        stream.write_all(&hello(target.group_name(), &control(Some("w0"))).bytes()).expect("w0 reads");
        assert_told(&last_words(&mut stream), KEY_WANTED);
        target.serves_others();
        target.shutdown();
    });
}

#[test]
fn a_process_of_another_user_is_refused_by_a_unix_socket() {
    bounded(|| {
        for key in [None, Some(key())] {
            let target = Target::with_options(key, |options| options.transport = Transport::Auto);
            let foreign = std::thread::scope(|scope| {
                let dialing = scope.spawn(|| {
                    // For the kernel a thread's credentials are its own.
                    let nobody = rustix::process::Uid::from_raw(65534);
                    let changed = rustix::thread::set_thread_res_uid(None, nobody, None);
                    changed.ok().map(|()| by_unix(&target).expect("connects"))
                });
                dialing.join().expect("no panic")
            });
            let Some(mut foreign) = foreign else {
                println!("skipped: 1 check that needs root");
                return target.shutdown();
            };
            // It is told without having said a word.
            assert_told(&last_words(&mut foreign), OTHER_USER);
            target.serves_others();
            target.shutdown();
        }
    });
}

// ---- what a dialer makes of an acceptor ----

/// A group of two, and a socket at w1's address in its place.
fn impostor(key: Option<JobKey>) -> (Group, TcpListener) {
    let group = Group::with_key(2, key, |_| {});
    let address = group.address(1);
    group.agents[1].abort();
    let listener = TcpListener::bind(address).expect("w1 has left its port");
    (group, listener)
}

fn read_frame(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 64];
    stream.read_exact(&mut head).expect("a frame");
    let len = u32::from_le_bytes(head[20..24].try_into().expect("four bytes"));
    let mut metadata = vec![0; len as usize];
    stream.read_exact(&mut metadata).expect("its metadata");
    (head[5], metadata)
}

/// Calls w1, where `answer` answers the hello; gives the cause of the failure, and the frames that came after the answer.
fn dialed(key: Option<JobKey>, answer: impl Fn(&[u8]) -> Vec<u8> + Sync) -> (CloseCause, Vec<u8>) {
    let (group, listener) = impostor(key);
    let (error, frames) = std::thread::scope(|scope| {
        let seen = scope.spawn(|| {
            let (mut stream, _) = listener.accept().expect("w0 dials");
            stream.set_read_timeout(Some(Duration::from_secs(15))).expect("a socket option");
            let (_, hello) = read_frame(&mut stream);
            stream.write_all(&answer(&hello)).expect("w0 reads");
            let mut rest = Vec::new();
            // Reset or ended: what came before counts.
            let _ = stream.read_to_end(&mut rest);
            rest
        });
        let error = group.agents[0].to("w1").call(add, (2, 3)).wait().expect_err("an impostor");
        group.agents[0].abort();
        (error, seen.join().expect("no panic"))
    });
    let CallError::PeerLost { cause, .. } = error else { panic!("{error}") };
    ((*cause).clone(), frames)
}

fn assert_told(frames: &[u8], reason: u128) {
    assert_eq!(frames.get(5), Some(&CLOSE), "one frame, a Close: {frames:?}");
    assert_eq!((frames[64], frames.len()), (reason as u8, 66), "its reason, and no text");
}

fn challenge_by(key: &JobKey, hello: &[u8]) -> Frame {
    let nonce = [9; 32];
    let proof = Transcript::worker(key).with(hello).with(&nonce).proof("challenge");
    Frame { metadata: [&nonce[..], &proof].concat(), ..Frame::new(CHALLENGE) }
}

/// Whoever sits at a worker's address without the key gets no byte of a call, and cannot talk its dialer out of the proof.
#[test]
fn a_dialer_with_a_key_trusts_no_one_without() {
    bounded(|| {
        let w1 = || "w1".to_owned();
        step("a welcome without a proof");
        let welcome = Frame { metadata: vec![0; 40], ..Frame::new(WELCOME) }.bytes();
        let (cause, frames) = dialed(Some(key()), move |_| welcome.clone());
        assert!(matches!(&cause, CloseCause::Auth(AuthError::NoKey { peer }) if *peer == w1()), "{cause:?}");
        assert_says(&cause.to_string(), "w1 has no job key, this worker has one; set FARCALL_KEY or FARCALL_KEY_FILE");
        assert_told(&frames, KEY_WANTED);

        step("a refusal that says there is no key");
        let (cause, _) = dialed(Some(key()), |_| Frame { metadata: vec![3, 0], ..Frame::new(CLOSE) }.bytes());
        assert!(matches!(&cause, CloseCause::Auth(AuthError::NoKey { .. })), "{cause:?}");

        step("another key");
        let (cause, frames) = dialed(Some(key()), |hello| challenge_by(&key(), hello).bytes());
        assert!(matches!(&cause, CloseCause::Auth(AuthError::WrongKey { .. })), "{cause:?}");
        assert_says(&cause.to_string(), "w1 and this worker have different job keys");
        assert_told(&frames, WRONG_KEY);

        step("a challenge recorded from another connection");
        let shared = key();
        let recorded = challenge_by(&shared, b"the hello of another connection").bytes();
        let (cause, frames) = dialed(Some(shared.clone()), move |_| recorded.clone());
        assert!(matches!(&cause, CloseCause::Auth(AuthError::WrongKey { .. })), "{cause:?}");
        assert_told(&frames, WRONG_KEY);

        step("the right key");
        let right = shared.clone();
        let (cause, frames) = dialed(Some(shared.clone()), move |hello| {
            let welcome = Frame { metadata: vec![0; 72], ..Frame::new(WELCOME) };
            [challenge_by(&right, hello).bytes(), welcome.bytes()].concat()
        });
        // It has proven itself to the acceptor by then, and still takes no welcome that is not proven.
        assert!(matches!(&cause, CloseCause::Auth(AuthError::WrongKey { .. })), "{cause:?}");
        assert_eq!(frames[5], PROOF);
        assert_told(&frames[96..], WRONG_KEY);
    });
}

#[test]
fn a_dialer_without_a_key_is_told_to_set_one() {
    bounded(|| {
        for answer in [Frame { metadata: vec![2, 0], ..Frame::new(CLOSE) }, challenge_by(&key(), b"")] {
            let (cause, _) = dialed(None, move |_| answer.bytes());
            assert!(matches!(&cause, CloseCause::Auth(AuthError::KeyWanted { .. })), "{cause:?}");
            let text = "w1 asks for a job key; set FARCALL_KEY or FARCALL_KEY_FILE as the launcher does";
            assert_eq!(cause.to_string(), text);
        }
    });
}

/// Before its welcome an acceptor is a stranger, too: it cannot make its dialer take memory.
#[test]
fn an_acceptor_announces_no_memory_before_its_welcome() {
    bounded(|| {
        for key in [None, Some(key())] {
            let big = echo_request(1, &Descriptor::bulk(1, 8 << 30), &[]).bytes();
            let (cause, _) = dialed(key, move |_| big.clone());
            assert_says(&cause.to_string(), "1 tensors exceed the limit of 0");
        }
    });
}

// ---- groups ----

fn join(store: &str, group: &str, rank: u32, key: Option<JobKey>) -> Result<Agent, JoinError> {
    let mut options = Options::new(rank, 1, store);
    (options.host_store, options.key, options.group) = (false, key, group.to_owned());
    options.join_timeout = Duration::from_secs(10);
    Agent::join_blocking(options)
}

/// The store asks first, so that a worker with another key, or without one, is told when it joins.
#[test]
fn a_worker_joins_with_the_stores_key_only() {
    bounded(|| {
        let right = key();
        let keyed =
            StoreServer::bind_with("127.0.0.1:0", StoreLimits::default(), Some(right.clone())).expect("a store");
        let open = StoreServer::bind("127.0.0.1:0").expect("a store");
        let (keyed_at, open_at) = (keyed.address().to_string(), open.address().to_string());
        let without = join(&keyed_at, "a", 0, None).expect_err("no key");
        assert_says(
            &without.to_string(),
            "asks for a job key; set FARCALL_KEY or FARCALL_KEY_FILE as the launcher does",
        );
        let other = join(&keyed_at, "a", 0, Some(key())).expect_err("another key");
        assert!(matches!(&other, JoinError::Store(StoreError::Unproven { .. })), "{other}");
        assert_says(&other.to_string(), "different job keys");
        let nowhere = join(&open_at, "a", 0, Some(key())).expect_err("a store without a key");
        assert_says(&nowhere.to_string(), "it has no job key, this worker has one");
        join(&keyed_at, "b", 0, Some(right)).expect("the right key").shutdown_blocking().expect("leaves");
        join(&open_at, "b", 0, None).expect("neither has one").shutdown_blocking().expect("leaves");
    });
}

/// With a key a worker may listen on all addresses; the others are told the one they reach it by. Here that is loopback: the
/// test does not depend on the machine's network.
#[test]
fn a_group_with_a_key_may_listen_beyond_loopback() {
    bounded(|| {
        let group = Group::with_key(2, Some(key()), |options| {
            options.bind = Some("0.0.0.0:0".parse().expect("an address"));
            options.transport = Transport::Tcp;
        });
        assert!(group.agents[0].workers().all(|worker| worker.address.ip().to_string() == "127.0.0.1"));
        group.answers();
        let other: SocketAddr = ([127, 0, 0, 2], group.address(0).port()).into();
        let mut peer = RawPeer::connect(other);
        peer.greet(&group.name, "w0", 0, group.key.as_ref());
        peer.announce();
        peer.adds(1);
        group.shutdown();
    });
}
