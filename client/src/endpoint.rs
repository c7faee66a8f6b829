//! Where a service is: the address that users give, in the forms that they give it.
//!
//! ```text
//!   http://127.0.0.1:1919              ──> http://127.0.0.1:1919/v1
//!   https://api.example.org/v1/        ──> https://api.example.org/v1
//!   http://host/some/path/v1           ──> as it is
//! ```

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use ureq::http::Uri;

/// A service's base address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    tls: bool,
    /// As it stands in a `Host` header.
    authority: String,
    /// Without the brackets of IPv6.
    host: String,
    port: u16,
    /// Without a slash at its end.
    path: String,
}

/// What is no service's address.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{url:?} is no address of a service: {reason}; give one like http://127.0.0.1:1919")]
pub struct BadEndpoint {
    url: String,
    reason: String,
}

impl Endpoint {
    /// The address of an endpoint of the API, such as `chat/completions`.
    pub fn url(&self, name: &str) -> String {
        format!("{self}/{name}")
    }

    /// The address of what lies beside the API, such as `tokenize`.
    pub fn url_beside(&self, name: &str) -> String {
        let base = self.to_string();
        format!("{}/{name}", base.strip_suffix("/v1").unwrap_or(&base))
    }

    /// The path of an endpoint of the API.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    /// Is it reached through TLS?
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Host and port, as a request names them.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// What to connect to.
    pub fn host_and_port(&self) -> (&str, u16) {
        (&self.host, self.port)
    }
}

impl FromStr for Endpoint {
    type Err = BadEndpoint;

    fn from_str(url: &str) -> Result<Self, BadEndpoint> {
        let bad = |reason: String| BadEndpoint { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|error| bad(format!("{error}")))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it does not begin with http:// or https://".to_owned())),
        };
        let authority = uri.authority().ok_or_else(|| bad("it has no host".to_owned()))?;
        if authority.as_str().contains('@') {
            return Err(bad("keys are given by --api-key or the environment, not in the address".to_owned()));
        }
        if uri.query().is_some() {
            return Err(bad("it has a query".to_owned()));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(bad("it has no host".to_owned()));
        }
        let path = match uri.path().trim_end_matches('/') {
            "" => "/v1",
            path => path,
        };
        Ok(Endpoint {
            tls,
            host,
            port: authority.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authority: authority.to_string(),
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}{}", self.authority, self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_in_the_forms_that_users_give() {
        for (url, base, host, port) in [
            ("http://127.0.0.1:1919", "http://127.0.0.1:1919/v1", "127.0.0.1", 1919),
            ("http://localhost/", "http://localhost/v1", "localhost", 80),
            ("https://api.example.org/v1/", "https://api.example.org/v1", "api.example.org", 443),
            ("http://[::1]:8000/a/v1", "http://[::1]:8000/a/v1", "::1", 8000),
        ] {
            let endpoint: Endpoint = url.parse().unwrap();
            assert_eq!(endpoint.to_string(), base);
            assert_eq!(endpoint.host_and_port(), (host, port));
            assert_eq!(endpoint.is_tls(), url.starts_with("https"));
        }
        let endpoint: Endpoint = "http://h:1/x/v1".parse().unwrap();
        assert_eq!(endpoint.url("models"), "http://h:1/x/v1/models");
        assert_eq!(endpoint.path("models"), "/x/v1/models");
        assert_eq!(endpoint.url_beside("tokenize"), "http://h:1/x/tokenize");
    }

    #[test]
    fn what_is_no_address_is_refused_with_what_to_write() {
        for url in [
            "",
            "localhost:1919",
            "ftp://host",
            "http://",
            "http://user:key@host",
            "http://h/v1?a=b",
            "http://h h",
            "/v1",
        ] {
            let error = url.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains("give one like http://127.0.0.1:1919"), "{error}");
        }
    }
}
