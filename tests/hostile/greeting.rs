//! Whoever does not say a proper hello is told why, where something can be told, and let go.

use crate::harness::bounded;

use super::raw::{
    AT_KIND, AT_VERSION, Frame, HELLO, OFFER, REQUEST, Target, WELCOME, add_request, bulk_role, control, hello,
    hello_metadata,
};

/// First bytes that are refused, with the text that says why.
fn refused(cases: impl FnOnce(&Target) -> Vec<(Vec<u8>, String)> + Send + 'static) {
    bounded(|| {
        let target = Target::new();
        for (bytes, why) in cases(&target) {
            target.refuses_first(&bytes, &why);
        }
        target.shutdown();
    });
}

#[test]
fn garbage_is_no_hello() {
    refused(|_| {
        let noise: Vec<u8> = (0..64_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let magic = u32::from_le_bytes([noise[0], noise[1], noise[2], noise[3]]);
        vec![
            (noise, format!("not a farcall frame: magic {magic:#010x}")),
            (vec![0; 64], "not a farcall frame: magic 0x00000000".to_owned()),
            (vec![0xff; 64], "not a farcall frame: magic 0xffffffff".to_owned()),
        ]
    });
}

#[test]
fn an_http_request_is_no_hello() {
    refused(|_| {
        let request =
            "GET /index.html HTTP/1.1\r\nHost: localhost:2950\r\nUser-Agent: curl/8.5.0\r\nAccept: */*\r\n\r\n";
        vec![(request.as_bytes()[..64].to_vec(), "not a farcall frame: magic 0x20544547".to_owned())]
    });
}

#[test]
fn another_magic_is_refused() {
    refused(|target| {
        let hello = hello(target.group_name(), &control(None));
        vec![(hello.patched(0, b"FCL2"), "not a farcall frame".to_owned())]
    });
}

#[test]
fn another_version_is_refused_with_both() {
    refused(|target| {
        let hello = hello(target.group_name(), &control(None));
        [0, 2, 255]
            .map(|version| {
                (hello.patched(AT_VERSION, &[version]), format!("framing version {version} where 1 is supported"))
            })
            .into()
    });
}

#[test]
fn a_hello_that_offers_no_common_version_is_refused_with_both() {
    refused(|target| {
        let good = hello(target.group_name(), &control(None));
        let offering = |oldest: u8, newest: u8| {
            let mut hello = good.clone();
            let at = hello.metadata.len() - OFFER.len();
            hello.metadata[at..at + 2].copy_from_slice(&[oldest, newest]);
            (hello.bytes(), format!("the peer speaks framing versions {oldest} to {newest}, this worker 1"))
        };
        vec![offering(0, 0), offering(2, 9), offering(255, 255), offering(9, 0)]
    });
}

/// A newer peer that still speaks this version is welcome; of its features those are used that this build has: over TCP, digests.
#[test]
fn a_hello_that_offers_newer_versions_and_features_too_is_welcome() {
    bounded(|| {
        let target = Target::new();
        let mut hello = hello(target.group_name(), &control(Some("w0")));
        hello.metadata.truncate(hello.metadata.len() - OFFER.len());
        hello.metadata.extend([1, 7, 0x83, 1, 0]);
        let mut peer = target.stranger();
        peer.send(&hello.bytes());
        assert!(peer.expect(WELCOME).metadata.ends_with(&[1, 2]));
        peer.announce();
        peer.adds(1);
        target.shutdown();
    });
}

#[test]
fn an_unknown_kind_is_refused() {
    refused(|target| {
        let hello = hello(target.group_name(), &control(None));
        [0, 17, 19, 255].map(|kind| (hello.patched(AT_KIND, &[kind]), format!("unknown frame kind {kind}"))).into()
    });
}

#[test]
fn any_other_frame_before_the_hello_is_refused() {
    refused(|target| {
        let names = ["Welcome", "Function", "Request", "Reply", "Error", "Cancel", "Close", "OpenBulk", "Chunk"];
        let hello = hello(target.group_name(), &control(None));
        let kinds = [2_u8, 3, 4, 5, 6, 7, 8, 9, 10];
        let mut cases: Vec<_> = kinds
            .iter()
            .zip(names)
            .map(|(kind, name)| (hello.patched(AT_KIND, &[*kind]), format!("{name} frame where a hello is expected")))
            .collect();
        cases.push((add_request(1).bytes(), "Request frame where a hello is expected".to_owned()));
        cases
    });
}

#[test]
fn a_peer_of_another_group_is_refused_with_both_names() {
    refused(|target| {
        let why = format!("the peer belongs to group \"other\", this worker to {:?}", target.group_name());
        vec![(hello("other", &control(Some("w0"))).bytes(), why)]
    });
}

#[test]
fn a_peer_that_dialed_another_worker_is_refused_with_both_names() {
    refused(|target| {
        let hello = hello(target.group_name(), &control(Some("w9")));
        vec![(hello.bytes(), "worker w0 answered where w9 was dialed".to_owned())]
    });
}

/// A process that was replaced is let in no more, so that none of its frames is taken for its successor's.
#[test]
fn an_earlier_life_of_a_worker_is_refused() {
    refused(|target| {
        let mut metadata = hello_metadata(target.group_name(), "w0", 0, &control(None));
        // The process id, the life, and no Unix socket.
        let life = metadata.windows(3).position(|bytes| bytes == [77, 1, 0]).expect("a worker") + 1;
        metadata[life] = 0;
        let hello = Frame { metadata, ..Frame::new(HELLO) };
        vec![(hello.bytes(), "w0 was started again: this is its life 0, and life 1 has joined".to_owned())]
    });
}

#[test]
fn a_hello_that_does_not_decode_is_refused() {
    refused(|target| {
        let good = hello(target.group_name(), &control(None));
        let with = |metadata: Vec<u8>| Frame { metadata, ..good.clone() }.bytes();
        let cases = [
            Vec::new(),
            good.metadata[..good.metadata.len() - 1].to_vec(),
            vec![0xff; 40],
            // A group whose length is 2^63, one that is no UTF-8, a role and an address kind that do not exist.
            [&[0x80; 9][..], &[1]].concat(),
            vec![2, 0xc3, 0x28, 0, 0],
            [&good.metadata[..good.metadata.len() - 2 - OFFER.len()], &[9, 0], &OFFER].concat(),
        ];
        cases.map(|metadata| (with(metadata), "malformed hello".to_owned())).into()
    });
}

#[test]
fn a_hello_longer_than_any_is_refused_before_it_is_read() {
    refused(|target| {
        let hello = hello(target.group_name(), &control(None));
        let long = 16 * 1024 + 1_u32;
        // Only the header is sent.
        vec![
            (
                hello.patched(20, &long.to_le_bytes())[..64].to_vec(),
                format!("{long} hello bytes exceed the limit of 16384"),
            ),
            (hello.patched(20, &u32::MAX.to_le_bytes())[..64].to_vec(), "metadata bytes exceed the limit".to_owned()),
        ]
    });
}

#[test]
fn a_hello_with_tensors_or_payload_is_refused() {
    refused(|target| {
        let hello = hello(target.group_name(), &control(None));
        let tensors = "the frame ends inside its tensor descriptors".to_owned();
        let payload = "Hello frame where a hello is expected".to_owned();
        vec![(hello.patched(28, &[1, 0]), tensors), (hello.patched(32, &[1, 0]), payload)]
    });
}

#[test]
fn a_bulk_connection_with_an_unknown_key_is_refused() {
    refused(|target| {
        let why = "bulk connection with an unknown key";
        [0, 1, u128::MAX].map(|key| (hello(target.group_name(), &bulk_role(key)).bytes(), why.to_owned())).into()
    });
}

#[test]
fn a_bulk_key_ends_with_its_endpoint() {
    bounded(|| {
        let target = Target::new();
        let (mut peer, key) = target.peer_with_key();
        peer.send(&[0; 64]);
        peer.close_text();
        let hello = hello(target.group_name(), &bulk_role(key));
        target.refuses_first(&hello.bytes(), "bulk connection with an unknown key");
        target.shutdown();
    });
}

#[test]
fn a_second_hello_is_refused() {
    bounded(|| {
        let target = Target::new();
        let hello = hello(target.group_name(), &control(Some("w0")));
        assert_eq!(hello.kind, HELLO);
        target.refuses(&hello.bytes(), "Hello frame where a frame of an open endpoint is expected");
        target.shutdown();
    });
}

/// Whoever claims a worker's name gets what it asks for, but not that worker's calls.
#[test]
fn a_peer_with_a_workers_name_does_not_take_its_calls() {
    bounded(|| {
        let target = Target::new();
        let mut impostor = target.stranger();
        let metadata = super::raw::hello_metadata(target.group_name(), "w1", 1, &control(Some("w0")));
        impostor.send(&Frame { metadata, ..Frame::new(HELLO) }.bytes());
        impostor.expect(WELCOME);
        let caller = target.agent().to("w1").call(crate::functions::caller, ()).wait();
        assert_eq!(caller.expect("the true w1 answers").0, "w0");
        assert_eq!(impostor.peek(std::time::Duration::from_millis(50)), None, "nothing was sent to the impostor");
        impostor.send(&Frame { kind: REQUEST, ..add_request(1) }.patched(16, &9_u32.to_le_bytes()));
        assert!(impostor.close_text().contains("not announced"));
        target.serves_others();
        target.shutdown();
    });
}
