//! Certificates, and who is believed.

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, DigitallySignedStruct, RootCertStore, ServerConfig, ServerConnection,
    SignatureScheme,
};

use crate::key::read_secret;
use crate::tls_error::TlsError;

/// A worker's certificate with its private key, and the CA that the certificates of all workers come from.
#[derive(Clone)]
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls(…)")
    }
}

impl Tls {
    /// Reads PEM files: the worker's certificate (with what is between it and the CA, if anything), its private key, and the
    /// CA's certificate.
    ///
    /// # Errors
    /// [`TlsError`] names the file.
    pub fn from_files(certificate: &Path, key: &Path, ca: &Path) -> Result<Self, TlsError> {
        let bad = |path: &Path| {
            let path = path.to_owned();
            move |message: String| TlsError::File { path, message }
        };
        let chain = certificates(certificate)?;
        let text = read_secret(key)?;
        let private = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| bad(key)(error.to_string()))?;
        let mut roots = RootCertStore::empty();
        for root in certificates(ca)? {
            roots.add(root).map_err(|error| bad(ca)(error.to_string()))?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let wrong = |message: String| bad(certificate)(message);

        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build();
        let verifier = verifier.map_err(|error| bad(ca)(error.to_string()))?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13]);
        let server = server.map_err(|error| wrong(error.to_string()))?.with_client_cert_verifier(verifier);
        let server = server.with_single_cert(chain.clone(), private.clone_key());
        let mut server = server.map_err(|error| wrong(error.to_string()))?;
        server.send_tls13_tickets = 0;

        let verifier = Arc::new(SignedByCa { roots, provider: Arc::clone(&provider) });
        let client = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13]);
        let client = client.map_err(|error| wrong(error.to_string()))?.dangerous();
        let client = client.with_custom_certificate_verifier(verifier).with_client_auth_cert(chain, private);
        let mut client = client.map_err(|error| wrong(error.to_string()))?;
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Ok(Self { client: Arc::new(client), server: Arc::new(server) })
    }

    pub(crate) fn dialer(&self, address: IpAddr) -> Result<Connection, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.client), ServerName::IpAddress(address.into())).map(Connection::from)
    }

    pub(crate) fn acceptor(&self) -> Result<Connection, rustls::Error> {
        ServerConnection::new(Arc::clone(&self.server)).map(Connection::from)
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |message: String| TlsError::File { path: path.to_owned(), message };
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(read) if read.is_empty() => Err(bad("no certificate in PEM form".to_owned())),
        Ok(read) => Ok(read),
        Err(error) => Err(bad(error.to_string())),
    }
}

/// Believes certificates that the CA signed, within their time. Workers are dialed by addresses that come and go, which no
/// certificate names; who answers is checked by the hello.
#[derive(Debug)]
struct SignedByCa {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for SignedByCa {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let certificate = ParsedCertificate::try_from(certificate)?;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
