//! TLS: whom a client trusts.
//!
//! ```text
//!   SSL_CERT_FILE names a file ──> the certificates in it
//!   else                       ──> Mozilla's, built in
//! ```
//!
//! As OpenSSL's clients have it, so that what works with those works here: behind a company's proxy, or with a service's own
//! authority.
//!
//! Invariant: there is somebody to trust. A file in which nobody is would be told by connections alone, each failing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use thiserror::Error;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// The variable that names a file of them.
pub(crate) const VARIABLE: &str = "SSL_CERT_FILE";

/// Why nobody can be trusted.
#[derive(Debug, Error)]
#[error("{VARIABLE} is {}, and {reason}; let it name a file of certificates (PEM), or unset it", path.display())]
pub struct BadAuthorities {
    path: PathBuf,
    reason: String,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Authorities {
    /// As they stand in the file; `None`: Mozilla's.
    named: Option<Vec<CertificateDer<'static>>>,
    roots: RootCertStore,
}

impl Authorities {
    /// Those that the environment names.
    ///
    /// # Errors
    /// It names a file that is of no use.
    pub fn from_env() -> Result<Self, BadAuthorities> {
        let path = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        Self::read(path.as_deref())
    }

    /// Those in a file; without one, Mozilla's. Of certificates that can't be used (some bundles have old ones) the others count.
    ///
    /// # Errors
    /// It can't be read, or has no certificate that can be used.
    pub fn read(path: Option<&Path>) -> Result<Self, BadAuthorities> {
        let mut roots = RootCertStore::empty();
        let Some(path) = path else {
            roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
            return Ok(Authorities { named: None, roots });
        };
        let bad = |reason| BadAuthorities { path: path.to_owned(), reason };
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let named = read.map_err(|error| bad(format!("it can't be read: {error}")))?;
        if named.is_empty() {
            return Err(bad("no certificate is in it".to_owned()));
        }
        match roots.add_parsable_certificates(named.iter().cloned()) {
            (0, 1) => Err(bad("the certificate in it can't be read".to_owned())),
            (0, unusable) => Err(bad(format!("none of the {unusable} certificates in it can be read"))),
            _ => Ok(Authorities { named: Some(named), roots }),
        }
    }

    /// What an agent of ureq's trusts.
    pub fn of_agent(&self) -> TlsConfig {
        let roots = match &self.named {
            None => RootCerts::WebPki,
            Some(named) => {
                let owned = named.iter().map(|der| Certificate::from_der(der).to_owned());
                RootCerts::Specific(Arc::new(owned.collect()))
            }
        };
        TlsConfig::builder().root_certs(roots).build()
    }

    /// What a connection of rustls' trusts.
    pub fn into_roots(self) -> RootCertStore {
        self.roots
    }
}
