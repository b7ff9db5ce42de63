//! In place of TLS where it was not built: nothing can be made of it, so that nothing is silently unencrypted.

use std::path::Path;
use std::time::Instant;

use crate::driver::Driver;
use crate::tls_error::TlsError;

/// A worker's certificate; not in this build, which has not the feature `tls`.
#[derive(Clone, Debug)]
pub enum Tls {}

impl Tls {
    /// Fails: this build has no TLS.
    ///
    /// # Errors
    /// [`TlsError::NotBuilt`].
    pub fn from_files(_certificate: &Path, _key: &Path, _ca: &Path) -> Result<Self, TlsError> {
        Err(TlsError::NotBuilt)
    }
}

pub(crate) enum Session {}

impl Session {
    pub(crate) fn on_event(&self, _driver: &Driver) {
        match *self {}
    }

    pub(crate) fn on_timer(&self, _driver: &Driver, _now: Instant) -> Option<Instant> {
        match *self {}
    }
}
