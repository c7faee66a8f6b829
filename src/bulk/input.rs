//! The request lines, as they are read: numbered, fingerprinted, whatever the file is made of.
//!
//! ```text
//!   file, FIFO, stdin ──> gzip or zstd? told by the first bytes ──> line 1, 2, 3, … and each one's fingerprint
//! ```
//!
//! A line is identified by its number and its fingerprint, so that a result can say which line it is of. White space around
//! a line, a BOM before the first and the way in which lines end do not change the fingerprint. Blank lines are
//! numbered and skipped.
//!
//! Invariant: of a line no more than the limit and a buffer are held.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use flate2::bufread::MultiGzDecoder;
use memchr::memchr;
use twox_hash::XxHash3_64;

use super::place::{Identity, PAUSE, Place, standard};
use crate::lines;

const BUFFER: usize = 1 << 18;

/// An input, opened as far as that can't block.
pub(super) struct Source {
    place: Place,
    /// A regular file; what is none is opened by who reads it, since opening a FIFO waits for its writer.
    file: Option<File>,
    /// What it is, to tell that the output is not the same.
    pub(super) identity: Option<Identity>,
    /// Bytes, where it is a regular file.
    pub(super) length: Option<u64>,
}

impl Source {
    pub(super) fn open(place: &Place) -> io::Result<Self> {
        let metadata = match place {
            Place::Standard => standard(io::stdin())?.metadata()?,
            Place::Path(path) => fs::metadata(path)?,
        };
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let mut source =
            Source { place: place.clone(), file: None, identity: Identity::of_data(&metadata), length: None };
        if let (Place::Path(path), true) = (place, metadata.is_file()) {
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            source.identity = Identity::of_data(&metadata);
            source.length = Some(metadata.len());
            source.file = Some(file);
        }
        Ok(source)
    }

    /// Its lines from the first on, of a file that can be read more than once.
    pub(super) fn reread(&self, max_line_bytes: usize) -> io::Result<Option<Lines>> {
        match (&self.file, &self.place) {
            (Some(_), Place::Path(path)) => Lines::new(File::open(path)?, max_line_bytes).map(Some),
            _ => Ok(None),
        }
    }

    /// Its lines. May block, as reading them may.
    pub(super) fn lines(self, max_line_bytes: usize, position: Arc<AtomicU64>) -> io::Result<Lines> {
        let file = match (self.file, &self.place) {
            (Some(file), _) => file,
            (None, Place::Standard) => standard(io::stdin())?,
            (None, Place::Path(path)) => File::open(path)?,
        };
        Lines::new(Positioned { file, position }, max_line_bytes)
    }
}

/// Counts the bytes taken from a file.
struct Positioned {
    file: File,
    position: Arc<AtomicU64>,
}

impl Read for Positioned {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.file.read(buffer) {
                Ok(read) => {
                    self.position.fetch_add(read as u64, Relaxed);
                    return Ok(read);
                }
                // Another process made the descriptor non-blocking, for both.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(PAUSE),
                Err(error) => return Err(error),
            }
        }
    }
}

/// A line that is not blank.
pub(super) struct Line<'a> {
    /// From 1; blank lines count.
    pub(super) number: u64,
    /// Of what it says.
    pub(super) fingerprint: u64,
    /// Its bytes; `None` if there are more than the limit.
    pub(super) text: Option<&'a [u8]>,
}

/// Lines of an input, one by one.
pub(super) struct Lines {
    reader: Box<dyn BufRead + Send>,
    max_line_bytes: usize,
    number: u64,
    line: Vec<u8>,
}

impl Lines {
    fn new(file: impl Read + Send + 'static, max_line_bytes: usize) -> io::Result<Self> {
        let reader = decoded(BufReader::with_capacity(BUFFER, file))?;
        Ok(Lines { reader, max_line_bytes, number: 0, line: Vec::new() })
    }

    /// The next line that is not blank.
    pub(super) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        loop {
            let Some(whole) = self.read_line()? else { return Ok(None) };
            self.number += 1;
            if !(whole && lines::is_blank(&self.line)) {
                let fingerprint = fingerprint(&self.line);
                let text = whole.then_some(self.line.as_slice());
                return Ok(Some(Line { number: self.number, fingerprint, text }));
            }
        }
    }

    /// The number of the line read last.
    pub(super) fn last(&self) -> u64 {
        self.number
    }

    /// Reads a line without its end: `None` at the end of the input, false if it is cut off at the limit.
    fn read_line(&mut self) -> io::Result<Option<bool>> {
        self.line.clear();
        self.line.shrink_to(BUFFER);
        let (mut any, mut whole) = (false, true);
        loop {
            let available = match self.reader.fill_buf() {
                Ok(available) => available,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            if available.is_empty() {
                return Ok(any.then_some(whole));
            }
            any = true;
            let end = memchr(b'\n', available);
            let part = &available[..end.unwrap_or(available.len())];
            let taken = part.len().min(self.max_line_bytes - self.line.len());
            whole &= taken == part.len();
            self.line.extend_from_slice(&part[..taken]);
            let used = part.len() + usize::from(end.is_some());
            self.reader.consume(used);
            if end.is_some() {
                return Ok(Some(whole));
            }
        }
    }
}

fn fingerprint(line: &[u8]) -> u64 {
    let line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    XxHash3_64::oneshot(line.trim_ascii())
}

