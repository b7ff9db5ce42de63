//! The proof of the job's key, by both sides of a connection, before either does anything for the other.
//!
//! Pure state: messages and nonces go in, messages and verdicts come out. Not here: sockets, deadlines, framing; and no
//! encryption, nor anything that outlives the greeting: who can change bytes on the way between two workers can take over
//! a connection that they opened. Against that there is TLS.
//!
//! ```text
//! dialer → acceptor   hello       names a fresh nonce, and all that the dialer offers and asks for
//! acceptor → dialer   challenge   32 bytes nonce, 32 bytes proof
//! dialer → acceptor   proof       32 bytes
//! acceptor → dialer   welcome     what both go on with, 32 bytes proof (not on connections that have no welcome)
//!
//! proof   HMAC-SHA256(key, realm ‖ (u32 length ‖ message)* ‖ role), lengths little-endian
//! message every message so far, in order, and of the proof's own the bytes before it; each proof is a message, too
//! ```
//! Invariant A1: a proof covers every byte of the greeting before it, so nothing of it, versions and features included,
//! can be changed or left out on the way.
//! Invariant A2: a proof counts once: it covers nonces of both sides (the first one: the verifier's own).
//! Invariant A3: a proof counts in one place: realm and role are part of it, so it cannot be sent back, or elsewhere.
//! Invariant A4: comparisons take the same time whatever they find.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::ProtocolError;
use crate::error::AuthError;
use crate::key::{JobKey, Nonce};

const PROOF_BYTES: usize = 32;

/// What a connection is for. Part of every proof (A3).
#[derive(Clone, Copy, Debug)]
pub(crate) enum Realm {
    Worker,
    Store,
}

impl Realm {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Worker => b"farcall 1 worker\0",
            Self::Store => b"farcall 1 store\0",
        }
    }
}

// Read as a length, each is more than a gigabyte: no message can be taken for the end of another input.
const CHALLENGE: &[u8] = b"challenge";
const PROOF: &[u8] = b"proof";
const WELCOME: &[u8] = b"welcome";

/// The messages so far, under the key.
struct Transcript(Hmac<Sha256>);

impl Transcript {
    fn new(key: &JobKey, realm: Realm, hello: &[u8]) -> Self {
        let Ok(mac) = Hmac::<Sha256>::new_from_slice(key.secret()) else {
            unreachable!("HMAC takes keys of any length")
        };
        let mut transcript = Self(mac);
        transcript.0.update(realm.label());
        transcript.absorb(hello);
        transcript
    }

    fn absorb(&mut self, message: &[u8]) {
        self.0.update(&(message.len() as u32).to_le_bytes());
        self.0.update(message);
    }

    /// A proof in the role of its message; what follows covers it.
    fn prove(&mut self, role: &[u8]) -> [u8; PROOF_BYTES] {
        let proof: [u8; PROOF_BYTES] = self.0.clone().chain_update(role).finalize().into_bytes().into();
        self.absorb(&proof);
        proof
    }

    fn check(&mut self, role: &[u8], proof: &[u8]) -> bool {
        let right = self.0.clone().chain_update(role).verify_slice(proof).is_ok();
        self.absorb(proof);
        right
    }
}

/// The side that sent the hello.
pub(crate) struct Dialer {
    transcript: Transcript,
    peer: String,
    /// The acceptor has proven itself.
    challenged: bool,
}

impl Dialer {
    /// After `hello`, which has a fresh nonce in it, to `peer`, a name for errors.
    pub(crate) fn new(key: &JobKey, realm: Realm, hello: &[u8], peer: String) -> Self {
        Self { transcript: Transcript::new(key, realm, hello), peer, challenged: false }
    }

