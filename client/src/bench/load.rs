//! Load on a service: requests go out when they are due, and what comes back is noted with its time.
//!
//! ```text
//!   schedule ── due ──> idle connection, or a new one ──> send
//!   poll ── ready ──> read, take events in ──> Recorder
//!     └── until the next is due, or a second
//! ```
//!
//! One thread waits for all connections at once (readiness, by mio) instead of one thread for each. A service draws the
//! tokens of a step together, so the events of all streams come together, too: a single wait finds them all, and each
//! costs one read, where threads would cost a switch each and compete for processors with the service that is measured.
//! What it takes is measured with every run ([`ClientCost`]).
//!
//! A token's time is when the wait that found its bytes returned. So how long it takes to go through the others that
//! came with it is not charged to the service; a thread that is too busy shows in its own cost.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use minisgl_hub::BadAuthorities;
use mio::{Events, Interest, Poll, Token};
use rustls::pki_types::ServerName;
use serde::Serialize;
use thiserror::Error;

use super::arrivals::Schedule;
use super::cost::{ClientCost, thread_time};
use super::prompt::{Manner, Request};
use super::recorder::{Record, Recorder};
use super::stream::{Failure, Stream};
use super::wire::Tls;
use crate::endpoint::Endpoint;
use crate::tls;

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// Connections that a wait tells of at once.
const EVENTS: usize = 1024;
/// The longest wait: how often silence is looked for.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Why no load can be put on a service.
#[derive(Debug, Error)]
pub enum LoadError {
    /// TLS is of no use.
    #[error(transparent)]
    Tls(#[from] BadAuthorities),
    /// A host that no certificate can name.
    #[error("{0} has a host that is no name of TLS's; give it as a certificate has it")]
    Host(Endpoint),
    /// Nobody there.
    #[error("{endpoint} can't be reached: {cause}; check --url, and that the service runs")]
    Unreachable {
        /// Where.
        endpoint: Endpoint,
        /// What the system says.
        cause: io::Error,
    },
    /// The system gives no way to wait for connections.
    #[error("connections can't be waited for: {0}")]
    Poll(#[from] io::Error),
}

/// What is to become of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// It goes on.
    GoOn,
    /// It ends, with what has been seen so far.
    Stop,
}

/// Whom load is put on, and how.
#[derive(Clone, Debug)]
pub struct Target {
    endpoint: Endpoint,
    address: SocketAddr,
    tls: Option<Tls>,
    /// All of a request but its length and its body.
    head: String,
    manner: Manner,
    silence: Duration,
}

/// What came of a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Loaded {
    /// What was seen of the service.
    #[serde(flatten)]
    pub record: Record,
    /// What it took to see it; `None` where the system does not tell.
    pub client: Option<ClientCost>,
}

impl Target {
    /// A service that is asked in a manner, with a key if it asks for one. A request is given up when nothing has come of
    /// it for as long as `silence`.
    ///
    /// # Errors
    /// It can't be reached, or TLS can't be had with it.
    pub fn new(
        endpoint: Endpoint,
        key: Option<&str>,
        manner: Manner,
        silence: Duration,
    ) -> Result<Self, LoadError> {
        let tls = match endpoint.is_tls() {
            false => None,
            true => {
                let name = ServerName::try_from(endpoint.host_and_port().0.to_owned());
                let name = name.map_err(|_| LoadError::Host(endpoint.clone()))?;
                Some(Tls { config: tls::of_connections()?, name })
            }
        };
        let found = TcpStream::connect(endpoint.host_and_port()).and_then(|socket| socket.peer_addr());
        let address = found.map_err(|cause| LoadError::Unreachable { endpoint: endpoint.clone(), cause })?;
        let path = endpoint.path(manner.api.name());
        let mut head = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nUser-Agent: minisgl/{}\r\nContent-Type: application/json\r\n",
            endpoint.authority(),
            env!("CARGO_PKG_VERSION")
        );
        if let Some(key) = key {
            head.push_str(&format!("Authorization: Bearer {key}\r\n"));
        }
        Ok(Target { endpoint, address, tls, head, manner, silence })
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A request as it goes out.
    fn message(&self, i: usize, request: &Request) -> Vec<u8> {
        let body = self.manner.body(i, request);
        let mut out = format!("{}Content-Length: {}\r\n\r\n", self.head, body.len()).into_bytes();
        out.extend_from_slice(&body);
        out
    }

    /// Sends all requests, each when it is due, and waits for their ends. `on_wait` is told how far the run has come, and
    /// says whether it is to go on.
    ///
    /// # Errors
    /// The system gives no way to wait. What fails of a request is counted, and is no error here.
    pub fn load(
        &self,
        requests: &[Request],
        schedule: &Schedule,
        on_wait: &mut dyn FnMut(&Recorder) -> Flow,
    ) -> Result<Loaded, LoadError> {
        let mut load = Load {
            target: self,
            requests,
            schedule,
            poll: Poll::new()?,
            streams: Vec::new(),
            idle: Vec::new(),
            next: 0,
            recorder: Recorder::default(),
            buffer: vec![0; READ_BYTES],
            start: Instant::now(),
        };
        let (cpu, start) = (thread_time(), load.start);
        load.run(on_wait)?;
        let record = load.recorder.record();
        let client = cpu.zip(thread_time()).map(|(before, after)| {
            ClientCost::new(after.saturating_sub(before), start.elapsed(), record.output_tokens)
        });
        Ok(Loaded { record, client })
    }
}

