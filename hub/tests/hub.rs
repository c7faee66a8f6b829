//! Fetching from a hub on loopback, which serves a small repository and fails on order.

mod server;

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use minisgl_hub::{Event, Hub, HubError, Settings, Snapshot};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use server::{COMMIT, Fault, Gate, NAME, Server, etag};

/// Bytes of the weights: some pieces, so that a download can break between them.
const WEIGHTS: usize = 1 << 20;

/// A cache's folder, removed at the end.
struct Cache(PathBuf);

impl Cache {
    fn new() -> Cache {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("minisgl-hub-{}-{count}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Cache(folder)
    }

    /// The repository's folder.
    fn join(&self, path: &str) -> PathBuf {
        self.0.join("models--tiny--model").join(path)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn contents(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let byte = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(byte).collect()
}

fn files() -> Vec<(String, Vec<u8>)> {
    let files = [
        ("config.json", b"{\"model_type\": \"tiny\"}".to_vec()),
        ("tokenizer.json", contents(1, 5000)),
        ("chat_template.jinja", Vec::new()),
        ("README.md", b"words".to_vec()),
        ("pytorch_model.bin", contents(2, 100)),
        ("model.safetensors", contents(3, WEIGHTS)),
    ];
    files.map(|(name, contents)| (name.to_owned(), contents)).to_vec()
}

fn sharded() -> Vec<(String, Vec<u8>)> {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    let mut files = files();
    files.truncate(3);
    files.push(("model.safetensors.index.json".to_owned(), index.as_bytes().to_vec()));
    for (seed, name) in [(4, "model-1.safetensors"), (5, "model-2.safetensors"), (6, "other.safetensors")] {
        files.push((name.to_owned(), contents(seed, 3000)));
    }
    files
}

fn settings(server: &Server, cache: &Cache) -> Settings {
    Settings {
        cache: cache.0.clone(),
        endpoint: server.endpoint(),
        token: None,
        authorities: None,
        offline: false,
        pause: Duration::from_millis(1),
    }
}

fn fetch_with(settings: Settings) -> Result<Snapshot, HubError> {
    Hub::new(settings).snapshot(&NAME.parse().unwrap(), "main", &mut |_| ())
}

fn fetch(server: &Server, cache: &Cache) -> Result<Snapshot, HubError> {
    fetch_with(settings(server, cache))
}

#[track_caller]
fn assert_holds(folder: &Path, files: &[(String, Vec<u8>)]) {
    for (name, contents) in files {
        assert!(fs::read(folder.join(name)).unwrap() == *contents, "{name} has other bytes");
    }
}

#[track_caller]
fn assert_refused(outcome: Result<Snapshot, HubError>, things: &[&str]) {
    let text = outcome.expect_err("it should be refused").to_string();
    for thing in things {
        assert!(text.contains(thing), "the error does not name {thing:?}: {text}");
    }
}

#[test]
fn a_repository_becomes_a_folder_of_links_and_the_second_time_nothing_but_the_listing_is_asked_for() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let snapshot = fetch(&server, &cache).unwrap();
    assert_eq!(
        snapshot,
        Snapshot { folder: cache.join("snapshots").join(COMMIT), commit: COMMIT.to_owned() }
    );
    let needed: Vec<_> =
        files().into_iter().filter(|(name, _)| name != "README.md" && !name.ends_with("bin")).collect();
    assert_holds(&snapshot.folder, &needed);
    assert!(
        !snapshot.folder.join("README.md").exists() && !snapshot.folder.join("pytorch_model.bin").exists()
    );
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), COMMIT);
    for (name, contents) in &needed {
        let target = fs::read_link(snapshot.folder.join(name)).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(etag(contents)));
    }
    assert!(server.take_log().iter().all(|line| !line.contains("README") && !line.contains(".bin")));

    assert_eq!(fetch(&server, &cache).unwrap(), snapshot);
    assert_eq!(server.take_log(), ["GET /api/models/tiny/model/revision/main"]);
}

