//! A hub on loopback: one small repository, served as the real one serves it, with faults on order.
//!
//! ```text
//!   GET  /api/models/tiny/model/revision/REV   the listing
//!   HEAD /tiny/model/resolve/COMMIT/FILE       small files: the file; *.safetensors: a redirect that describes it
//!   GET  /cdn/ETAG                             where the redirect leads, by another name of the same host
//! ```
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// The repository's name.
pub const NAME: &str = "tiny/model";
/// The commit that `main` is at first.
pub const COMMIT: &str = "1111111111111111111111111111111111111111";

/// What goes wrong with an answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status and these headers instead.
    Status(u16, &'static str),
    /// The body ends after so many bytes, the connection with it.
    BreakAfter(usize),
    /// The whole file, whatever part was asked for.
    IgnoreRange,
    /// Nothing behind the head until the gate is open.
    Held(Gate),
    /// This body instead of a listing.
    Body(&'static str),
    /// This ETag instead.
    Etag(&'static str),
}

/// Opened once, for all who wait at it. Clones are the same gate.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }

    /// Waits until it is open, or so long that a test which forgot it ends.
    fn pass(&self) {
        let (open, opened) = &*self.0;
        let patience = Duration::from_secs(60);
        drop(opened.wait_timeout_while(open.lock().unwrap(), patience, |open| !*open));
    }
}

struct State {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// For addresses that hold the text, so many times.
    faults: Vec<(String, Fault, usize)>,
    log: Vec<String>,
}

/// The server; it ends with the process.
#[derive(Clone)]
pub struct Server {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Serves these files.
    pub fn start(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (files, commit) = (files.into_iter().collect(), COMMIT.to_owned());
        let state = Arc::new(Mutex::new(State { commit, files, faults: Vec::new(), log: Vec::new() }));
        let server = Server { port, state };
        let serving = server.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = serving.clone();
                // A client that hangs up early is its own business.
                thread::spawn(move || drop(server.serve(stream)));
            }
        });
        server
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Spoils the next `times` answers to requests whose line holds `part`.
    pub fn spoil(&self, part: &str, fault: Fault, times: usize) {
        self.state.lock().unwrap().faults.push((part.to_owned(), fault, times));
    }

    /// Moves `main` to another commit with one file changed.
    pub fn commit(&self, commit: &str, file: &str, contents: &[u8]) {
        let mut state = self.state.lock().unwrap();
        state.commit = commit.to_owned();
        state.files.insert(file.to_owned(), contents.to_vec());
    }

    /// Requests since the last call: method, address, `range=…` and `auth=…` where given.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        let (mut request, mut range, mut auth) = (String::new(), None, String::new());
        reader.read_line(&mut request)?;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            match name.to_ascii_lowercase().as_str() {
                "range" => range = value.strip_prefix("bytes=").map(|it| it.trim_end_matches('-').to_owned()),
                "authorization" => auth = format!(" auth={value}"),
                _ => {}
            }
        }
        let mut words = request.split(' ');
        let (method, url) = (words.next().unwrap_or_default(), words.next().unwrap_or_default().to_owned());
        let range_text = range.as_deref().map_or_else(String::new, |from| format!(" range={from}"));
        let line = format!("{method} {url}{range_text}{auth}");
        let answer =
            self.state.lock().unwrap().answer(self.port, &url, &line, range.and_then(|it| it.parse().ok()));
        answer.send(stream, method == "HEAD")
    }
}

/// What is sent: a head, and a body that may end early.
struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
    gate: Option<Gate>,
    sent: usize,
}

impl Answer {
    fn new(status: u16, headers: String, body: Vec<u8>) -> Answer {
        Answer { status, headers, gate: None, sent: body.len(), body }
    }

