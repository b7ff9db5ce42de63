//! The store over real sockets on loopback: what its users rely on, then what strangers try.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::thread;

use super::wire::{self, GREETING, Reply, Request};
use super::*;
use crate::JobKey;
use crate::auth::{Dialer, Realm};

const LONG: Duration = Duration::from_secs(30);

fn soon() -> Instant {
    Instant::now() + LONG
}

/// An address where nobody listens, and what keeps it so for other processes and tests.
fn quiet_address() -> (socket2::Socket, String) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_reuse_address(true).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap().to_string();
    (socket, address)
}

fn server() -> StoreServer {
    StoreServer::bind("127.0.0.1:0").unwrap()
}

fn client(server: &StoreServer, identity: &str) -> EmbeddedStore {
    EmbeddedStore::connect(&server.address().to_string(), identity, soon()).unwrap()
}

/// A client that is not ours.
fn stranger(server: &StoreServer) -> TcpStream {
    let stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream
}

/// A client's hello, framed.
fn hello(identity: &str, nonce: Option<[u8; 32]>) -> Vec<u8> {
    wire::frame(&wire::Hello { identity, nonce }).unwrap()
}

/// A stranger that greeted properly and was let in.
fn greeted(server: &StoreServer, identity: &str) -> TcpStream {
    let mut stream = stranger(server);
    stream.write_all(&[&GREETING[..], &hello(identity, None)].concat()).unwrap();
    assert_eq!(wire::read_array(&stream, soon()).unwrap(), GREETING);
    assert_eq!(wire::read_frame(&stream, soon()).unwrap(), wire::DONE_FRAME[4..]);
    stream
}