#[test]
fn a_commit_that_is_there_whole_is_not_asked_for() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let hub = Hub::new(settings(&server, &cache));
    let at = |revision: &str| hub.snapshot(&NAME.parse().unwrap(), revision, &mut |_| ());
    let snapshot = at(COMMIT).unwrap();
    assert!(!cache.join("refs").exists(), "a commit needs no reference");
    server.take_log();
    assert_eq!(at(COMMIT).unwrap(), snapshot);
    assert_eq!(server.take_log(), [""; 0]);
    assert_eq!(at("refs/pr/1").unwrap(), snapshot);
    assert_eq!(server.take_log(), ["GET /api/models/tiny/model/revision/refs%2Fpr%2F1"]);
    assert_eq!(fs::read_to_string(cache.join("refs/refs/pr/1")).unwrap(), COMMIT);
}

#[test]
fn an_index_says_which_shards_are_fetched() {
    let (server, cache) = (Server::start(sharded()), Cache::new());
    let folder = fetch(&server, &cache).unwrap().folder;
    assert_holds(&folder, &sharded()[..6]);
    assert!(!folder.join("other.safetensors").exists());
    fetch(&server, &cache).unwrap();
    let log = server.take_log();
    assert_eq!(log.iter().filter(|line| line.contains("/cdn/")).count(), 2, "{log:?}");
}

#[test]
fn a_branch_that_moves_brings_only_what_changed() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let first = fetch(&server, &cache).unwrap();
    server.take_log();
    let later = "2222222222222222222222222222222222222222";
    server.commit(later, "tokenizer.json", b"{}");
    let second = fetch(&server, &cache).unwrap();
    assert_eq!(second.commit, later);
    assert_eq!(fs::read(second.folder.join("tokenizer.json")).unwrap(), b"{}");
    assert_eq!(fs::read(first.folder.join("tokenizer.json")).unwrap(), contents(1, 5000));
    let fetched: Vec<_> = server.take_log().into_iter().filter(|line| line.starts_with("GET")).collect();
    assert_eq!(fetched.len(), 2, "the listing and the file that changed: {fetched:?}");
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_broke() {
    for at in [1, 70_000, WEIGHTS - 1] {
        let (server, cache) = (Server::start(files()), Cache::new());
        server.spoil("/cdn/", Fault::BreakAfter(at), 1);
        server.spoil("range=", Fault::BreakAfter(at.min(1000)), 1);
        let mut broken = 0;
        let name = NAME.parse().unwrap();
        let snapshot = Hub::new(settings(&server, &cache)).snapshot(&name, "main", &mut |event| {
            broken += u32::from(matches!(event, Event::Broken { name: "model.safetensors", .. }));
        });
        assert_holds(&snapshot.unwrap().folder, &files()[5..]);
        let asked = server.take_log().into_iter().filter(|line| line.contains("/cdn/"));
        let ranges: Vec<_> = asked.map(|line| line.split("range=").nth(1).map(str::to_owned)).collect();
        assert_eq!(ranges[..2], [None, Some(at.to_string())]);
        assert!(broken as usize == ranges.len() - 1 && broken >= 1, "{ranges:?}");
    }
}

#[test]
fn a_download_that_was_given_up_goes_on_the_next_time() {
    let (server, cache) = (Server::start(files()), Cache::new());
    server.spoil("/cdn/", Fault::BreakAfter(300_000), 1);
    server.spoil("/cdn/", Fault::BreakAfter(0), 5);
    assert_refused(fetch(&server, &cache), &["model.safetensors", "300000", "run again"]);
    let incomplete = cache.join("blobs").join(format!("{}.incomplete", etag(&files()[5].1)));
    assert_eq!(fs::metadata(&incomplete).unwrap().len(), 300_000);
    assert!(!cache.join("refs/main").exists(), "what is not whole has no reference");
    server.take_log();
    assert_holds(&fetch(&server, &cache).unwrap().folder, &files()[5..]);
    let log = server.take_log();
    assert_eq!(log.last().unwrap(), &format!("GET /cdn/{} range=300000", etag(&files()[5].1)));
    assert!(!incomplete.exists());
}