    fn send(self, mut stream: TcpStream, head_only: bool) -> std::io::Result<()> {
        let (status, headers, len) = (self.status, self.headers, self.body.len());
        write!(
            stream,
            "HTTP/1.1 {status} Answer\r\n{headers}Content-Length: {len}\r\nConnection: close\r\n\r\n"
        )?;
        stream.flush()?;
        self.gate.iter().for_each(Gate::pass);
        if !head_only {
            stream.write_all(&self.body[..self.sent])?;
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        // Until the client has read it all: closing with data on its way may lose it.
        drop(stream.read(&mut [0]));
        Ok(())
    }
}

impl State {
    fn answer(&mut self, port: u16, url: &str, line: &str, range: Option<usize>) -> Answer {
        self.log.push(line.to_owned());
        let fault =
            self.faults.iter_mut().find(|(part, _, times)| line.contains(part.as_str()) && *times > 0);
        let fault = fault.map(|(_, fault, times)| {
            *times -= 1;
            fault.clone()
        });
        if let Some(Fault::Status(status, headers)) = fault {
            return Answer::new(status, headers.to_owned(), Vec::new());
        }
        let range = range.filter(|_| !matches!(fault, Some(Fault::IgnoreRange)));
        let mut answer = self.route(port, url, range);
        match fault {
            Some(Fault::BreakAfter(bytes)) => answer.sent = bytes.min(answer.body.len()),
            Some(Fault::Held(gate)) => answer.gate = Some(gate),
            Some(Fault::Body(body)) => answer = Answer::new(200, String::new(), body.as_bytes().to_vec()),
            Some(Fault::Etag(etag)) => answer.headers = format!("ETag: {etag}\r\n"),
            _ => {}
        }
        answer
    }

    fn route(&self, port: u16, url: &str, range: Option<usize>) -> Answer {
        let missing = |code: &str| Answer::new(404, format!("X-Error-Code: {code}\r\n"), Vec::new());
        if let Some(path) = url.strip_prefix("/old/name/") {
            return Answer::new(307, format!("Location: /{NAME}/{path}\r\n"), Vec::new());
        }
        if let Some(path) = url.strip_prefix("/api/models/") {
            let Some((name, revision)) = path.split_once("/revision/") else {
                return missing("RepoNotFound");
            };
            if name != NAME && name != "old/name" {
                return missing("RepoNotFound");
            }
            if !["main", "refs%2Fpr%2F1", &self.commit].contains(&revision) {
                return missing("RevisionNotFound");
            }
            let files: Vec<String> =
                self.files.keys().map(|file| format!("{{\"rfilename\": \"{file}\"}}")).collect();
            let body = format!("{{\"sha\": \"{}\", \"siblings\": [{}]}}", self.commit, files.join(","));
            return Answer::new(200, String::new(), body.into_bytes());
        }
        if let Some(wanted) = url.strip_prefix("/cdn/") {
            return match self.files.values().find(|contents| etag(contents) == wanted) {
                Some(contents) => part(contents, range, String::new()),
                None => Answer::new(404, String::new(), Vec::new()),
            };
        }
        let file = url.strip_prefix(&format!("/{NAME}/resolve/{}/", self.commit));
        let Some(contents) = file.and_then(|file| self.files.get(file)) else {
            return missing("EntryNotFound");
        };
        let (etag, commit) = (etag(contents), &self.commit);
        if url.ends_with(".safetensors") {
            let (size, place) = (contents.len(), format!("http://localhost:{port}/cdn/{etag}"));
            let headers = format!(
                "X-Repo-Commit: {commit}\r\nX-Linked-ETag: \"{etag}\"\r\nX-Linked-Size: {size}\r\nLocation: {place}\r\n"
            );
            return Answer::new(302, headers, Vec::new());
        }
        part(contents, range, format!("X-Repo-Commit: {commit}\r\nETag: W/\"{etag}\"\r\n"))
    }
}

/// A file from `range` on.
fn part(contents: &[u8], range: Option<usize>, headers: String) -> Answer {
    match range {
        None => Answer::new(200, headers, contents.to_vec()),
        Some(from) if from >= contents.len() => Answer::new(416, headers, Vec::new()),
        Some(from) => {
            let (last, len) = (contents.len() - 1, contents.len());
            let headers = format!("{headers}Content-Range: bytes {from}-{last}/{len}\r\n");
            Answer::new(206, headers, contents[from..].to_vec())
        }
    }
}

/// What names a file's contents.
pub fn etag(contents: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    contents.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
