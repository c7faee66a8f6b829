//! TLS connections of [`crate::bench`]: they trust whom all clients do ([`Authorities`]).

use std::sync::Arc;

use minisgl_hub::{Authorities, BadAuthorities};
use rustls::ClientConfig;

/// What a connection is set up with.
///
/// # Errors
/// The environment names a file of authorities that is of no use.
pub fn of_connections() -> Result<Arc<ClientConfig>, BadAuthorities> {
    let roots = Authorities::from_env()?.into_roots();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    // The provider has all versions that are asked for.
    let builder = versions.expect("ring has TLS 1.2 and 1.3");
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}