/// What the server says next, which must be a refusal and its last word.
fn last_word(mut stream: TcpStream) -> Refusal {
    let answer = wire::read_frame(&stream, soon()).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the server closes after it");
    match wire::decode(&answer) {
        Some(Reply::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// The same for a stranger that was not let in.
fn refused_greeting(stream: TcpStream) -> Refusal {
    assert_eq!(wire::read_array(&stream, soon()).unwrap(), GREETING);
    last_word(stream)
}

fn refusal<T: std::fmt::Debug>(result: Result<T, StoreError>) -> Refusal {
    match result {
        Err(StoreError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

/// Returns once `server` has that many unanswered waits.
fn until_waiting(server: &StoreServer, waits: usize) {
    let deadline = soon();
    while server.waiting() != waits {
        assert!(Instant::now() < deadline, "{} waits instead of {waits}", server.waiting());
        thread::yield_now();
    }
}

/// A server that still does its work for the others.
fn assert_serves(server: &StoreServer) {
    let store = client(server, "witness");
    store.set("alive", b"yes").unwrap();
    assert_eq!(store.get("alive").unwrap().as_deref(), Some(&b"yes"[..]));
    store.close().unwrap();
}

#[test]
fn what_one_worker_sets_the_others_get() {
    let server = server();
    let (a, b) = (client(&server, "a"), client(&server, "b"));
    assert_eq!(b.get("k").unwrap(), None);
    a.set("k", b"one").unwrap();
    a.set("k", b"two").unwrap();
    assert_eq!(b.get("k").unwrap().as_deref(), Some(&b"two"[..]));
    assert_eq!(a.add("n", 2).unwrap(), 2);
    assert_eq!(b.add("n", -5).unwrap(), -3);
    assert_eq!(a.wait(&["n", "k", "n"], soon()).unwrap(), [&b"-3"[..], b"two", b"-3"]);
    assert_eq!(a.wait(&[], soon()).unwrap(), Vec::<Vec<u8>>::new());
    a.wait_each(&[], soon()).unwrap();
}

#[test]
fn threads_share_a_client() {
    let server = server();
    let store = client(&server, "a");
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..50).for_each(|_| assert!(store.add("n", 1).unwrap() > 0)));
        }
    });
    assert_eq!(store.get("n").unwrap().as_deref(), Some(&b"200"[..]));
}

#[test]
fn a_set_wakes_the_wait_that_it_completes() {
    let server = server();
    let setter = client(&server, "setter");
    thread::scope(|scope| {
        let waits = [vec!["x", "y"], vec!["y"], vec!["x", "z"]].map(|keys| {
            let store = client(&server, &format!("waits for {keys:?}"));
            scope.spawn(move || store.wait(&keys, soon()).unwrap())
        });
        until_waiting(&server, 3);
        setter.set("y", b"1").unwrap();
        until_waiting(&server, 2);
        setter.set("x", b"2").unwrap();
        until_waiting(&server, 1);
        setter.add("z", 3).unwrap();
        let values = waits.map(|wait| wait.join().unwrap());
        assert_eq!(
            values,
            [vec![b"2".to_vec(), b"1".to_vec()], vec![b"1".to_vec()], vec![b"2".to_vec(), b"3".to_vec()]]
        );
    });
}

/// More bytes than a frame holds come in several, in order.
#[test]
fn a_wait_returns_more_values_than_fit_in_one_answer() {
    let server = server();
    let store = client(&server, "a");
    let keys: Vec<String> = (0..9).map(|index| format!("k{index}")).collect();
    for (key, fill) in keys.iter().zip(0u8..) {
        store.set(key, &vec![fill; 1 << 20]).unwrap();
    }
    let values = store.wait(&keys.iter().map(String::as_str).collect::<Vec<_>>(), soon()).unwrap();
    for (value, fill) in values.iter().zip(0u8..) {
        assert!(value.len() == 1 << 20 && value.iter().all(|byte| *byte == fill), "value {fill}");
    }
}

#[test]
fn a_deadline_names_what_is_missing_and_the_client_lives_on() {
    let server = server();
    let store = client(&server, "a");
    store.set("here", b"").unwrap();
    let short = || Instant::now() + Duration::from_millis(20);
    let error = store.wait(&["peers/1", "here", "peers/2"], short()).unwrap_err();
    assert!(matches!(&error, StoreError::Missing { missing, .. } if *missing == ["peers/1", "peers/2"]), "{error:?}");
    assert!(error.to_string().ends_with("still misses peers/1, peers/2"), "{error}");

    let error = store.wait_each(&[&["done/0", "here"], &["done/1", "gone/1"]], short()).unwrap_err();
    assert!(matches!(&error, StoreError::Missing { missing, .. } if *missing == ["done/1 or gone/1"]), "{error:?}");
    assert!(
        matches!(store.wait(&["late"], Instant::now()), Err(StoreError::Missing { .. })),
        "a past deadline checks once"
    );
    assert_eq!(store.wait(&["here"], Instant::now()).unwrap(), [b""]);
    assert_eq!(server.waiting(), 0);
}

#[test]
fn many_missing_names_are_counted() {
    let missing: Vec<String> = (0..100).map(|rank| format!("r{rank}")).collect();
    assert_eq!(Listed(&missing).to_string(), "r0, r1, r2, r3, r4, r5, r6, r7 and 92 more");
}

/// S3, and what it is for: a barrier that a dead worker does not hold up, even one that died while it waited.
#[test]
fn a_barrier_of_done_or_gone_ends_when_a_waiting_worker_dies() {
    let server = server();
    let store = client(&server, "0");
    let mut dying = greeted(&server, "1");
    let forever = Request::Wait { groups: vec![vec!["never"]], timeout_ms: 60_000 };
    dying.write_all(&wire::frame(&forever).unwrap()).unwrap();
    let leaving = client(&server, "2");
    leaving.set("done/2", b"").unwrap();
    leaving.close().unwrap();
    thread::scope(|scope| {
        let barrier = scope.spawn(|| store.wait_each(&[&["done/1", "gone/1"], &["done/2", "gone/2"]], soon()));
        until_waiting(&server, 2);
        drop(dying);
        barrier.join().unwrap().unwrap();
    });
    assert_eq!(store.get(&gone_key("1")).unwrap().as_deref(), Some(&b""[..]));
    assert_eq!(store.get(&gone_key("2")).unwrap(), None, "it closed in good order");
}

#[test]
fn a_client_that_is_dropped_is_gone_and_one_that_is_closed_is_not() {
    let server = server();
    let witness = client(&server, "w");
    drop(client(&server, "dropped"));
    witness.wait(&["gone/dropped"], soon()).unwrap();

    let closed = client(&server, "closed");
    closed.close().unwrap();
    closed.close().unwrap();
    assert!(matches!(closed.set("k", b""), Err(StoreError::Closed { .. })));
    drop(closed);
    assert_eq!(witness.get("gone/closed").unwrap(), None);
}

#[test]
fn a_client_waits_for_a_server_that_starts_late() {
    let (_quiet, address) = quiet_address();
    let (tell, told) = mpsc::channel();
    thread::scope(|scope| {
        let early = scope.spawn({
            let address = address.clone();
            move || {
                tell.send(()).unwrap();
                EmbeddedStore::connect(&address, "early", soon()).unwrap().set("k", b"v").unwrap();
            }
        });
        told.recv().unwrap();
        let server = StoreServer::bind(&address).unwrap();
        early.join().unwrap();
        assert_serves(&server);
    });
}

#[test]
fn a_server_that_never_starts_is_named_with_what_to_do() {
    let (_quiet, address) = quiet_address();
    let error = EmbeddedStore::connect(&address, "a", Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&address) && text.contains("rank 0"), "{text}");
    let taken = server();
    let error = StoreServer::bind(&taken.address().to_string()).unwrap_err();
    assert!(matches!(error, StoreError::Bind { .. }), "{error:?}");
}

