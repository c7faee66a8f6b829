//! Asking the hub: requests, retries, and what an answer that is no success means.
//!
//! ```text
//!   answer ── 2xx, 3xx, 4xx ───────────────────────> the caller
//!     ^  └─── 429, 5xx, a time-out, a lost connection ── pause, twice as long each time ──┐
//!     └───────────────────────────────────────────────────────────────────────────────────┘
//! ```

use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use ureq::http::{HeaderMap, Response, StatusCode, header};
use ureq::{Agent, Body};

use crate::authorities::Authorities;
use crate::error::HubError;
use crate::name::RepoName;
use crate::settings::Settings;

/// How often one thing is tried in a row.
pub(crate) const ATTEMPTS: u32 = 5;
/// A hub that asks to wait longer than that is not waited for.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Without a byte for so long, a connection is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// Bytes of a listing at most.
const LISTING_BYTES: u64 = 64 << 20;
/// Relative redirects of a file: a repository that was renamed has one.
const RENAMES_MAX: usize = 5;

pub(crate) struct Client {
    /// From the first question on.
    agent: OnceLock<Agent>,
    settings: Settings,
}

/// What the hub says of a file before it gives it.
pub(crate) struct Metadata {
    /// Names the contents.
    pub etag: String,
    /// Bytes, where it says so.
    pub size: Option<u64>,
}

impl Client {
    pub fn new(settings: &Settings) -> Client {
        Client { agent: OnceLock::new(), settings: settings.clone() }
    }

