//! How an output is compressed: nothing, gzip members, or zstd frames, each of whole lines.
//!
//! ```text
//!   lines ── a chunk of them ──> member │ member │ member │ …      any reader of gzip or zstd sees one text
//! ```
//!
//! A member is complete in itself, so what is on the disk can be read up to its last whole member, and more can be
//! appended at any time.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;

use flate2::bufread::GzDecoder;
use flate2::write::GzEncoder;

/// Told by an output's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    /// `.gz`
    Gzip,
    /// `.zst`
    Zstd,
}

impl Compression {
    pub(super) fn of(path: &Path) -> Self {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some(gz) if gz.eq_ignore_ascii_case("gz") => Compression::Gzip,
            Some(zst) if zst.eq_ignore_ascii_case("zst") => Compression::Zstd,
            _ => Compression::None,
        }
    }

    /// A chunk as a member, or as it is.
    pub(super) fn encode(self, chunk: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Compression::None => Ok(chunk.to_vec()),
            Compression::Gzip => {
                let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(chunk)?;
                encoder.finish()
            }
            Compression::Zstd => {
                let mut encoder = zstd::Encoder::new(Vec::new(), zstd::DEFAULT_COMPRESSION_LEVEL)?;
                encoder.include_checksum(true)?;
                encoder.write_all(chunk)?;
                encoder.finish()
            }
        }
    }
}

/// Reads the text of an output, and knows where in the file its members end.
pub(super) struct Members {
    state: State,
    compression: Compression,
    /// Bytes of text so far.
    decoded: u64,
    /// Where members ended: in the text, and in the file.
    ends: VecDeque<(u64, u64)>,
}

enum State {
    Between(Counted),
    Gzip(Box<GzDecoder<Counted>>),
    Zstd(zstd::Decoder<'static, Counted>),
    /// A member could not be read to its end.
    Torn,
}

impl Members {
    pub(super) fn new(file: File, compression: Compression) -> Self {
        let raw = Counted { inner: BufReader::with_capacity(1 << 18, file), position: 0 };
        Members { state: State::Between(raw), compression, decoded: 0, ends: VecDeque::new() }
    }

    /// How far the file can be kept if the text is kept up to `line_end`, if a member ends there. Asked with growing positions.
    pub(super) fn member_end(&mut self, line_end: u64) -> Option<u64> {
        if self.compression == Compression::None {
            return Some(line_end);
        }
        while self.ends.front().is_some_and(|(text, _)| *text < line_end) {
            self.ends.pop_front();
        }
        // An empty member ends where the one before it did.
        let mut found = None;
        while let Some((text, file)) = self.ends.front().copied()
            && text == line_end
        {
            found = Some(file);
            self.ends.pop_front();
        }
        found
    }

    /// Reads from the member at hand; at its end, none is left.
    fn read_member(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.state {
            State::Between(raw) if self.compression == Compression::None => raw.read(buffer),
            State::Gzip(decoder) => decoder.read(buffer),
            State::Zstd(decoder) => decoder.read(buffer),
            State::Between(_) | State::Torn => Ok(0),
        }
    }

    /// Opens the next member; false at the end of the file.
    fn open_member(&mut self) -> io::Result<bool> {
        let mut raw = match std::mem::replace(&mut self.state, State::Torn) {
            State::Between(raw) => raw,
            State::Gzip(decoder) => self.ended((*decoder).into_inner()),
            State::Zstd(decoder) => self.ended(decoder.finish()),
            State::Torn => return Ok(false),
        };
        let more = self.compression != Compression::None && !raw.fill_buf()?.is_empty();
        self.state = match self.compression {
            Compression::Gzip if more => State::Gzip(Box::new(GzDecoder::new(raw))),
            Compression::Zstd if more => {
                let mut decoder = zstd::Decoder::with_buffer(raw)?.single_frame();
                decoder.window_log_max(31)?;
                State::Zstd(decoder)
            }
            _ => State::Between(raw),
        };
        Ok(more)
    }

    fn ended(&mut self, raw: Counted) -> Counted {
        self.ends.push_back((self.decoded, raw.position));
        raw
    }
}

impl Read for Members {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.read_member(buffer)?;
            self.decoded += read as u64;
            if read > 0 || !self.open_member()? {
                return Ok(read);
            }
        }
    }
}

/// A buffered file that knows how much of it was taken.
struct Counted {
    inner: BufReader<File>,
    position: u64,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl BufRead for Counted {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.inner.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.inner.consume(amount);
        self.position += amount as u64;
    }
}