/// Dialing the own port, which looks like a store that echoes the greeting, is told apart from one.
#[test]
fn a_connection_to_itself_is_no_store() {
    let (socket, _) = quiet_address();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    assert!(client::is_itself(&socket.into(), own.as_socket().unwrap()));
}

#[test]
fn the_end_of_the_server_is_seen_by_its_clients() {
    let server = server();
    let (waits, idles) = (client(&server, "waits"), client(&server, "idles"));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| waits.wait(&["never"], soon()));
        until_waiting(&server, 1);
        drop(server);
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(error, StoreError::Lost { .. }), "{error:?}");
    });
    assert!(matches!(idles.get("k"), Err(StoreError::Lost { .. })));
    assert!(matches!(idles.get("k"), Err(StoreError::Closed { .. })));
}

/// S5: idle, waiting, stalled in a greeting, stalled in a request; with limits that alone would take minutes.
#[test]
fn a_drop_ends_all_threads_in_bounded_time() {
    let limits = StoreLimits { hello: LONG * 10, frame: LONG * 10, ..StoreLimits::default() };
    let server = StoreServer::bind_with("127.0.0.1:0", limits, None).unwrap();
    let _idle = client(&server, "idle");
    let mut waiting = greeted(&server, "waiting");
    let forever = Request::Wait { groups: vec![vec!["never"]], timeout_ms: 600_000 };
    waiting.write_all(&wire::frame(&forever).unwrap()).unwrap();
    let mut stalled = greeted(&server, "stalled");
    stalled.write_all(&[100, 0, 0, 0, 1]).unwrap();
    let mut greeting = stranger(&server);
    greeting.write_all(&GREETING[..3]).unwrap();
    until_waiting(&server, 1);
    let deadline = soon();
    while server.clients() != 4 {
        assert!(Instant::now() < deadline, "{} clients", server.clients());
        thread::yield_now();
    }
    let alive = server.alive();
    let start = Instant::now();
    drop(server);
    assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    assert_eq!(alive.strong_count(), 0, "a thread still runs");
}

#[test]
fn a_stranger_is_told_that_this_is_a_store() {
    let server = server();
    let mut http = stranger(&server);
    http.write_all(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n").unwrap();
    assert_eq!(refused_greeting(http), Refusal::Greeting);

    let mut newer = stranger(&server);
    newer.write_all(b"FCSTORE\xff and what only version 255 knows").unwrap();
    assert_eq!(refused_greeting(newer), Refusal::Greeting);
    assert_serves(&server);
}

#[test]
fn a_client_tells_other_servers_apart() {
    for (answer, of_another_version) in [(b"HTTP/1.1", false), (b"FCSTORE\xff", true)] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                stream.write_all(answer).unwrap();
                // Until the client closes: a reset must not overtake the answer.
                drop(stream.read_to_end(&mut Vec::new()));
            });
            let error = EmbeddedStore::connect(&address, "a", soon()).unwrap_err();
            assert_eq!(matches!(error, StoreError::Version { theirs: 255, .. }), of_another_version, "{error:?}");
            assert_eq!(matches!(error, StoreError::NotAStore { .. }), !of_another_version, "{error:?}");
        });
    }
}