    fn agent(&self) -> Result<&Agent, HubError> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent);
        }
        let authorities = Authorities::read(self.settings.authorities.as_deref())?;
        let config = Agent::config_builder()
            .tls_config(authorities.of_agent())
            .user_agent(concat!("minisgl/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(SILENCE))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        Ok(self.agent.get_or_init(|| config.new_agent()))
    }

    /// The hub's listing of a repository, JSON.
    pub fn listing(&self, name: &RepoName, revision: &str) -> Result<Vec<u8>, HubError> {
        let endpoint = &self.settings.endpoint;
        let url = format!("{endpoint}/api/models/{name}/revision/{}", escape(revision));
        let answer = self.answer(&url, |agent| self.get(agent, &url, None))?;
        if answer.status() != StatusCode::OK {
            return Err(self.refusal(&url, name, revision, &answer));
        }
        let body = answer.into_body().into_with_config().limit(LISTING_BYTES).read_to_vec();
        body.map_err(|error| HubError::Answer {
            url,
            reason: format!("with a body that can't be read: {error}"),
        })
    }

    /// Where a file of a commit is.
    pub fn url(&self, name: &RepoName, commit: &str, file: &str) -> String {
        let file = file.split('/').map(escape).collect::<Vec<_>>().join("/");
        format!("{}/{name}/resolve/{commit}/{file}", self.settings.endpoint)
    }

    /// Asks for a file's name and size. Large files lie elsewhere: the hub's own answer, a redirect, describes them.
    pub fn metadata(&self, name: &RepoName, commit: &str, file: &str) -> Result<Metadata, HubError> {
        let mut url = self.url(name, commit, file);
        for _ in 0..RENAMES_MAX {
            let answer = self.answer(&url, |agent| self.head(agent, &url))?;
            let status = answer.status();
            if !status.is_success() && !status.is_redirection() {
                return Err(self.refusal(&url, name, commit, &answer));
            }
            let headers = answer.headers();
            match text(headers, "location") {
                Some(place) if status.is_redirection() && place.starts_with('/') => {
                    url = format!("{}{place}", origin(&url));
                }
                _ => return self.described(url, headers),
            }
        }
        Err(HubError::Answer { url, reason: "with one redirect after another".to_owned() })
    }

    fn described(&self, url: String, headers: &HeaderMap) -> Result<Metadata, HubError> {
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        if !crate::cache::is_plain(etag) {
            return Err(HubError::Answer { url, reason: format!("without a usable ETag (`{etag}`)") });
        }
        let linked = text(headers, "x-linked-size");
        // The length of a redirect is not the file's.
        let own = || text(headers, "content-length").filter(|_| text(headers, "location").is_none());
        Ok(Metadata { etag: etag.to_owned(), size: linked.or_else(own).and_then(|size| size.parse().ok()) })
    }

    /// Asks for what lies behind `url`, from byte `from` on; see [`Client::answer`].
    pub fn contents(&self, url: &str, from: u64) -> Result<Response<Body>, HubError> {
        self.answer(url, |agent| self.get(agent, url, (from > 0).then_some(from)))
    }

    fn get(&self, agent: &Agent, url: &str, from: Option<u64>) -> Result<Response<Body>, ureq::Error> {
        let mut request = agent.get(url).header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.settings.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(from) = from {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call()
    }

    fn head(&self, agent: &Agent, url: &str) -> Result<Response<Body>, ureq::Error> {
        let mut request = agent.head(url).header(header::ACCEPT_ENCODING, "identity");
        if let Some(token) = &self.settings.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        request.config().max_redirects(0).max_redirects_will_error(false).build().call()
    }

    /// Asks until there is an answer that says more than "later".
    fn answer(
        &self,
        url: &str,
        ask: impl Fn(&Agent) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, HubError> {
        let agent = self.agent()?;
        let mut attempt = 1;
        loop {
            let mut wait = None;
            match ask(agent) {
                Ok(answer) if !is_busy(answer.status()) => return Ok(answer),
                Ok(answer) => {
                    let seconds = text(answer.headers(), "retry-after").and_then(|it| it.trim().parse().ok());
                    wait = seconds.map(Duration::from_secs);
                    if attempt == ATTEMPTS || wait.is_some_and(|wait| wait > WAIT_MAX) {
                        let (url, status) = (url.to_owned(), answer.status().as_u16());
                        return Err(HubError::Busy { url, status, attempts: attempt, wait });
                    }
                }
                Err(error) if attempt == ATTEMPTS || !may_pass(&error) => {
                    return Err(HubError::Unreachable {
                        endpoint: origin(url).to_owned(),
                        reason: error.to_string(),
                    });
                }
                Err(_) => {}
            }
            self.pause(attempt, wait);
            attempt += 1;
        }
    }

    /// Waits before attempt `attempt + 1`: as asked, else twice as long each time.
    pub fn pause(&self, attempt: u32, wait: Option<Duration>) {
        thread::sleep(wait.unwrap_or(self.settings.pause * 2u32.pow(attempt - 1)));
    }

    /// What an answer means that has not what was asked for. The hub says it in `x-error-code`; mirrors may not.
    pub fn refusal(&self, url: &str, name: &RepoName, revision: &str, answer: &Response<Body>) -> HubError {
        let (endpoint, name) = (self.settings.endpoint.clone(), name.to_string());
        let code = text(answer.headers(), "x-error-code").unwrap_or_default();
        let by_listing = url.contains("/api/models/");
        match (code.as_str(), answer.status().as_u16()) {
            ("GatedRepo", _) | (_, 403) => HubError::Gated { endpoint, name },
            ("RevisionNotFound", _) => HubError::NoRevision { name, revision: revision.to_owned() },
            ("EntryNotFound", _) => HubError::NoFile { name, file: file_of(url) },
            // Whoever may not see a repository is not told whether there is one: the hub answers 401.
            ("RepoNotFound", _) => HubError::NoRepository { endpoint, name },
            (_, 401) if self.settings.token.is_some() => HubError::Token { endpoint },
            (_, 401) => HubError::NoRepository { endpoint, name },
            (_, 404) if by_listing => HubError::NoRepository { endpoint, name },
            (_, 404) => HubError::NoFile { name, file: file_of(url) },
            (_, status) => HubError::Answer { url: url.to_owned(), reason: status.to_string() },
        }
    }
}

fn is_busy(status: StatusCode) -> bool {
    matches!(status.as_u16(), 429 | 500 | 502 | 503 | 504)
}

/// Can it be different the next time?
fn may_pass(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::Timeout(_) | ureq::Error::Protocol(_) => true,
        ureq::Error::Io(error) => error.kind() != std::io::ErrorKind::ConnectionRefused,
        _ => false,
    }
}

pub(crate) fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

/// `https://host:port` of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find('/').map_or(url, |at| &url[..host + at])
}

fn file_of(url: &str) -> String {
    url.rsplit('/').next().unwrap_or(url).to_owned()
}

/// Percent-encodes all but what an address may hold as it is.
fn escape(part: &str) -> String {
    let mut out = String::with_capacity(part.len());
    for byte in part.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte as char),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