#[test]
fn an_incomplete_file_that_is_too_long_and_a_server_without_ranges_begin_anew() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let etag = etag(&files()[5].1);
    for len in [WEIGHTS + 1, 1000] {
        fs::create_dir_all(cache.join("blobs")).unwrap();
        fs::write(cache.join("blobs").join(format!("{etag}.incomplete")), vec![7; len]).unwrap();
        server.spoil("range=", Fault::IgnoreRange, 1);
        assert_holds(&fetch(&server, &cache).unwrap().folder, &files()[5..]);
        fs::remove_dir_all(cache.join("")).unwrap();
    }
}

#[test]
fn what_the_hub_refuses_is_said_by_its_kind() {
    let api = "/api/models/";
    let refused: [(&str, Fault, &[&str]); 9] = [
        (api, Fault::Status(401, ""), &["tiny/model", "HF_TOKEN"]),
        (api, Fault::Status(401, "X-Error-Code: RepoNotFound\r\n"), &["no model tiny/model"]),
        (
            api,
            Fault::Status(401, "X-Error-Code: GatedRepo\r\n"),
            &["restricted", "accept its terms", "/tiny/model"],
        ),
        (api, Fault::Status(403, ""), &["restricted", "HF_TOKEN"]),
        (
            api,
            Fault::Status(404, "X-Error-Code: RevisionNotFound\r\n"),
            &["no revision `main`", "--revision"],
        ),
        (api, Fault::Status(404, ""), &["no model tiny/model"]),
        ("tokenizer.json", Fault::Status(404, ""), &["no tokenizer.json"]),
        ("/cdn/", Fault::Status(403, "X-Error-Code: GatedRepo\r\n"), &["restricted"]),
        ("config.json", Fault::Status(418, ""), &["config.json", "418", "HF_ENDPOINT"]),
    ];
    for (part, fault, things) in refused {
        let (server, cache) = (Server::start(files()), Cache::new());
        server.spoil(part, fault, 100);
        assert_refused(fetch(&server, &cache), things);
    }
    let (server, cache) = (Server::start(files()), Cache::new());
    server.spoil(api, Fault::Status(401, ""), 1);
    let with_token = Settings { token: Some("hf_old".to_owned()), ..settings(&server, &cache) };
    assert_refused(fetch_with(with_token), &["refuses the token"]);
    let hub = Hub::new(settings(&server, &cache));
    for revision in ["v9", "../../etc", "", "a b"] {
        let outcome = hub.snapshot(&NAME.parse().unwrap(), revision, &mut |_| ());
        assert_refused(outcome, &[&format!("no revision `{revision}`")]);
    }
    assert_refused(hub.snapshot(&"no/body".parse().unwrap(), "main", &mut |_| ()), &["no model no/body"]);
}

#[test]
fn a_busy_hub_is_asked_again_and_left_alone_where_it_says_so() {
    for part in ["/api/models/", "HEAD /tiny/model/resolve", "/cdn/"] {
        for (status, headers) in [(429, "Retry-After: 0\r\n"), (503, ""), (500, "")] {
            let (server, cache) = (Server::start(files()), Cache::new());
            server.spoil(part, Fault::Status(status, headers), 3);
            assert_holds(&fetch(&server, &cache).unwrap().folder, &files()[5..]);

            let cache = Cache::new();
            server.spoil(part, Fault::Status(status, headers), 5);
            assert_refused(fetch(&server, &cache), &[&status.to_string(), "5 times", "later"]);
        }
    }
    let (server, cache) = (Server::start(files()), Cache::new());
    server.spoil("/api/", Fault::Status(429, "Retry-After: 300\r\n"), 5);
    assert_refused(fetch(&server, &cache), &["429", "300 s"]);
    assert_eq!(server.take_log().len(), 1, "it is not waited for");
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let (server, cache) = (Server::start(sharded()), Cache::new());
    // Nothing comes to whoever is first until the other waits for it.
    let gate = Gate::default();
    server.spoil("/cdn/", Fault::Held(gate.clone()), 100);
    let waited = AtomicU32::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let name = NAME.parse().unwrap();
                let snapshot = Hub::new(settings(&server, &cache)).snapshot(&name, "main", &mut |event| {
                    if let Event::Waiting { .. } = event {
                        waited.fetch_add(1, Ordering::Relaxed);
                        gate.open();
                    }
                });
                assert_holds(&snapshot.unwrap().folder, &sharded()[..6]);
            });
        }
    });
    let log = server.take_log();
    assert_eq!(log.iter().filter(|line| line.contains("/cdn/")).count(), 2, "{log:?}");
    assert!(waited.into_inner() > 0);
}

