//! What a request's bytes go over: a socket, or TLS over one.
//!
//! ```text
//!   write ── plain ───────────────────────────────> socket
//!         └─ TLS: sealed, in memory ── flush ─────> socket
//!   read  <── opened <── as much as has come <───── socket
//! ```
//!
//! The socket does not block. What TLS itself has to say goes out with whatever is written or read next.
//!
//! Invariant: a read that would block has taken all that the socket had.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;

use mio::net::TcpStream;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

/// TLS with a service: whom to trust, and the name that its certificate must have.
#[derive(Clone, Debug)]
pub struct Tls {
    pub config: Arc<ClientConfig>,
    pub name: ServerName<'static>,
}

/// See the module.
pub struct Wire {
    pub socket: TcpStream,
    tls: Option<Box<ClientConnection>>,
}

impl Wire {
    /// Begins to connect.
    ///
    /// # Errors
    /// The system refuses.
    pub fn connect(address: SocketAddr, tls: Option<&Tls>) -> io::Result<Self> {
        let socket = TcpStream::connect(address)?;
        let session = |Tls { config, name }: &Tls| {
            let mut session = ClientConnection::new(config.clone(), name.clone())?;
            // A request lies in memory anyway, and waits there for the handshake.
            session.set_buffer_limit(None);
            Ok(Box::new(session))
        };
        let tls = tls.map(session).transpose().map_err(|error: rustls::Error| io::Error::other(error))?;
        Ok(Wire { socket, tls })
    }

    /// May a read that gave less than was asked for have left something?
    pub fn reads_in_pieces(&self) -> bool {
        self.tls.is_some()
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Wire { socket, tls } = self;
        let Some(tls) = tls else { return socket.read(buffer) };
        loop {
            match tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Services close without TLS's own end; whether the answer is whole is seen there.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                read => return read,
            }
            tls.read_tls(socket)?;
            let opened = tls.process_new_packets();
            // What it has to say of it, be it why it ends.
            let sent = send(tls, socket);
            opened.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            sent?;
        }
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Wire { socket, tls } = self;
        match tls {
            None => socket.write(bytes),
            Some(tls) => tls.writer().write(bytes),
        }
    }

    /// Sends what the socket takes now of what was sealed; the rest goes out with the next call.
    fn flush(&mut self) -> io::Result<()> {
        let Wire { socket, tls } = self;
        tls.as_mut().map_or(Ok(()), |tls| send(tls, socket))
    }
}

fn send(tls: &mut ClientConnection, socket: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        match tls.write_tls(socket) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Not connected yet.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
