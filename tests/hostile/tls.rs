//! Connections with TLS: what works, and who is refused by which side with which words.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use farcall::prelude::*;
use farcall::transport::AuthError;
use farcall::{CloseCause, JobKey, Route, Tls, Transport};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::ServerName;
use rustls::pki_types::pem::PemObject;

use crate::functions::{add, arrived, hash, hold, hold_there, open, pattern};
use crate::harness::{Group, bounded, step, unique};
use crate::processes::spawn::Processes;

use super::raw::{RawPeer, assert_says, control, hello};

const BIG: usize = 3 << 20;

/// A CA, and the folder for its files.
struct Ca {
    folder: PathBuf,
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Drop for Ca {
    fn drop(&mut self) {
        // Left behind, it would hurt nobody.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Else two CAs would pass for one with a wrong signature.
        params.distinguished_name.push(DnType::CommonName, unique("a test's CA"));
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        let folder = std::env::temp_dir().join(unique("farcall-tls"));
        std::fs::create_dir_all(&folder).expect("a folder");
        Self { folder, pem, issuer: Issuer::new(params, key) }
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.join(unique(name));
        let file = std::fs::OpenOptions::new().create_new(true).write(true).mode(0o600).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).expect("a file");
        path
    }

    /// A certificate of this CA, valid until that year.
    fn certificate(&self, until: i32) -> (String, String) {
        // For the stranger that checks it; workers do not.
        let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).expect("an address");
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(until, 1, 1);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        (certificate.pem(), key.serialize_pem())
    }

    /// What a worker has: such a certificate, its key, and the CA it believes in.
    fn files(&self, until: i32, ca: &Self) -> [PathBuf; 3] {
        let (certificate, key) = self.certificate(until);
        [self.file("certificate", &certificate), self.file("key", &key), self.file("ca", &ca.pem)]
    }

    fn worker(&self, until: i32, ca: &Self) -> Tls {
        let [certificate, key, ca] = self.files(until, ca);
        Tls::from_files(&certificate, &key, &ca).expect("good files")
    }
}

/// Whether groups that do not choose are to have TLS: `TEST_TLS=1`.
pub(crate) fn is_asked_for() -> bool {
    std::env::var_os("TEST_TLS").is_some()
}

/// One certificate for all of them.
pub(crate) fn shared() -> Tls {
    static SHARED: OnceLock<Tls> = OnceLock::new();
    let make = || {
        let ca = Ca::new();
        ca.worker(2100, &ca)
    };
    SHARED.get_or_init(make).clone()
}

/// A group of two over TCP, each with its own TLS, or none.
fn group(key: Option<JobKey>, tls: [Option<Tls>; 2]) -> Group {
    Group::with_key(2, key, move |options| {
        options.transport = Transport::Tcp;
        options.tls = tls[options.rank as usize].clone();
    })
}

#[test]
fn calls_of_all_sizes_go_through_tls() {
    bounded(|| {
        let ca = Ca::new();
        for key in [None, JobKey::random().ok()] {
            let group = group(key, [0, 1].map(|_| Some(ca.worker(2100, &ca))));
            group.answers();
            for (agent, other) in [(&group.agents[0], "w1"), (&group.agents[1], "w0")] {
                for bytes in [1, 60_000, 70_000, BIG, 40 << 20] {
                    step(format_args!("{bytes} bytes by {other}"));
                    let tensor = agent.to(other).call(pattern, (bytes, 7)).wait().expect("a tensor");
                    let expected = hash::run(pattern::run(bytes, 7).expect("memory")).expect("bytes");
                    assert_eq!(agent.to(other).call(hash, (&tensor,)).wait().expect("its hash"), expected);
                }
            }
            // Both at once, from several threads.
            std::thread::scope(|scope| {
                for (agent, other) in [(&group.agents[0], "w1"), (&group.agents[1], "w0")].repeat(3) {
                    scope.spawn(move || {
                        for round in 0..300 {
                            assert_eq!(agent.to(other).call(add, (round, 1)).wait().expect("a sum"), round + 1);
                        }
                    });
                }
            });
            group.shutdown();
        }
    });
}

