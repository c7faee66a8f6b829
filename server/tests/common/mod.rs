//! What the service's tests share: a service in this process, and a client that can also misbehave.
#![allow(dead_code)]

pub mod serve;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use minisgl::openai::ModelName;
use minisgl::simulated::Control;
use minisgl::{BackendChoice, Error, Limits, Llm, Text};
use minisgl_server::{App, Ended, Service, Settings};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// A file or folder of the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(path)
}

/// The text side of the fixtures' tokenizer and chat template.
pub fn text() -> Text {
    Text::open(&repository("tests/fixtures/text")).unwrap()
}

/// The name that the model has in tests.
pub const MODEL: &str = "model";

pub fn settings() -> Settings {
    Settings::new(ModelName::new(MODEL))
}

/// A tiny model on the CPU that reads text: the fixtures' weights, tokenizer and template, put together in `folder`.
pub fn checkpoint(folder: &Path) {
    for fixture in ["tests/fixtures/tiny-tied", "tests/fixtures/text"] {
        for entry in std::fs::read_dir(repository(fixture)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
        }
    }
}

/// The same model, whose template tells it to write calls as Qwen3 does, and shows it no tools: their text would fill its few
/// positions.
pub fn checkpoint_with_calls(folder: &Path) {
    checkpoint(folder);
    let template =
        "{% if tools %}<tool_call>{% endif %}{% for one in messages %}{{ one.content }}{% endfor %}";
    std::fs::write(folder.join("chat_template.jinja"), template).unwrap();
}

/// A folder that is removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("minisgl-server-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A service that runs in this process.
pub struct Running {
    pub address: SocketAddr,
    pub app: Arc<App>,
    runtime: Runtime,
    end: Option<oneshot::Sender<()>>,
    served: Option<JoinHandle<Result<Ended, Error>>>,
}

impl Running {
    /// Over engines that `build` gives; requests are sent at once or after [`Running::ready`].
    pub fn start(settings: Settings, build: impl FnMut() -> Result<Llm, Error> + Send + 'static) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let service = Service::start(settings, build).unwrap();
        let app = service.app().clone();
        let (end, told) = oneshot::channel();
        let until = async move {
            let _ = told.await;
        };
        let served = runtime.spawn(service.serve(listener, until));
        Running { address, app, runtime, end: Some(end), served: Some(served) }
    }

    /// Over one simulated engine.
    pub fn simulated(settings: Settings, control: Control, text: Text) -> (Self, Arc<Control>) {
        let (llm, control) = Llm::simulated(control, text).unwrap();
        let mut llm = Some(llm);
        let running = Self::start(settings, move || llm.take().ok_or(Error::Failed));
        running.ready();
        (running, control)
    }

    /// Over a tiny model on the CPU.
    pub fn tiny(settings: Settings) -> Self {
        let scratch = Scratch::new();
        checkpoint(scratch.path());
        Self::of_checkpoint(settings, scratch)
    }

    /// Over the checkpoint in a folder.
    pub fn of_checkpoint(settings: Settings, scratch: Scratch) -> Self {
        let running = Self::start(settings, move || {
            Llm::builder(scratch.path().display().to_string())
                .backend(BackendChoice::Cpu)
                .max_running(8)
                .max_seq_len(Some(256))
                .num_pages(Some(128))
                .max_graph_batch(8)
                .build()
        });
        running.ready();
        running
    }

    /// Waits for an engine.
    pub fn ready(&self) {
        let engine = self.runtime.block_on(self.app.engines.ready());
        assert!(engine.is_some(), "there is no engine");
    }

    /// Tells the service to end.
    pub fn end(&mut self) {
        self.end.take().map(|end| end.send(()));
    }