/// What the first bytes of an input tell.
#[derive(Clone, Copy)]
enum Kind {
    Gzip,
    Zstd,
    /// Not for us; what it is and what makes it readable.
    Foreign(&'static str, &'static str),
}

const KINDS: [(&[u8], Kind); 7] = [
    (b"\x1f\x8b", Kind::Gzip),
    (b"\x28\xb5\x2f\xfd", Kind::Zstd),
    (b"\xff\xfe", Kind::Foreign("UTF-16", "iconv -f UTF-16 -t UTF-8")),
    (b"\xfe\xff", Kind::Foreign("UTF-16", "iconv -f UTF-16 -t UTF-8")),
    (b"\xfd7zXZ\0", Kind::Foreign("compressed by xz", "xz -dc")),
    (b"BZh", Kind::Foreign("compressed by bzip2", "bzip2 -dc")),
    (b"PK\x03\x04", Kind::Foreign("a zip archive", "unzip -p")),
];

/// The text of an input, compressed or not. No more is read ahead than is needed to tell: a writer may wait for the
/// result of a very short line.
fn decoded(mut reader: impl BufRead + Send + 'static) -> io::Result<Box<dyn BufRead + Send>> {
    let mut head = Vec::new();
    let kind = loop {
        let mut candidates = KINDS.iter().filter(|(magic, _)| magic.starts_with(&head));
        match candidates.next() {
            None => break None,
            Some((magic, kind)) if *magic == head.as_slice() => break Some(*kind),
            Some(_) => {}
        }
        let mut byte = [0];
        match reader.read(&mut byte) {
            Ok(0) => break None,
            Ok(_) => head.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    let whole = Cursor::new(head).chain(reader);
    Ok(match kind {
        None => Box::new(whole),
        Some(Kind::Gzip) => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(whole))),
        Some(Kind::Zstd) => {
            let mut decoder = zstd::Decoder::with_buffer(whole)?;
            decoder.window_log_max(31)?;
            Box::new(BufReader::with_capacity(BUFFER, decoder))
        }
        Some(Kind::Foreign(what, command)) => {
            return Err(io::Error::other(format!(
                "it is {what}; pipe it in: {command} FILE | generate --input - …"
            )));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8], max: usize) -> Vec<(u64, u64, Option<Vec<u8>>)> {
        let mut lines = Lines::new(Cursor::new(bytes.to_vec()), max).unwrap();
        let mut all = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            all.push((line.number, line.fingerprint, line.text.map(<[u8]>::to_vec)));
        }
        all
    }

    #[test]
    fn line_ends_blanks_and_a_bom_change_numbers_alone() {
        let plain = lines(b"{1}\n{2}\n\n{3}", 100);
        assert_eq!(plain.iter().map(|line| line.0).collect::<Vec<_>>(), [1, 2, 4]);
        let windows = lines("\u{feff}{1}\r\n  {2}\t\r\n\r\n{3}\r\n".as_bytes(), 100);
        let identities = |lines: &[(u64, u64, _)]| lines.iter().map(|l| (l.0, l.1)).collect::<Vec<_>>();
        assert_eq!(identities(&plain), identities(&windows));
        assert_eq!(lines("\u{feff}\n".as_bytes(), 100), []);
        assert_eq!(lines(b"", 100), []);
    }

    #[test]
    fn a_line_beyond_the_limit_is_told_and_the_next_is_whole() {
        let long = [b"x".repeat(1 << 20), b"\nshort\n".to_vec(), b"y".repeat(9)].concat();
        let read = lines(&long, 8);
        assert_eq!(
            read.iter().map(|line| line.2.as_deref()).collect::<Vec<_>>(),
            [None, Some(&b"short"[..]), None]
        );
        assert_eq!(lines(b"12345678", 8)[0].2.as_deref(), Some(&b"12345678"[..]));
    }

    #[test]
    fn compressed_inputs_are_told_by_their_first_bytes_members_and_frames_in_a_row() {
        use std::io::Write;
        let gzip = |text: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        };
        let zstd = |text: &[u8]| zstd::encode_all(text, 3).unwrap();
        let expected = lines(b"one\ntwo\nthree\n", 100);
        assert_eq!(lines(&[gzip(b"one\ntw"), gzip(b"o\nthree\n")].concat(), 100), expected);
        assert_eq!(lines(&[zstd(b"one\ntw"), zstd(b"o\nthree\n")].concat(), 100), expected);
        // A cut-off one is an error, not an end.
        let whole = gzip(b"one\ntwo\nthree\n");
        let mut cut = Lines::new(Cursor::new(whole[..whole.len() - 5].to_vec()), 100).unwrap();
        let ended =
            std::iter::from_fn(|| cut.next().map(|line| line.map(|_| ())).transpose()).find(Result::is_err);
        assert!(ended.is_some());
    }

    #[test]
    fn what_is_no_text_is_named() {
        for (bytes, what) in [(&b"\xff\xfe{\0"[..], "UTF-16"), (b"BZh91", "bzip2"), (b"\xfd7zXZ\0\0", "xz")] {
            let error = Lines::new(Cursor::new(bytes.to_vec()), 100).err().unwrap().to_string();
            assert!(error.contains(what), "{error}");
        }
        assert_eq!(lines(b"B\n", 100).len(), 1);
        assert_eq!(lines(b"\x1f", 100).len(), 1);
    }
}