    /// Checks the acceptor's challenge; gives the proof to answer with.
    pub(crate) fn on_challenge(&mut self, challenge: &[u8]) -> Result<Vec<u8>, ProtocolError> {
        let malformed =
            || ProtocolError::Malformed { what: "challenge", message: format!("{} bytes", challenge.len()) };
        if self.challenged {
            let message = "a second one".to_owned();
            return Err(ProtocolError::Malformed { what: "challenge", message });
        }
        let (nonce, proof) = challenge.split_first_chunk::<{ size_of::<Nonce>() }>().ok_or_else(malformed)?;
        if proof.len() != PROOF_BYTES {
            return Err(malformed());
        }
        self.transcript.absorb(nonce);
        if !self.transcript.check(CHALLENGE, proof) {
            return Err(self.wrong_key());
        }
        self.challenged = true;
        Ok(self.transcript.prove(PROOF).to_vec())
    }

    /// Checks a sealed welcome; gives the part before the proof.
    pub(crate) fn on_welcome<'a>(&mut self, welcome: &'a [u8]) -> Result<&'a [u8], ProtocolError> {
        if !self.challenged {
            // A welcome without proof: from an acceptor that has no key, or by someone who would like us to have none.
            return Err(AuthError::NoKey { peer: self.peer.clone() }.into());
        }
        let Some((body, proof)) = welcome.split_last_chunk::<PROOF_BYTES>() else {
            let message = format!("{} bytes", welcome.len());
            return Err(ProtocolError::Malformed { what: "welcome", message });
        };
        self.transcript.absorb(body);
        if self.transcript.check(WELCOME, proof) { Ok(body) } else { Err(self.wrong_key()) }
    }

    fn wrong_key(&self) -> ProtocolError {
        AuthError::WrongKey { peer: self.peer.clone() }.into()
    }
}

/// The side that read the hello.
pub(crate) struct Acceptor {
    transcript: Transcript,
    peer: String,
}

impl Acceptor {
    /// Answers `hello` with a challenge; `nonce` is fresh, `peer` a name for errors.
    pub(crate) fn new(key: &JobKey, realm: Realm, hello: &[u8], nonce: &Nonce, peer: String) -> (Self, Vec<u8>) {
        let mut transcript = Transcript::new(key, realm, hello);
        transcript.absorb(nonce);
        let proof = transcript.prove(CHALLENGE);
        (Self { transcript, peer }, [&nonce[..], &proof].concat())
    }

    /// Checks the dialer's answer.
    pub(crate) fn on_proof(&mut self, proof: &[u8]) -> Result<(), ProtocolError> {
        if proof.len() != PROOF_BYTES {
            let message = format!("{} bytes", proof.len());
            return Err(ProtocolError::Malformed { what: "proof", message });
        }
        if self.transcript.check(PROOF, proof) {
            Ok(())
        } else {
            Err(AuthError::WrongKey { peer: self.peer.clone() }.into())
        }
    }