/// A run.
struct Load<'a> {
    target: &'a Target,
    requests: &'a [Request],
    schedule: &'a Schedule,
    poll: Poll,
    /// By the tokens under which the system tells of them.
    streams: Vec<Option<Stream>>,
    /// Those that carry nothing.
    idle: Vec<usize>,
    /// The request that is due next.
    next: usize,
    recorder: Recorder,
    buffer: Vec<u8>,
    start: Instant,
}

impl Load<'_> {
    fn run(&mut self, on_wait: &mut dyn FnMut(&Recorder) -> Flow) -> Result<(), LoadError> {
        let mut events = Events::with_capacity(EVENTS);
        let mut looked = Duration::ZERO;
        loop {
            self.send_due();
            if self.next == self.requests.len() && self.recorder.open() == 0 {
                return Ok(());
            }
            if on_wait(&self.recorder) == Flow::Stop {
                self.recorder.stopped(self.start.elapsed());
                return Ok(());
            }
            match self.poll.poll(&mut events, Some(self.wait())) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error.into()),
                _ => {}
            }
            let now = self.start.elapsed();
            for event in &events {
                self.ready(event.token().0, event.is_writable(), event.is_read_closed(), now);
            }
            if now > looked + WAIT_MAX {
                looked = now;
                self.give_up_silent(now);
            }
        }
    }

    /// How long nothing is due. Whole milliseconds, which is what a wait is exact to: the rest is spent in short ones.
    fn wait(&self) -> Duration {
        match self.due() {
            Some(due) => {
                let left = due.saturating_sub(self.start.elapsed()).min(WAIT_MAX);
                Duration::from_millis(left.as_millis() as u64)
            }
            None => WAIT_MAX,
        }
    }

    /// When the next request is due; `None` until another one has ended, or where there is none.
    fn due(&self) -> Option<Duration> {
        match self.schedule {
            _ if self.next == self.requests.len() => None,
            Schedule::Closed(open) => (self.recorder.open() < *open).then(|| self.start.elapsed()),
            Schedule::At(times) => times.get(self.next).copied(),
        }
    }

    fn send_due(&mut self) {
        while let Some(due) = self.due() {
            let now = self.start.elapsed();
            if due > now {
                return;
            }
            let i = self.next;
            self.next += 1;
            self.recorder.sent(i, due, now, self.requests[i].output_tokens);
            self.send(i, now);
        }
    }

    /// Sends a request on an idle connection, or a new one.
    fn send(&mut self, i: usize, now: Duration) {
        let connected = match self.idle.pop() {
            Some(slot) => Ok(slot),
            None => self.connect(),
        };
        let slot = match connected {
            Ok(slot) => slot,
            Err(failure) => return self.recorder.failed(i, &failure.kind(), &failure.to_string(), now),
        };
        let message = self.target.message(i, &self.requests[i]);
        let Some(stream) = &mut self.streams[slot] else { return };
        stream.carry(i, message, now);
        if let Err(failure) = stream.write(now) {
            self.failed(slot, &failure, now);
        }
    }

    /// Opens a connection in a slot of its own.
    fn connect(&mut self) -> Result<usize, Failure> {
        let mut stream = Stream::connect(self.target.address, self.target.tls.as_ref())?;
        let free = self.streams.iter().position(Option::is_none);
        let slot = free.unwrap_or(self.streams.len());
        let both = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(&mut stream.wire.socket, Token(slot), both)
            .map_err(Failure::Connect)?;
        // Requests are written whole, so there is nothing to wait for.
        let _ = stream.wire.socket.set_nodelay(true);
        match free {
            Some(slot) => self.streams[slot] = Some(stream),
            None => self.streams.push(Some(stream)),
        }
        Ok(slot)
    }

    /// A connection can be written to, or has something to be read.
    fn ready(&mut self, slot: usize, writable: bool, closing: bool, now: Duration) {
        let Some(stream) = self.streams.get_mut(slot).and_then(Option::as_mut) else { return };
        let Some(i) = stream.request else {
            // One that carries nothing has nothing to say: the service closes it.
            if closing {
                self.streams[slot] = None;
                self.idle.retain(|idle| *idle != slot);
            }
            return;
        };
        let written = if writable { stream.write(now) } else { Ok(()) };
        match written.and_then(|()| stream.read(&mut self.buffer, closing, now)) {
            Err(failure) => self.failed(slot, &failure, now),
            Ok(news) => {
                self.recorder.output(i, news.tokens, now);
                if news.finished {
                    self.recorder.finished(i, stream.usage(), now);
                    self.release(slot);
                }
            }
        }
    }

    /// A request failed with its connection, unless that had been closed before.
    fn failed(&mut self, slot: usize, failure: &Failure, now: Duration) {
        let Some(stream) = self.streams[slot].take() else { return };
        let Some(i) = stream.request else { return };
        match stream.missed(failure) {
            true => self.send(i, now),
            false => self.recorder.failed(i, &failure.kind(), &failure.to_string(), now),
        }
    }

    /// A connection has carried its request.
    fn release(&mut self, slot: usize) {
        let Some(stream) = &mut self.streams[slot] else { return };
        stream.request = None;
        match stream.stays() {
            true => self.idle.push(slot),
            false => self.streams[slot] = None,
        }
    }

    fn give_up_silent(&mut self, now: Duration) {
        let silence = self.target.silence;
        for slot in 0..self.streams.len() {
            let silent =
                |stream: &Stream| stream.request.is_some() && now.saturating_sub(stream.heard) > silence;
            if self.streams[slot].as_ref().is_some_and(silent) {
                self.failed(slot, &Failure::Silent(silence), now);
            }
        }
    }
}