    /// Has it ended?
    pub fn is_over(&self) -> bool {
        self.served.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// How it ended.
    pub fn ended(&mut self) -> Result<Ended, Error> {
        self.runtime.block_on(self.served.take().unwrap()).unwrap()
    }

    pub fn get(&self, path: &str) -> Reply {
        send(self.address, format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())
    }

    pub fn post(&self, path: &str, body: &Value) -> Reply {
        send(self.address, &request(path, "", body.to_string().as_bytes()))
    }

    /// Starts to read a stream.
    pub fn stream(&self, path: &str, mut body: Value) -> Stream {
        body["stream"] = true.into();
        Stream::open(self.address, path, &body)
    }

    /// A metric's value, over all its labels but those given.
    pub fn metric(&self, name: &str, label: &str) -> f64 {
        let text = String::from_utf8(self.get("/metrics").body).unwrap();
        let samples =
            text.lines().filter(|line| line.starts_with(&format!("{name}{{")) && line.contains(label));
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Waits until something holds.
    #[track_caller]
    pub fn wait(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
        if let Some(served) = self.served.take() {
            let _ = self.runtime.block_on(served);
        }
    }
}

/// Capacities of a simulated engine.
pub fn limits(running: u32) -> Limits {
    Limits { running, ..minisgl::simulated::LIMITS }
}

/// A POST request, its connection closed behind it.
pub fn request(path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n{headers}\r\n"
    )
    .into_bytes();
    request.extend_from_slice(body);
    request
}

/// What a client was answered.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let is = |line: &&str| line.split(':').next().is_some_and(|found| found.eq_ignore_ascii_case(name));
        Some(self.headers.lines().find(is)?.split_once(':')?.1.trim())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The error object's `param`, its status being as expected.
    #[track_caller]
    pub fn refused(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty()), "{error}");
        assert!(error["type"].is_string(), "{error}");
        error
    }
}

/// Sends bytes and reads all that is answered until the connection is closed.
#[track_caller]
pub fn send(address: SocketAddr, bytes: &[u8]) -> Reply {
    try_send(address, bytes).expect("an answer")
}

/// The same, where there may be no answer.
pub fn try_send(address: SocketAddr, bytes: &[u8]) -> Option<Reply> {
    let mut socket = TcpStream::connect(address).ok()?;
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // A server that refuses early closes while the rest is being sent.
    let _ = socket.write_all(bytes);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    parse(&answer)
}

/// Reads an answer.
pub fn parse(answer: &[u8]) -> Option<Reply> {
    let at = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = String::from_utf8(answer[..at].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let mut reply = Reply { status, headers: head, body: answer[at + 4..].to_vec() };
    if reply.header("transfer-encoding") == Some("chunked") {
        reply.body = unchunked(&reply.body);
    }
    Some(reply)
}

fn unchunked(mut body: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(at) = body.windows(2).position(|two| two == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&body[..at]).unwrap(), 16).unwrap();
        if length == 0 {
            break;
        }
        whole.extend_from_slice(&body[at + 2..at + 2 + length]);
        body = &body[at + 4 + length..];
    }
    whole
}

/// A stream of events as it comes. Dropping it closes the connection.
pub struct Stream {
    pub reader: BufReader<TcpStream>,
    pub status: u16,
}

impl Stream {
    pub fn open(address: SocketAddr, path: &str, body: &Value) -> Self {
        let mut socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        socket.write_all(&request(path, "", body.to_string().as_bytes())).unwrap();
        let mut reader = BufReader::new(socket);
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let status = line.split(' ').nth(1).unwrap_or("0").parse().unwrap();
        Stream { reader, status }
    }
}

impl Iterator for Stream {
    type Item = Value;

    /// The next event; the end mark is null.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            match line.trim_end().strip_prefix("data: ") {
                None => {}
                Some("[DONE]") => return Some(Value::Null),
                Some(json) => return Some(serde_json::from_str(json).unwrap()),
            }
        }
    }
}

/// A conversation of one message.
pub fn messages() -> Value {
    json!([{"role": "user", "content": "Hi, wörld"}])
}

/// Those of all engines so far.
pub type Controls = Arc<Mutex<Vec<Arc<Control>>>>;

/// An engine that each build makes anew, and the controls of all so far.
pub fn builds(
    mut control: impl FnMut(usize) -> Control + Send + 'static,
) -> (impl FnMut() -> Result<Llm, Error> + Send + 'static, Controls) {
    let controls = Controls::default();
    let seen = controls.clone();
    let build = move || {
        let mut controls = controls.lock().unwrap();
        let (llm, control) = Llm::simulated(control(controls.len()), Text::default())?;
        controls.push(control);
        Ok(llm)
    };
    (build, seen)
}
