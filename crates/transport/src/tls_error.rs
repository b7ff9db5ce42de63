//! Why there is no TLS.

use std::path::PathBuf;

use crate::KeyError;

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum TlsError {
    /// This build has no TLS.
    #[error("this program was built without TLS; build it with farcall's feature `tls`")]
    NotBuilt,
    /// A file that is not what it should be.
    #[error("{path}: {message}", path = .path.display())]
    File { path: PathBuf, message: String },
    /// The private key is readable by others, or not at all.
    #[error(transparent)]
    Key(#[from] KeyError),
}