/// Without a key, too: who has no certificate cannot come in.
#[test]
fn with_tls_a_worker_may_listen_beyond_loopback() {
    bounded(|| {
        let ca = Ca::new();
        let tls = ca.worker(2100, &ca);
        let group = Group::with_key(2, None, move |options| {
            options.bind = Some("0.0.0.0:0".parse().expect("an address"));
            (options.transport, options.tls) = (Transport::Tcp, Some(tls.clone()));
        });
        group.answers();
        group.shutdown();
    });
}

/// What a call from w0 to w1 fails with; w1 is not hurt.
fn failure(tls: [Option<Tls>; 2]) -> CloseCause {
    let group = group(None, tls);
    let error = group.agents[0].to("w1").deadline(Duration::from_secs(15)).call(add, (2, 3)).wait();
    let Err(CallError::PeerLost { cause, .. }) = error else { panic!("{error:?}") };
    group.agents.iter().for_each(Agent::abort);
    (*cause).clone()
}

#[test]
fn a_worker_without_tls_is_told_what_to_set() {
    bounded(|| {
        let ca = Ca::new();
        let cause = failure([None, Some(ca.worker(2100, &ca))]);
        assert!(matches!(&cause, CloseCause::Auth(AuthError::TlsWanted { peer }) if peer == "w1"), "{cause:?}");
        assert_says(&cause.to_string(), "w1 asks for TLS; set FARCALL_TLS_CERT");
        let cause = failure([Some(ca.worker(2100, &ca)), None]);
        assert!(matches!(&cause, CloseCause::Auth(AuthError::NoTls { peer }) if peer == "w1"), "{cause:?}");
        assert_says(&cause.to_string(), "w1 does not use TLS, this worker does");
    });
}

#[test]
fn certificates_that_are_not_the_jobs_are_refused_by_either_side() {
    bounded(|| {
        let (ca, other) = (Ca::new(), Ca::new());
        for (what, tls, expected) in [
            ("w1 of another CA", [ca.worker(2100, &ca), other.worker(2100, &ca)], "UnknownIssuer"),
            ("w0 of another CA", [other.worker(2100, &ca), ca.worker(2100, &ca)], "UnknownCA"),
            ("w1 expired", [ca.worker(2100, &ca), ca.worker(2020, &ca)], "expired"),
            ("w0 expired", [ca.worker(2020, &ca), ca.worker(2100, &ca)], "CertificateExpired"),
        ] {
            step(what);
            let cause = failure(tls.map(Some));
            let CloseCause::Auth(AuthError::Certificate { peer, message }) = &cause else {
                panic!("{what}: {cause:?}")
            };
            assert_eq!(peer, "w1");
            assert!(message.contains(expected), "{what}: {message}");
        }
    });
}

/// For as long as a call waits for w1, w1 takes no processor time to speak of.
fn sleeps(processes: &Processes, agent: &Agent, key: &str) {
    let before = processes.worker(1).processor_time();
    let error = agent.to("w1").deadline(Duration::from_millis(1500)).call(hold, (key,)).wait();
    assert!(matches!(error, Err(CallError::Deadline { .. })), "{error:?}");
    let took = processes.worker(1).processor_time() - before;
    assert!(took < Duration::from_millis(300), "{took:?} of 1.5 s");
}