#[test]
fn a_greeting_that_does_not_end_is_cut_off() {
    let limits = StoreLimits { hello: Duration::from_millis(250), ..StoreLimits::default() };
    let server = StoreServer::bind_with("127.0.0.1:0", limits, None).unwrap();
    for half in [&GREETING[..5], &[&GREETING[..], &[9, 0, 0, 0, b'r']].concat()] {
        let mut slow = stranger(&server);
        slow.write_all(half).unwrap();
        assert_eq!(refused_greeting(slow), Refusal::Slow { limit_ms: 250 });
    }
    assert_serves(&server);
}

/// The time is for the whole rest of a request: a byte now and then does not extend it.
#[test]
fn a_request_that_does_not_end_is_cut_off() {
    let limits = StoreLimits { frame: Duration::from_millis(250), ..StoreLimits::default() };
    let server = StoreServer::bind_with("127.0.0.1:0", limits, None).unwrap();
    let slow = greeted(&server, "slow");
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            let drips = [100, 0, 0, 0].into_iter().chain(std::iter::repeat(0));
            drips.take_while(|byte| (&slow).write_all(&[*byte]).is_ok() && start.elapsed() < LONG).for_each(|_| {
                thread::sleep(Duration::from_millis(20));
            });
        });
        assert_eq!(last_word(slow.try_clone().unwrap()), Refusal::Slow { limit_ms: 250 });
        drop(slow.shutdown(std::net::Shutdown::Both));
    });
    assert_serves(&server);
}

#[test]
fn messages_that_make_no_sense_end_the_conversation() {
    let server = server();
    let mut huge = greeted(&server, "huge");
    huge.write_all(&[u32::MAX.to_le_bytes(), [0; 4]].concat()).unwrap();
    let limit_bytes = wire::FRAME_BYTES_MAX as u64;
    assert_eq!(last_word(huge), Refusal::Message { bytes: u32::MAX.into(), limit_bytes });

    let mut identity = stranger(&server);
    identity.write_all(&[&GREETING[..], &[0xff; 4]].concat()).unwrap();
    let limit_bytes = wire::HELLO_BYTES_MAX as u64;
    assert_eq!(refused_greeting(identity), Refusal::Message { bytes: u32::MAX.into(), limit_bytes });

    for garbage in [&[0xff; 12][..], &[], &[3, 0xff, 0xff, 0xff, 0xff, 0x0f]] {
        let mut stream = greeted(&server, "garbage");
        stream.write_all(&wire::raw_frame(garbage).unwrap()).unwrap();
        assert_eq!(last_word(stream), Refusal::Malformed, "{garbage:?}");
    }

    let mut impatient = greeted(&server, "impatient");
    let forever = wire::frame(&Request::Wait { groups: vec![vec!["never"]], timeout_ms: 60_000 }).unwrap();
    impatient.write_all(&[&forever[..], &forever].concat()).unwrap();
    assert_eq!(last_word(impatient), Refusal::Pipelined);

    let witness = client(&server, "w");
    let gone = ["gone/huge", "gone/garbage", "gone/impatient"];
    witness.wait(&gone, soon()).unwrap();
    assert_eq!(server.waiting(), 0);
}

