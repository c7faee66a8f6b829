//! Connections: accepted, bounded in number and in time, and ended in order.
//!
//! ```text
//!   accept ── a place ──> HTTP/1.1 over a socket whose writes have a deadline ──> router
//!                 header too slow, client takes nothing for too long ──> closed
//!   told to end ──> no more accepted; idle connections close, the others after their answer, or after `drain`
//! ```

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep, timeout};

use crate::settings::Settings;

/// Bytes of a request's header, its first line included.
const HEADER_BYTES_MAX: usize = 64 << 10;
/// Fields of a request's header.
const HEADER_FIELDS_MAX: usize = 100;
/// How long to wait when the system gives no more sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until `end` is there, and then what is open until it is over or `drain` has passed. False if something
/// was cut off.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    settings: &Settings,
    end: impl Future<Output = ()>,
) -> bool {
    let places = Arc::new(Semaphore::new(settings.connections_max));
    let open = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(settings.header_timeout)
        // What a buffer takes in one read may be more than its limit: that one alone lets longer headers pass.
        .max_buf_size(HEADER_BYTES_MAX)
        .max_header_size(HEADER_BYTES_MAX)
        .max_headers(HEADER_FIELDS_MAX);
    let mut end = std::pin::pin!(end);
    loop {
        let place = tokio::select! {
            () = &mut end => break,
            place = places.clone().acquire_owned() => place,
        };
        let socket = tokio::select! {
            () = &mut end => break,
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::warn!(%error, "a connection can't be accepted");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
        };
        // A token is sent when it is there. Where that can't be had, it is sent a little later.
        let _ = socket.set_nodelay(true);
        let io = TokioIo::new(Deadline::new(socket, settings.write_timeout));
        let served = http.serve_connection(io, TowerToHyperService::new(router.clone()));
        let served = open.watch(served);
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::debug!(%error, "a connection ended");
            }
            drop(place);
        });
    }
    drop(listener);
    timeout(settings.drain, open.shutdown()).await.is_ok()
}

/// A socket whose other end must take something of what is written to it now and then.
struct Deadline {
    socket: TcpStream,
    write_timeout: Duration,
    /// Set while a write waits.
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Deadline {
    fn new(socket: TcpStream, write_timeout: Duration) -> Self {
        Deadline { socket, write_timeout, waiting: None }
    }

    /// What a write gave, or that it has waited too long.
    fn bound<T>(&mut self, task: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.waiting = None;
            return written;
        }
        let write_timeout = self.write_timeout;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(write_timeout)));
        ready!(waiting.as_mut().poll(task));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing")))
    }
}

impl AsyncRead for Deadline {
    fn poll_read(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(task, buffer)
    }
}

impl AsyncWrite for Deadline {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(task, bytes);
        self.bound(task, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(task, buffers);
        self.bound(task, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.socket).poll_flush(task);
        self.bound(task, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(task)
    }
}