/// A session that has nothing to do takes no processor time, nor does one whose peer is dead.
#[test]
fn a_session_that_waits_sleeps() {
    bounded(|| {
        let ca = Ca::new();
        let files = ca.files(2100, &ca);
        let names = ["FARCALL_TLS_CERT", "FARCALL_TLS_KEY", "FARCALL_TLS_CA"];
        let mut variables: Vec<(&str, &str)> =
            names.into_iter().zip(files.iter().map(|file| file.to_str().expect("UTF-8"))).collect();
        variables.push(("FARCALL_TRANSPORT", "tcp"));
        let mut processes = Processes::start(&[None, Some("serve"), Some("serve")], &variables);
        let agent = processes.join(|options| {
            (options.transport, options.tls) = (Transport::Tcp, Some(ca.worker(2100, &ca)));
        });
        let key = unique("tls");
        // w1 has connections from here and to w2, with calls that wait.
        let elsewhere = agent.to("w1").call(hold_there, ("w2", &key));
        assert!(agent.to("w2").call(arrived, (&key, 1)).wait().expect("w2 lives"));
        sleeps(&processes, &agent, &key);
        processes.kill(2);
        let text = elsewhere.wait().expect("w1 lives");
        assert!(text.contains("lost w2"), "{text}");
        sleeps(&processes, &agent, &key);
        agent.to("w1").call(open, (&key,)).wait().expect("w1 lives");
        processes.shutdown(&agent);
    });
}

#[test]
fn a_worker_that_is_not_there_is_a_refused_connection() {
    bounded(|| {
        let ca = Ca::new();
        let group = group(None, [0, 1].map(|_| Some(ca.worker(2100, &ca))));
        group.agents[1].abort();
        let error = group.agents[0].to("w1").call(add, (2, 3)).wait();
        let Err(CallError::PeerLost { cause, .. }) = &error else { panic!("{error:?}") };
        assert!(matches!(&**cause, CloseCause::Connect { route: Route::Tcp(_), .. }), "{cause:?}");
        assert_says(&cause.to_string(), "Connection refused");
        group.agents[0].abort();
    });
}

/// A stranger that encrypts, but shows no certificate.
#[test]
fn a_stranger_without_a_certificate_is_refused() {
    bounded(|| {
        let ca = Ca::new();
        let group = group(None, [0, 1].map(|_| Some(ca.worker(2100, &ca))));
        group.answers();
        let mut roots = rustls::RootCertStore::empty();
        let root = rustls::pki_types::CertificateDer::from_pem_slice(ca.pem.as_bytes()).expect("PEM");
        roots.add(root).expect("a CA");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
        let name = ServerName::try_from("127.0.0.1").expect("an address");
        let mut tls = rustls::ClientConnection::new(Arc::new(config), name).expect("a client");
        let mut stream = TcpStream::connect(group.address(0)).expect("the port accepts");
        stream.set_read_timeout(Some(Duration::from_secs(15))).expect("a socket option");
        let refused = loop {
            while tls.wants_write() {
                tls.write_tls(&mut stream).expect("the worker reads");
            }
            match tls.read_tls(&mut stream) {
                Ok(0) => break "the end".to_owned(),
                Ok(_) => {}
                Err(error) => break error.to_string(),
            }
            if let Err(error) = tls.process_new_packets() {
                break error.to_string();
            }
        };
        assert!(refused.contains("CertificateRequired"), "{refused}");
        let mut text = Vec::new();
        assert_eq!(tls.reader().read_to_end(&mut text).unwrap_or(0), 0, "nothing was said to it");
        group.answers();
        group.shutdown();
    });
}

/// Garbage, silence and plain hellos at a port with TLS: the places for strangers are the same.
#[test]
fn strangers_at_a_port_with_tls_disturb_nobody() {
    bounded(|| {
        let ca = Ca::new();
        let group = group(None, [0, 1].map(|_| Some(ca.worker(2100, &ca))));
        group.answers();
        let plain = hello(&group.name, &control(Some("w0"))).bytes();
        let mut held = Vec::new();
        for round in 0..600 {
            let mut stranger = RawPeer::connect(group.address(0));
            match round % 4 {
                0 => drop(stranger.try_send(&[0x16, 3, 1, 0xff, 0xff, 1, 2, 3])),
                1 => drop(stranger.try_send(&plain)),
                2 => drop(stranger.try_send(&[0xa5; 4096])),
                _ => {}
            }
            held.push(stranger);
            if round % 50 == 0 {
                group.answers();
            }
        }
        drop(held);
        let mut told = RawPeer::connect(group.address(0));
        told.send(&plain);
        // The reason is: TLS wanted.
        assert_eq!(told.close(), (6, String::new()));
        group.answers();
        group.shutdown();
    });
}
