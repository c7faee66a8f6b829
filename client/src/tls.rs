//! TLS: whom a client trusts.
//!
//! ```text
//!   SSL_CERT_FILE names a file ──> the certificates in it
//!   else                       ──> Mozilla's, built in
//! ```
//!
//! As OpenSSL's clients have it, so that what works with those works here: behind a company's proxy, or with a service's own
//! authority.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use thiserror::Error;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

/// Why nobody can be trusted.
#[derive(Debug, Error)]
#[error("SSL_CERT_FILE is {}, and {reason}; let it name a file of certificates (PEM), or unset it", path.display())]
pub struct BadAuthorities {
    path: PathBuf,
    reason: String,
}

/// The certificates that the environment names; `None`: Mozilla's.
fn named() -> Result<Option<Vec<CertificateDer<'static>>>, BadAuthorities> {
    let Some(path) = std::env::var_os("SSL_CERT_FILE").filter(|path| !path.is_empty()).map(PathBuf::from)
    else {
        return Ok(None);
    };
    let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => {
            Err(BadAuthorities { path, reason: "no certificate is in it".to_owned() })
        }
        Ok(certificates) => Ok(Some(certificates)),
        Err(error) => Err(BadAuthorities { path, reason: format!("it can't be read: {error}") }),
    }
}

/// For [`crate::service`].
///
/// # Errors
/// The environment names a file that is of no use.
pub fn of_agent() -> Result<TlsConfig, BadAuthorities> {
    let roots = match named()? {
        None => RootCerts::WebPki,
        Some(named) => {
            let owned = named.iter().map(|der| Certificate::from_der(der).to_owned());
            RootCerts::Specific(Arc::new(owned.collect()))
        }
    };
    Ok(TlsConfig::builder().root_certs(roots).build())
}

/// For [`crate::bench`].
///
/// # Errors
/// The environment names a file that is of no use.
pub fn of_connections() -> Result<Arc<ClientConfig>, BadAuthorities> {
    let mut roots = RootCertStore::empty();
    match named()? {
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
        Some(named) => drop(roots.add_parsable_certificates(named)),
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    // The provider has all versions that are asked for.
    let builder = versions.expect("ring has TLS 1.2 and 1.3");
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}