    /// Puts a proof behind the welcome.
    pub(crate) fn seal(mut self, welcome: &mut Vec<u8>) {
        self.transcript.absorb(welcome);
        welcome.extend(self.transcript.prove(WELCOME));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: &[u8] = b"hello, versions 1 to 1, nonce abc";
    const WELCOMED: &[u8] = b"welcome, version 1";

    fn key(byte: u8) -> JobKey {
        JobKey::new([byte; 32]).unwrap()
    }

    fn dialer(key: &JobKey, hello: &[u8]) -> Dialer {
        Dialer::new(key, Realm::Worker, hello, "w1".to_owned())
    }

    fn acceptor(key: &JobKey, hello: &[u8], nonce: u8) -> (Acceptor, Vec<u8>) {
        Acceptor::new(key, Realm::Worker, hello, &[nonce; 32], "w0".to_owned())
    }

    fn is_wrong_key<T: std::fmt::Debug>(result: Result<T, ProtocolError>) -> bool {
        matches!(result, Err(ProtocolError::Auth(AuthError::WrongKey { .. })))
    }

    fn is_malformed<T: std::fmt::Debug>(result: Result<T, ProtocolError>) -> bool {
        matches!(result, Err(ProtocolError::Malformed { .. }))
    }

    #[test]
    fn who_has_the_key_proves_it_to_the_other() {
        let (mut dialer, (mut acceptor, challenge)) = (dialer(&key(1), HELLO), acceptor(&key(1), HELLO, 7));
        let proof = dialer.on_challenge(&challenge).unwrap();
        acceptor.on_proof(&proof).unwrap();
        let mut welcome = WELCOMED.to_vec();
        acceptor.seal(&mut welcome);
        assert_eq!(dialer.on_welcome(&welcome), Ok(WELCOMED));
    }

    /// The bytes are the wire: a change of this test is a change of the protocol. Computed with Python's `hmac`.
    #[test]
    fn proofs_have_the_documented_bytes() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let (mut acceptor, challenge) = acceptor(&key(1), b"hello", 2);
        assert_eq!(hex(&challenge[..32]), "02".repeat(32));
        assert_eq!(hex(&challenge[32..]), "b50e6395ae85603ba5eeaad6a73026b869e0fea39977f90ab19cd5fb2a2e4fd2");
        let proof = dialer(&key(1), b"hello").on_challenge(&challenge).unwrap();
        assert_eq!(hex(&proof), "91539707244617bfd646203d777ce6bf0d87d3a5855ef35199db28b6858d66d2");
        acceptor.on_proof(&proof).unwrap();
        let mut welcome = b"welcome".to_vec();
        acceptor.seal(&mut welcome);
        assert_eq!(hex(&welcome[7..]), "4cd06a5fe4d1d627c5f9c4ac10e55f3e6f9d1e5e8ab3b447e35f1085f24445a7");
    }

    #[test]
    fn another_key_proves_nothing_to_either_side() {
        let (_, challenge) = acceptor(&key(2), HELLO, 7);
        assert!(is_wrong_key(dialer(&key(1), HELLO).on_challenge(&challenge)));
        // A dialer that does not look at the acceptor's proof.
        let (mut acceptor, _) = acceptor(&key(1), HELLO, 7);
        let proof = dialer(&key(2), HELLO).on_challenge(&challenge).unwrap();
        assert!(is_wrong_key(acceptor.on_proof(&proof)));
        // A key that begins as another does is another key.
        let longer = JobKey::new([&[1; 32][..], &[1]].concat()).unwrap();
        assert!(is_wrong_key(dialer(&longer, HELLO).on_challenge(&challenge_of(&key(1)))));
    }

    fn challenge_of(key: &JobKey) -> Vec<u8> {
        acceptor(key, HELLO, 7).1
    }

    /// A1: whatever byte of whatever message is changed on the way, the side that reads it ends the greeting or the next
    /// proof fails.
    #[test]
    fn a_changed_byte_anywhere_is_found() {
        for at in 0..HELLO.len() {
            let mut changed = HELLO.to_vec();
            changed[at] ^= 1;
            let (_, challenge) = acceptor(&key(1), &changed, 7);
            assert!(is_wrong_key(dialer(&key(1), HELLO).on_challenge(&challenge)), "hello, {at}");
        }
        let (_, good) = acceptor(&key(1), HELLO, 7);
        for at in 0..good.len() {
            let mut challenge = good.clone();
            challenge[at] ^= 0x80;
            assert!(is_wrong_key(dialer(&key(1), HELLO).on_challenge(&challenge)), "challenge, {at}");
        }
        for at in 0..PROOF_BYTES {
            let (mut acceptor, challenge) = acceptor(&key(1), HELLO, 7);
            let mut proof = dialer(&key(1), HELLO).on_challenge(&challenge).unwrap();
            proof[at] ^= 1;
            assert!(is_wrong_key(acceptor.on_proof(&proof)), "proof, {at}");
        }
        for at in 0..WELCOMED.len() + PROOF_BYTES {
            let (mut dialer, (mut acceptor, challenge)) = (dialer(&key(1), HELLO), acceptor(&key(1), HELLO, 7));
            acceptor.on_proof(&dialer.on_challenge(&challenge).unwrap()).unwrap();
            let mut welcome = WELCOMED.to_vec();
            acceptor.seal(&mut welcome);
            welcome[at] ^= 1;
            assert!(is_wrong_key(dialer.on_welcome(&welcome)), "welcome, {at}");
        }
    }

