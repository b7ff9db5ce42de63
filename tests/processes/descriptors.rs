//! A worker process keeps no descriptor of those who were refused or left, and gives strangers little memory. Counted in a
//! process of its own, where no other test opens any.

use std::collections::VecDeque;
use std::time::Duration;

use farcall::JobKey;

use crate::functions::add;
use crate::harness::{bounded, eventually, step};
use crate::hostile::raw::{
    CHUNK, Descriptor, Frame, HELLO, REPLY, RawPeer, bulk_role, chunk, control, echo_request, hello, with_nonce,
};

use super::spawn::{Process, Processes};

/// The number of open descriptors once it is the same twice, longer apart than a closed connection lingers.
fn settled(worker: &Process) -> usize {
    step("the end of the first connections");
    let mut last = worker.descriptors();
    eventually("the number of descriptors settles", Duration::from_secs(10), || {
        std::thread::sleep(Duration::from_millis(700));
        std::mem::replace(&mut last, worker.descriptors()) == last
    });
    last
}

/// One bulk connection an endpoint: the second by the same key is dropped, the first goes on; then all of it is gone.
#[test]
fn second_bulk_connections_of_one_key_are_dropped_and_leave_no_descriptor_open() {
    bounded(|| {
        let (processes, agent) = Processes::serving_with_key(1, None);
        let address = agent.workers().nth(1).expect("w1").address;
        assert_eq!(agent.to("w1").call(add, (2, 3)).wait().expect("w1 answers"), 5);
        let mut before = None;
        for _ in 0..20 {
            let mut peer = RawPeer::connect(address);
            let key = peer.greet(&processes.group, "w1", 1, None);
            peer.announce();
            let mut bulk = RawPeer::connect(address);
            bulk.send(&hello(&processes.group, &bulk_role(key)).bytes());
            for transfer in 1..3 {
                bulk.send(&chunk(transfer, 0, &[1; 70_000]).bytes());
                peer.send(&echo_request(transfer, &Descriptor::bulk(transfer, 70_000), &[]).bytes());
                assert_eq!(bulk.expect(CHUNK).payload.len(), 70_000);
                assert_eq!(peer.expect(REPLY).call, transfer);
                let mut second = RawPeer::connect(address);
                second.send(&hello(&processes.group, &bulk_role(key)).bytes());
                assert_eq!(second.receive(), None);
            }
            drop((peer, bulk));
            // The first round opens what is kept, such as memory.
            before.get_or_insert_with(|| settled(processes.worker(1)));
        }
        eventually("the worker has closed all that its peers have left", Duration::from_secs(10), || {
            Some(processes.worker(1).descriptors()) == before
        });
        processes.shutdown(&agent);
    });
}

#[test]
fn a_hundred_hostile_connections_leave_no_descriptor_open() {
    bounded(|| {
        let (processes, agent) = Processes::serving_with_key(1, None);
        let address = agent.workers().nth(1).expect("w1").address;
        let healthy = || assert_eq!(agent.to("w1").call(add, (2, 3)).wait().expect("w1 answers"), 5);
        healthy();
        let welcome = || {
            let mut peer = RawPeer::connect(address);
            let key = peer.greet(&processes.group, "w1", 1, None);
            peer.announce();
            (peer, key)
        };
        // One connection of each kind first: what is opened once and kept does not count.
        let attack = |round: usize| {
            let mut stranger = RawPeer::connect(address);
            match round % 8 {
                0 => drop(stranger),
                1 => stranger.send(&[0; 64]),
                2 => stranger.send(&hello("other", &control(None)).bytes()),
                3 => stranger.send(&hello(&processes.group, &control(None)).bytes()[..40]),
                4 => stranger.send(&hello(&processes.group, &bulk_role(1)).bytes()),
                5 => welcome().0.send(&[0xff; 64]),
                6 => {
                    let (mut peer, key) = welcome();
                    stranger.send(&hello(&processes.group, &bulk_role(key)).bytes());
                    peer.send(&echo_request(1, &Descriptor::bulk(1, 100_000), &[]).bytes());
                    stranger.send(&chunk(1, 0, &[1; 50_000]).bytes());
                    peer.adds(2);
                }
                _ => {
                    let (mut peer, key) = welcome();
                    let mut again = RawPeer::connect(address);
                    stranger.send(&hello(&processes.group, &bulk_role(key)).bytes());
                    again.send(&hello(&processes.group, &bulk_role(key)).bytes());
                    peer.adds(2);
                }
            }
        };
        (0..7).for_each(attack);
        let worker = processes.worker(1);
        let before = settled(worker);
        for round in 0..100 {
            step(format_args!("hostile connection {round}"));
            attack(round);
            healthy();
        }
        step("the hostile connections' end");
        eventually("as many descriptors as before", Duration::from_secs(15), || worker.descriptors() == before);
        healthy();
        processes.shutdown(&agent);
    });
}

/// Thousands of strangers, each with as much of a hello as it may send, or garbage, or a proof that does not come.
#[test]
fn a_flood_of_strangers_costs_little_memory_and_disturbs_nobody() {
    const GROWTH_MAX: u64 = 64 << 20;
    bounded(|| {
        let (processes, agent) = Processes::serving_with_key(1, JobKey::random().ok());
        let address = agent.workers().nth(1).expect("w1").address;
        let healthy = || assert_eq!(agent.to("w1").call(add, (2, 3)).wait().expect("w1 answers"), 5);
        healthy();
        let worker = processes.worker(1);
        let before = worker.resident_bytes();
        let long = Frame { metadata: vec![b'a'; 16 << 10], ..Frame::new(HELLO) }.bytes();
        let honest = with_nonce(&hello(&processes.group, &control(None)), [1; 32]).bytes();
        let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(4096);
        let open_max = (descriptors / 2).min(1500) as usize;
        let (mut held, mut grown) = (VecDeque::new(), 0);
        for round in 0..4000 {
            step(format_args!("stranger {round}"));
            let mut stranger = RawPeer::connect(address);
            match round % 4 {
                0 | 1 => drop(stranger.try_send(&long[..long.len() - 1])),
                2 => drop(stranger.try_send(&honest)),
                _ => drop(stranger.try_send(&[0x5a; 4096])),
            }
            held.push_back(stranger);
            if held.len() > open_max {
                held.pop_front();
            }
            if round % 100 == 0 {
                healthy();
                grown = grown.max(worker.resident_bytes().saturating_sub(before));
            }
        }
        println!("4000 strangers, {} at a time: {} KiB more", held.len(), grown >> 10);
        assert!(grown < GROWTH_MAX, "{grown} bytes");
        drop(held);
        healthy();
        processes.shutdown(&agent);
    });
}