#[test]
fn what_exceeds_a_limit_is_refused_and_the_conversation_goes_on() {
    let limits = StoreLimits { total_bytes: 3 << 20, wait: Duration::from_secs(60), ..StoreLimits::default() };
    let server = StoreServer::bind_with("127.0.0.1:0", limits, None).unwrap();
    let store = client(&server, "a");
    let mib = vec![0; 1 << 20];
    assert_eq!(
        refusal(store.set("k", &vec![0; (1 << 20) + 1])),
        Refusal::Value { bytes: (1 << 20) + 1, limit_bytes: 1 << 20 }
    );
    assert!(matches!(refusal(store.set("k", &vec![0; 5 << 20])), Refusal::Message { .. }), "not even sent");
    assert_eq!(refusal(store.set(&"k".repeat(1025), b"")), Refusal::Key { bytes: 1025, limit_bytes: 1024 });
    store.set("1", &mib).unwrap();
    store.set("2", &mib).unwrap();
    assert_eq!(refusal(store.set("3", &mib)), Refusal::Full { limit_bytes: 3 << 20 });
    assert_eq!(refusal(store.add("1", 1)), Refusal::NotANumber { key: "1".into() });
    assert_eq!(refusal(store.wait_each(&[&[]], soon())), Refusal::EmptyGroup);
    let far = Instant::now() + Duration::from_secs(90);
    assert!(matches!(refusal(store.wait(&["3"], far)), Refusal::Wait { limit_ms: 60_000, .. }));
    assert_eq!(
        refusal(EmbeddedStore::connect(store.address(), &"i".repeat(1020), soon())),
        Refusal::Key { bytes: 1025, limit_bytes: 1024 }
    );
    store.set("2", b"small").unwrap();
    store.set("3", &mib).unwrap();
}

#[test]
fn one_client_too_many_is_refused_until_another_ends() {
    let limits = StoreLimits { connections: 2, ..StoreLimits::default() };
    let server = StoreServer::bind_with("127.0.0.1:0", limits, None).unwrap();
    let (first, second) = (client(&server, "1"), client(&server, "2"));
    let address = server.address().to_string();
    for _ in 0..40 {
        let third = EmbeddedStore::connect(&address, "3", soon());
        assert_eq!(refusal(third.map(drop)), Refusal::Connections { limit: 2 });
    }
    drop(second);
    first.wait(&["gone/2"], soon()).unwrap();
    // Its thread may still be on its way out.
    let deadline = soon();
    while server.clients() == 2 {
        assert!(Instant::now() < deadline);
        thread::yield_now();
    }
    assert_serves(&server);
}

fn key(byte: u8) -> JobKey {
    JobKey::new([byte; 32]).unwrap()
}

fn keyed_server(limits: StoreLimits) -> StoreServer {
    StoreServer::bind_with("127.0.0.1:0", limits, Some(key(1))).unwrap()
}

/// A stranger that said hello to a store with a key, and the challenge that it got.
fn challenged(server: &StoreServer, identity: &str) -> (TcpStream, Vec<u8>) {
    let mut stream = stranger(server);
    stream.write_all(&[&GREETING[..], &hello(identity, Some([3; 32]))].concat()).unwrap();
    assert_eq!(wire::read_array(&stream, soon()).unwrap(), GREETING);
    let challenge = wire::read_frame(&stream, soon()).unwrap();
    assert_eq!((challenge[0], challenge.len()), (wire::CHALLENGE, 65));
    (stream, challenge[1..].to_vec())
}

fn proof_of(key: &JobKey, identity: &str, challenge: &[u8]) -> Result<Vec<u8>, crate::ProtocolError> {
    let hello = hello(identity, Some([3; 32]));
    Dialer::new(key, Realm::Store, &hello[4..], String::new()).on_challenge(challenge)
}

/// PEERS: before the proof nothing is read, written or left behind.
#[test]
fn a_store_with_a_key_lets_in_who_proves_it() {
    let server = keyed_server(StoreLimits::default());
    let address = server.address().to_string();
    let connect = |key: Option<&JobKey>| EmbeddedStore::connect_with(&address, "w", key, soon());
    assert_eq!(refusal(connect(None)), Refusal::KeyWanted);
    assert!(matches!(connect(Some(&key(2))), Err(StoreError::Unproven { source: AuthError::WrongKey { .. }, .. })));
    let (mut forged, _) = challenged(&server, "forged");
    forged.write_all(&wire::raw_frame(&[0; 32]).unwrap()).unwrap();
    assert_eq!(last_word(forged), Refusal::WrongKey);
    let (mut impatient, _) = challenged(&server, "impatient");
    impatient.write_all(&wire::frame(&Request::Set { key: "stolen", value: b"1" }).unwrap()).unwrap();
    assert_eq!(last_word(impatient), Refusal::WrongKey);
    let store = connect(Some(&key(1))).unwrap();
    assert_eq!(store.get("stolen").unwrap(), None);
    assert_eq!([store.get("gone/forged").unwrap(), store.get("gone/w").unwrap()], [None, None]);
    store.set("k", b"v").unwrap();
}