#[test]
fn offline_nobody_is_asked() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let offline = || Settings { offline: true, ..settings(&server, &cache) };
    assert_refused(fetch_with(offline()), &["tiny/model", "HF_HUB_OFFLINE", cache.0.to_str().unwrap()]);
    let snapshot = fetch(&server, &cache).unwrap();
    server.take_log();
    assert_eq!(fetch_with(offline()).unwrap(), snapshot);
    // Without its weights, a snapshot is none; nor with a link whose blob is gone.
    fs::remove_file(cache.join("blobs").join(etag(&files()[5].1))).unwrap();
    assert_refused(fetch_with(offline()), &["not whole"]);
    assert_eq!(server.take_log(), [""; 0]);
    assert_holds(&fetch(&server, &cache).unwrap().folder, &files()[5..]);
}

#[test]
fn a_hub_that_is_not_there_leaves_what_the_cache_has() {
    let (server, cache) = (Server::start(files()), Cache::new());
    // A port that nobody listens on any more.
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let away = || Settings { endpoint: format!("http://{gone}"), ..settings(&server, &cache) };
    assert_refused(fetch_with(away()), &["can't be reached", &gone.to_string(), "network"]);
    let nowhere = Settings { endpoint: "http://hub.invalid".to_owned(), ..settings(&server, &cache) };
    assert_refused(fetch_with(nowhere), &["hub.invalid", "can't be reached"]);
    let snapshot = fetch(&server, &cache).unwrap();
    let mut said = Vec::new();
    let again = Hub::new(away()).snapshot(&NAME.parse().unwrap(), "main", &mut |event| {
        if let Event::Cached { commit, .. } = event {
            said.push(commit.to_owned());
        }
    });
    assert_eq!((again.unwrap(), said), (snapshot, vec![COMMIT.to_owned()]));
}

/// An authority, and a service that it vouches for.
const TLS: &str = "../client/tests/fixtures/tls";

