//! A service on loopback that answers as a test wants, and what else the tests share.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

/// Whom clients of [`Fake::start_tls`] must trust.
pub const AUTHORITY: &str = "tests/fixtures/tls/authority.pem";

/// What a request asked for.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Counted from 0, over all connections.
    pub number: usize,
    pub method: String,
    pub path: String,
    /// The `Authorization` header.
    pub key: Option<String>,
    /// Null where there is none.
    pub body: Value,
}

impl Asked {
    /// The first text of a completions prompt, or the last message's.
    pub fn text(&self) -> String {
        let prompt = self.body["prompt"].as_str();
        let last = self.body["messages"].as_array().and_then(|messages| messages.last());
        prompt.or(last.and_then(|last| last["content"].as_str())).unwrap_or_default().to_owned()
    }

    fn is_chat(&self) -> bool {
        self.path.ends_with("/chat/completions")
    }
}

/// How it is answered.
#[derive(Clone, Debug)]
pub enum Reply {
    /// This body, with a status.
    Json(u16, Value),
    /// A stream of these texts, a token each, with its usage and its end.
    Stream(Vec<String>),
    /// Likewise, and then the connection is closed though nothing says so.
    StreamThenClose(Vec<String>),
    /// These bytes, and then the connection is closed.
    Bytes(Vec<u8>),
    /// A stream of these texts that then says nothing more until its reader is gone.
    Hang(Vec<String>),
}

impl Reply {
    /// As many tokens as were asked for.
    pub fn in_full(asked: &Asked) -> Reply {
        let tokens = asked.body["max_tokens"].as_u64().unwrap_or(3);
        Reply::Stream((0..tokens).map(|i| format!("t{i} ")).collect())
    }

    /// A stream of texts.
    pub fn texts(texts: &[&str]) -> Reply {
        Reply::Stream(texts.iter().map(|text| (*text).to_owned()).collect())
    }
}

struct State {
    asked: Vec<Asked>,
    connections: usize,
    /// Streams whose reader went away before their end.
    left: usize,
}

/// The service; it ends with the process.
#[derive(Clone)]
pub struct Fake {
    port: u16,
    /// Of a service that is reached through TLS.
    tls: Option<Arc<ServerConfig>>,
    state: Arc<Mutex<State>>,
    answer: Arc<dyn Fn(&Asked) -> Reply + Send + Sync>,
}

impl Fake {
    /// Serves the model `fake`, and completions as `answer` says.
    pub fn start(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Fake {
        Self::start_with(None, answer)
    }

    /// Likewise through TLS, with a certificate of the authority in [`AUTHORITY`].
    pub fn start_tls(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Fake {
        let pem = |name: &str| Path::new("tests/fixtures/tls").join(name);
        let certificates = CertificateDer::pem_file_iter(pem("service.pem")).unwrap();
        let key = PrivateKeyDer::from_pem_file(pem("service.key")).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.unwrap().with_no_client_auth();
        let config = config.with_single_cert(certificates.map(Result::unwrap).collect(), key).unwrap();
        Self::start_with(Some(Arc::new(config)), answer)
    }

    fn start_with(
        tls: Option<Arc<ServerConfig>>,
        answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Fake {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State { asked: Vec::new(), connections: 0, left: 0 }));
        let fake = Fake { port, tls, state, answer: Arc::new(answer) };
        let serving = fake.clone();
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let fake = serving.clone();
                // A client that hangs up early is its own business.
                thread::spawn(move || drop(fake.greet(socket)));
            }
        });
        fake
    }

    pub fn url(&self) -> String {
        match self.tls {
            None => format!("http://127.0.0.1:{}", self.port),
            Some(_) => format!("https://localhost:{}", self.port),
        }
    }

    /// The completions that were asked for, in the order in which they came.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.lock().unwrap().asked.clone()
    }

    /// Connections that asked for at least one completion.
    pub fn connections(&self) -> usize {
        self.state.lock().unwrap().connections
    }

    /// Streams whose reader went away before their end.
    pub fn left(&self) -> usize {
        self.state.lock().unwrap().left
    }

    fn greet(&self, socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        match &self.tls {
            None => self.serve(socket),
            Some(config) => {
                let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
                self.serve(StreamOwned::new(connection, socket))
            }
        }
    }

    fn serve(&self, socket: impl Read + Write) -> io::Result<()> {
        let mut connection = BufReader::new(socket);
        let mut asked_before = false;
        loop {
            let Some(mut asked) = read_request(&mut connection)? else { return Ok(()) };
            let mut socket = connection.get_mut();
            let reply = match asked.path.as_str() {
                "/v1/models" => Reply::Json(200, json!({"object": "list", "data": [{"id": "fake"}]})),
                // A token a word.
                "/tokenize" => Reply::Json(200, json!({"count": asked.text().split_whitespace().count()})),
                _ => {
                    let mut state = self.state.lock().unwrap();
                    asked.number = state.asked.len();
                    state.asked.push(asked.clone());
                    state.connections += usize::from(!std::mem::replace(&mut asked_before, true));
                    drop(state);
                    (self.answer)(&asked)
                }
            };
            match reply {
                Reply::Json(status, body) => {
                    let body = body.to_string();
                    write!(
                        socket,
                        "HTTP/1.1 {status} Answer\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    )?;
                    socket.flush()?;
                }
                Reply::Bytes(bytes) => {
                    socket.write_all(&bytes)?;
                    return socket.flush();
                }
                Reply::Stream(texts) => send(&mut socket, &asked, &texts, true)?,
                Reply::StreamThenClose(texts) => return send(&mut socket, &asked, &texts, true),
                Reply::Hang(texts) => {
                    send(&mut socket, &asked, &texts, false)?;
                    // Comments, until nobody takes them.
                    while chunk(&mut socket, ": ping\n\n").is_ok() {
                        thread::sleep(Duration::from_millis(5));
                    }
                    self.state.lock().unwrap().left += 1;
                    return Ok(());
                }
            }
        }
    }
}

fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Asked>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let (mut length, mut key) = (0, None);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().unwrap(),
            "authorization" => key = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    Ok(Some(Asked { number: 0, method, path, key, body }))
}

fn send(socket: &mut impl Write, asked: &Asked, texts: &[String], to_the_end: bool) -> io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes())?;
    for text in texts {
        let choice = match asked.is_chat() {
            true => json!({"index": 0, "delta": {"content": text}, "finish_reason": null}),
            false => json!({"index": 0, "text": text, "finish_reason": null}),
        };
        chunk(socket, &format!("data: {}\n\n", json!({"choices": [choice]})))?;
    }
    if to_the_end {
        let end = match asked.is_chat() {
            true => json!({"index": 0, "delta": {}, "finish_reason": "stop"}),
            false => json!({"index": 0, "text": "", "finish_reason": "stop"}),
        };
        let usage =
            json!({"prompt_tokens": 10, "completion_tokens": texts.len(), "total_tokens": 10 + texts.len()});
        chunk(socket, &format!("data: {}\n\n", json!({"choices": [end]})))?;
        chunk(socket, &format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage})))?;
        socket.write_all(b"0\r\n\r\n")?;
    }
    socket.flush()
}

fn chunk(socket: &mut impl Write, data: &str) -> io::Result<()> {
    socket.write_all(format!("{:x}\r\n{data}\r\n", data.len()).as_bytes())
}

/// A temporary directory.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("minisgl-client-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    /// With a tiny checkpoint that reads and writes text, and answers conversations.
    pub fn with_model() -> Scratch {
        let scratch = Scratch::new();
        for fixture in ["tiny-tied", "text"] {
            for file in fs::read_dir(Path::new("../tests/fixtures").join(fixture)).unwrap() {
                let file = file.unwrap();
                fs::copy(file.path(), scratch.0.join(file.file_name())).unwrap();
            }
        }
        scratch
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    pub fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.join(name)).unwrap()).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The `serve` program beside those of this crate, where the workspace has been built as a whole. Says that something was
/// not tried otherwise, past the capture that hides what a passing test prints.
pub fn serve_program(program: &str) -> Option<PathBuf> {
    let serve = Path::new(program).with_file_name("serve");
    if !serve.exists() {
        let _ = writeln!(io::stderr(), "skipped: there is no {}; build the whole workspace", serve.display());
        return None;
    }
    Some(serve)
}