/// What a client with the key sent lets nobody else in.
#[test]
fn a_replay_is_refused_by_a_store() {
    let server = keyed_server(StoreLimits::default());
    let (mut first, challenge) = challenged(&server, "a");
    let proof = wire::raw_frame(&proof_of(&key(1), "a", &challenge).unwrap()).unwrap();
    first.write_all(&proof).unwrap();
    assert_eq!(wire::read_frame(&first, soon()).unwrap(), wire::DONE_FRAME[4..]);
    let (mut replay, _) = challenged(&server, "a");
    replay.write_all(&proof).unwrap();
    assert_eq!(last_word(replay), Refusal::WrongKey);
}

#[test]
fn a_client_with_a_key_trusts_no_store_without() {
    let server = server();
    let address = server.address().to_string();
    let refused = refusal(EmbeddedStore::connect_with(&address, "w", Some(&key(1)), soon()));
    assert_eq!(refused, Refusal::NoKey);
    // One that says nothing of it and lets the client in.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&[&GREETING[..], &wire::DONE_FRAME].concat()).unwrap();
            drop(stream.read_to_end(&mut Vec::new()));
        });
        let error = EmbeddedStore::connect_with(&address, "w", Some(&key(1)), soon()).unwrap_err();
        assert!(matches!(error, StoreError::Unproven { source: AuthError::NoKey { .. }, .. }), "{error:?}");
    });
}

#[test]
fn a_proof_that_does_not_come_is_not_waited_for() {
    let server = keyed_server(StoreLimits { hello: Duration::from_millis(250), ..StoreLimits::default() });
    let (silent, _) = challenged(&server, "silent");
    assert_eq!(last_word(silent), Refusal::Slow { limit_ms: 250 });
    let (mut slow, challenge) = challenged(&server, "slow");
    let proof = wire::raw_frame(&proof_of(&key(1), "slow", &challenge).unwrap()).unwrap();
    slow.write_all(&proof[..35]).unwrap();
    assert_eq!(last_word(slow), Refusal::Slow { limit_ms: 250 });
}

/// As many strangers as may greet, silent: the oldest go, a client gets in at once.
#[test]
fn a_flood_of_half_open_connections_locks_no_client_out() {
    let limits = StoreLimits { greetings: 8, hello: LONG * 10, ..StoreLimits::default() };
    let server = keyed_server(limits);
    let address = server.address().to_string();
    let mut flood: Vec<TcpStream> = (0..8).map(|_| stranger(&server)).collect();
    for round in 0..20 {
        let index = round % 8;
        let newer = stranger(&server);
        assert_eq!(flood[index].read(&mut [0]).unwrap_or(0), 0, "the oldest is let go");
        flood[index] = newer;
        if index == 7 {
            let store = EmbeddedStore::connect_with(&address, &format!("w{round}"), Some(&key(1)), soon()).unwrap();
            store.set("k", b"v").unwrap();
            // It took the place of the oldest for the time of its greeting.
            assert_eq!(flood[0].read(&mut [0]).unwrap_or(0), 0);
            flood[0] = stranger(&server);
            flood.rotate_left(1);
        }
    }
}

/// PEERS: with a key a store may be reached from other hosts.
#[test]
fn a_store_with_a_key_may_listen_beyond_loopback() {
    let server = StoreServer::bind_with("0.0.0.0:0", StoreLimits::default(), Some(key(1))).unwrap();
    let address = format!("127.0.0.2:{}", server.address().port());
    EmbeddedStore::connect_with(&address, "w", Some(&key(1)), soon()).unwrap().set("k", b"v").unwrap();
}

/// PEERS: a store that other hosts could reach is refused, and says what to do.
#[test]
fn a_store_beyond_loopback_is_refused() {
    let refused = StoreServer::bind("0.0.0.0:0").expect_err("refused");
    assert!(matches!(&refused, StoreError::NotLoopback { address } if address.starts_with("0.0.0.0")), "{refused}");
}