    /// A1: a byte that moves from one message to the next is a change, too.
    #[test]
    fn messages_have_ends() {
        let nonce = [b'x'; 32];
        let realm = Realm::Worker;
        let (_, one) = Acceptor::new(&key(1), realm, b"hellox", &nonce, String::new());
        let (_, other) = Acceptor::new(&key(1), realm, b"hello", &nonce, String::new());
        assert_ne!(one[32..], other[32..]);
    }

    /// A2: the recorded bytes of a greeting that was good fail at either side.
    #[test]
    fn a_replay_proves_nothing() {
        let (mut first, challenge) = acceptor(&key(1), HELLO, 7);
        let proof = dialer(&key(1), HELLO).on_challenge(&challenge).unwrap();
        first.on_proof(&proof).unwrap();
        // The same hello and proof again: the acceptor's nonce is another.
        let (mut second, _) = acceptor(&key(1), HELLO, 8);
        assert!(is_wrong_key(second.on_proof(&proof)));
        // The same challenge again: the dialer's nonce, in its hello, is another.
        let mut other = dialer(&key(1), b"hello, versions 1 to 1, nonce def");
        assert!(is_wrong_key(other.on_challenge(&challenge)));
    }

    /// A3: each side's own proof, sent back to it, fails; so does one of another realm.
    #[test]
    fn a_proof_sent_back_or_elsewhere_proves_nothing() {
        let (mut acceptor, challenge) = acceptor(&key(1), HELLO, 7);
        assert!(is_wrong_key(acceptor.on_proof(&challenge[32..])));
        let mut store = Dialer::new(&key(1), Realm::Store, HELLO, String::new());
        assert!(is_wrong_key(store.on_challenge(&challenge)));
        // The dialer's proof as the welcome's.
        let mut dialer = dialer(&key(1), HELLO);
        let proof = dialer.on_challenge(&challenge).unwrap();
        assert!(is_wrong_key(dialer.on_welcome(&[WELCOMED, &proof].concat())));
    }

    #[test]
    fn a_welcome_without_a_challenge_is_a_peer_without_a_key() {
        let result = dialer(&key(1), HELLO).on_welcome(WELCOMED);
        assert!(matches!(result, Err(ProtocolError::Auth(AuthError::NoKey { .. }))), "{result:?}");
        let (_, challenge) = acceptor(&key(1), HELLO, 7);
        let mut dialer = dialer(&key(1), HELLO);
        dialer.on_challenge(&challenge).unwrap();
        assert!(is_wrong_key(dialer.on_welcome(&[0; 40])));
        assert!(is_malformed(dialer.on_welcome(&[0; 31])));
    }

    #[test]
    fn messages_of_other_lengths_and_second_challenges_are_refused() {
        for len in [0, 31, 32, 63, 65, 4096] {
            assert!(is_malformed(dialer(&key(1), HELLO).on_challenge(&vec![0; len])), "{len}");
        }
        for len in [0, 31, 33, 64] {
            assert!(is_malformed(acceptor(&key(1), HELLO, 7).0.on_proof(&vec![0; len])), "{len}");
        }
        let (_, challenge) = acceptor(&key(1), HELLO, 7);
        let mut dialer = dialer(&key(1), HELLO);
        dialer.on_challenge(&challenge).unwrap();
        assert!(is_malformed(dialer.on_challenge(&challenge)));
    }
}