/// The server's address behind TLS.
fn behind_tls(server: &Server) -> String {
    let pem = |name: &str| Path::new(TLS).join(name);
    let certificates =
        CertificateDer::pem_file_iter(pem("service.pem")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(pem("service.key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = Arc::new(config.with_no_client_auth().with_single_cert(certificates, key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let plain = server.endpoint().trim_start_matches("http://").to_owned();
    let pass = move |socket: TcpStream| -> io::Result<()> {
        let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        let mut client = BufReader::new(StreamOwned::new(connection, socket));
        let mut request = String::new();
        while !request.ends_with("\r\n\r\n") && client.read_line(&mut request)? > 0 {}
        let (mut server, mut answer) = (TcpStream::connect(&plain)?, Vec::new());
        server.write_all(request.as_bytes())?;
        server.read_to_end(&mut answer)?;
        client.get_mut().write_all(&answer)?;
        client.get_mut().flush()
    };
    // A client that hangs up, for it does not trust the service, is its own business.
    thread::spawn(move || listener.incoming().flatten().for_each(|socket| drop(pass(socket))));
    endpoint
}

#[test]
fn a_hub_behind_tls_is_asked_by_who_trusts_its_authority() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let endpoint = behind_tls(&server);
    let trusting = |authorities: Option<PathBuf>| Settings {
        endpoint: endpoint.clone(),
        authorities,
        ..settings(&server, &cache)
    };
    let damaged = cache.0.join("damaged.pem");
    fs::write(&damaged, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let empty = cache.0.join("empty.pem");
    fs::write(&empty, "").unwrap();
    assert_refused(fetch_with(trusting(None)), &["can't be reached", "certificate"]);
    for (file, complaint) in [
        (PathBuf::from("/nowhere.pem"), "it can't be read"),
        (empty, "no certificate is in it"),
        (damaged.clone(), "the certificate in it can't be read"),
    ] {
        let named = format!("SSL_CERT_FILE is {}", file.display());
        assert_refused(fetch_with(trusting(Some(file))), &[&named, complaint]);
    }
    assert_eq!(server.take_log(), [""; 0], "who is not trusted is not asked");
    let snapshot = fetch_with(trusting(Some(Path::new(TLS).join("authority.pem")))).unwrap();
    assert_holds(&snapshot.folder, &files()[5..]);
    // What the cache has is there without the hub; why that was not asked is told.
    let mut said = Vec::new();
    let hub = Hub::new(trusting(Some(damaged)));
    let again = hub.snapshot(&NAME.parse().unwrap(), "main", &mut |event| {
        if let Event::Cached { reason, .. } = event {
            said.push(reason.to_string());
        }
    });
    assert_eq!(again.unwrap(), snapshot);
    assert!(said.len() == 1 && said[0].contains("damaged.pem"), "{said:?}");
}

#[test]
fn the_token_goes_to_the_hub_and_to_nobody_else() {
    let (server, cache) = (Server::start(files()), Cache::new());
    fetch_with(Settings { token: Some("hf_secret".to_owned()), ..settings(&server, &cache) }).unwrap();
    let log = server.take_log();
    assert!(log.iter().any(|line| line.contains("/cdn/")));
    for line in log {
        assert_eq!(line.contains("auth=Bearer hf_secret"), !line.contains("/cdn/"), "{line}");
    }
}

#[test]
fn a_repository_that_was_renamed_is_found_under_its_old_name() {
    let (server, cache) = (Server::start(files()), Cache::new());
    let snapshot =
        Hub::new(settings(&server, &cache)).snapshot(&"old/name".parse().unwrap(), "main", &mut |_| ());
    assert_holds(&snapshot.unwrap().folder, &files()[5..]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_said_with_what_is_missing() {
    let (server, cache) = (Server::start(files()), Cache::new());
    fs::create_dir_all(cache.join("blobs")).unwrap();
    let incomplete = cache.join("blobs").join(format!("{}.incomplete", etag(&files()[5].1)));
    std::os::unix::fs::symlink("/dev/full", &incomplete).unwrap();
    assert_refused(fetch(&server, &cache), &["full", "model.safetensors", &WEIGHTS.to_string(), "HF_HOME"]);
    fs::remove_file(incomplete).unwrap();
    assert_holds(&fetch(&server, &cache).unwrap().folder, &files()[5..]);
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let (server, cache) = (Server::start(files()), Cache::new());
    fs::write(cache.0.join("models--tiny--model"), "a file where the folder should be").unwrap();
    assert_refused(fetch(&server, &cache), &["models--tiny--model", "HF_HOME"]);
}

#[test]
fn answers_that_make_no_sense_are_refused_and_lead_nowhere_outside_the_cache() {
    let answers: [(&str, Fault, &[&str]); 7] = [
        ("/api/", Fault::Body("<html>"), &["listing", "HF_ENDPOINT"]),
        ("/api/", Fault::Body(r#"{"sha": "../../x", "siblings": []}"#), &["../../x"]),
        (
            "/api/",
            Fault::Body(r#"{"sha": "abc", "siblings": [{"rfilename": "model.safetensors"}]}"#),
            &["no config.json"],
        ),
        (
            "/api/",
            Fault::Body(
                r#"{"sha": "abc", "siblings": [{"rfilename": "config.json"}, {"rfilename": "x.gguf"}]}"#,
            ),
            &["x.gguf", "safetensors"],
        ),
        ("HEAD", Fault::Etag("\"../../../x\""), &["ETag"]),
        ("HEAD", Fault::Etag(""), &["ETag"]),
        ("HEAD", Fault::Status(307, "Location: /tiny/model/resolve/again\r\n"), &["redirect"]),
    ];
    for (part, fault, things) in answers {
        let (server, cache) = (Server::start(files()), Cache::new());
        server.spoil(part, fault, 100);
        assert_refused(fetch(&server, &cache), things);
    }
    let mut files = sharded();
    files[3].1 = br#"{"weight_map": {"a": "../../../x.safetensors"}}"#.to_vec();
    assert_refused(fetch(&Server::start(files), &Cache::new()), &["model.safetensors.index.json"]);
}
