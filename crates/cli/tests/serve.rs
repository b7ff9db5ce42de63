//! `farcall bench serve` and `farcall bench HOST:PORT`: two processes that only an address connects.

use std::net::{IpAddr, UdpSocket};
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;

use crate::program::{Run, eventually, lives, start};

const CLIENT: [&str; 8] = ["--op", "call,echo", "-b", "64K", "-e", "64K", "-n", "8"];
const LONG: [&str; 4] = ["--op", "call", "-n", "1000000000"];

/// A server, and the arguments that it tells clients to use.
struct Server {
    run: Run,
    target: String,
}

impl Server {
    fn start(arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let run = start(&[&["bench", "serve"], arguments].concat(), variables);
        let mut target = None;
        eventually("the server prints the command for clients", Duration::from_secs(20), || {
            let text = run.stdout();
            let line = text.lines().find(|line| line.starts_with("  ") && line.contains("farcall bench "));
            target = line.and_then(|line| line.split_whitespace().last()).map(str::to_owned);
            target.is_some()
        });
        Self { run, target: target.expect("printed") }
    }

    fn client(&self, arguments: &[&str], variables: &[(&str, &str)]) -> Run {
        start(&[&["bench", &self.target], arguments].concat(), variables)
    }
}

fn assert_measured(client: Run) {
    let ended = client.end();
    assert_eq!(ended.code(), 0, "{ended:?}");
    let rows: Vec<&str> = ended.stdout.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(rows.len(), 2, "{ended:?}");
}

#[test]
fn clients_are_served_one_after_the_other_and_an_interrupt_ends_the_server() {
    let server = Server::start(&[], &[]);
    // Both at once: the second waits for its turn. With repetitions each run is a session.
    let clients = [server.client(&CLIENT, &[]), server.client(&[&CLIENT[..], &["--repeat", "2"]].concat(), &[])];
    clients.into_iter().for_each(assert_measured);
    server.run.signal(Signal::INT);
    let ended = server.run.end();
    assert_eq!((ended.code(), ended.stdout.matches(": done").count()), (130, 3), "{ended:?}");
}

/// S1
#[test]
fn a_client_that_is_killed_does_not_keep_the_next_one_waiting() {
    let server = Server::start(&[], &[]);
    let first = server.client(&LONG, &[]);
    let mut children = Vec::new();
    eventually("the session runs", Duration::from_secs(20), || {
        children = first.children();
        !children.is_empty() && !server.run.children().is_empty()
    });
    first.signal(Signal::KILL);
    eventually("its worker ends", Duration::from_secs(20), || !children.iter().any(|pid| lives(*pid)));
    assert_measured(server.client(&CLIENT, &[]));
    server.run.signal(Signal::TERM);
    let ended = server.run.end();
    assert_eq!(ended.code(), 143, "{ended:?}");
}

#[test]
fn a_server_that_is_interrupted_fails_its_client_in_time() {
    let server = Server::start(&[], &[]);
    let client = server.client(&LONG, &[]);
    eventually("the session runs", Duration::from_secs(20), || !server.run.children().is_empty());
    server.run.signal(Signal::INT);
    assert_eq!(server.run.end().code(), 130);
    let ended = client.end();
    assert_eq!(ended.code(), 1, "{ended:?}");
}

/// An address of this machine beyond loopback; asking for a route sends nothing.
fn address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback())
}

/// S2
#[test]
fn beyond_loopback_a_key_is_made_and_needed() {
    let Some(address) = address() else {
        println!("skipped: 1 check that needs a network beyond loopback");
        return;
    };
    let server = Server::start(&["--listen", &format!("{address}:0")], &[]);
    let text = server.run.stdout();
    let file = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix(&format!("{address}:")).filter(|path| path.starts_with('/')));
    let file = PathBuf::from(file.unwrap_or_else(|| panic!("no key file in {text}")));
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).expect("the key's file").permissions());
    assert_eq!(mode & 0o777, 0o600);
    let refused = server.client(&CLIENT, &[]).end();
    assert_eq!(refused.code(), 1, "{refused:?}");
    assert!(refused.stderr.contains("FARCALL_KEY"), "{refused:?}");
    assert_measured(server.client(&CLIENT, &[("FARCALL_KEY_FILE", file.to_str().expect("UTF-8"))]));
    let key = std::fs::read_to_string(&file).expect("the key");
    server.run.signal(Signal::INT);
    let ended = server.run.end();
    assert!(!ended.stdout.contains(key.trim()), "the key is shown: {}", ended.stdout);
    assert!(!file.exists());
}

#[test]
fn a_server_on_all_addresses_is_measured_by_the_one_that_the_client_uses() {
    let key = "00112233445566778899aabbccddeeff";
    let server = Server::start(&["--listen", "0.0.0.0:0"], &[("FARCALL_KEY", key)]);
    let port = server.target.rsplit(':').next().expect("a port").to_owned();
    let target = format!("127.0.0.1:{port}");
    assert_measured(start(
        &[&["bench", target.as_str(), "--transport", "tcp"], &CLIENT[..]].concat(),
        &[("FARCALL_KEY", key)],
    ));
    server.run.signal(Signal::INT);
    assert_eq!(server.run.end().code(), 130);
}

#[test]
fn a_target_where_nobody_serves_is_named() {
    let ended = start(&["bench", "127.0.0.1:1", "--op", "call"], &[]).end();
    assert_eq!(ended.code(), 1, "{ended:?}");
    assert!(ended.stderr.contains("farcall bench serve"), "{ended:?}");
}
