//! Answers of HTTP/1.1 out of bytes that come cut anywhere.
//!
//! ```text
//!   Head ──┬─ Content-Length: n ──> Sized(n left) ──────────────────────────────┐
//!          ├─ Transfer-Encoding: chunked ──> Size ──> Data ──> DataEnd ─┐       ├──> Over
//!          │                                 ^ └─ 0 ──> Trailers ───────┼───────┤
//!          │                                 └──────────────────────────┘       │
//!          └─ neither ──> UntilClosed ── the other end closes ──────────────────┘
//! ```
//!
//! Invariant: how the bytes are cut changes nothing.

use httparse::{EMPTY_HEADER, ParserConfig, Response, Status, parse_chunk_size};
use thiserror::Error;

/// Bytes of a head, and of a line of the chunked coding, at most.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Header fields of a head at most.
const FIELDS_MAX: usize = 128;

/// Why bytes are no answer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BadAnswer {
    /// The head.
    #[error("its answer is no HTTP/1.1: {0}")]
    Head(String),
    /// The chunked coding.
    #[error("its answer's chunks are damaged")]
    Chunks,
    /// Too much of what has a bound.
    #[error("its answer's head is longer than {HEAD_BYTES_MAX} bytes")]
    HeadTooLong,
    /// The other end closed.
    #[error("the connection was closed in the middle of the answer")]
    Closed,
    /// More than one answer.
    #[error("bytes came behind the answer's end")]
    Beyond,
}

/// Reads one answer.
#[derive(Debug, Default)]
pub struct AnswerReader {
    state: State,
    /// The head, or a line of the chunked coding, as far as it has come.
    line: Vec<u8>,
    status: Option<u16>,
    keep_alive: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Head,
    Sized(u64),
    /// A chunk's size comes next.
    Size,
    Data(u64),
    /// The end of a chunk's line comes next.
    DataEnd,
    Trailers,
    UntilClosed,
    Over,
}

impl AnswerReader {
    /// Takes the answer's next bytes, and hands on those of its body.
    ///
    /// # Errors
    /// What is no answer, or an error of `take`. The connection is of no use then.
    pub fn push<E: From<BadAnswer>>(
        &mut self,
        mut bytes: &[u8],
        take: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !bytes.is_empty() {
            bytes = match self.state {
                State::Head => self.head(bytes)?,
                State::Sized(left) | State::Data(left) => {
                    let (body, rest) =
                        bytes.split_at(bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
                    let left = left - body.len() as u64;
                    self.state = match (self.state, left) {
                        (State::Sized(_), 0) => State::Over,
                        (State::Sized(_), left) => State::Sized(left),
                        (_, 0) => State::DataEnd,
                        (_, left) => State::Data(left),
                    };
                    take(body)?;
                    rest
                }
                State::UntilClosed => {
                    take(bytes)?;
                    &[]
                }
                State::Size | State::DataEnd | State::Trailers => self.line(bytes)?,
                State::Over => return Err(BadAnswer::Beyond.into()),
            };
        }
        Ok(())
    }

    /// The other end has closed the connection.
    ///
    /// # Errors
    /// The answer is not whole.
    pub fn close(&mut self) -> Result<(), BadAnswer> {
        match self.state {
            State::UntilClosed => self.state = State::Over,
            State::Over => {}
            _ => return Err(BadAnswer::Closed),
        }
        self.keep_alive = false;
        Ok(())
    }

    /// The status; `None` until the head has come.
    pub fn status(&self) -> Option<u16> {
        self.status
    }

    /// Has all of it come?
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Has nothing of it come?
    pub fn is_untouched(&self) -> bool {
        self.state == State::Head && self.line.is_empty()
    }

    /// May the connection take another request, once this answer is over?
    pub fn keeps_alive(&self) -> bool {
        self.keep_alive
    }

    /// Takes bytes of the head in; gives those behind it.
    fn head<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], BadAnswer> {
        let before = self.line.len();
        self.line.extend_from_slice(&bytes[..bytes.len().min(HEAD_BYTES_MAX - before)]);
        let mut fields = [EMPTY_HEADER; FIELDS_MAX];
        let mut head = Response::new(&mut fields);
        let parsed = ParserConfig::default().parse_response(&mut head, &self.line);
        let Status::Complete(len) = parsed.map_err(|error| BadAnswer::Head(error.to_string()))? else {
            return if self.line.len() < HEAD_BYTES_MAX { Ok(&[]) } else { Err(BadAnswer::HeadTooLong) };
        };
        let status = head.code.unwrap_or(0);
        let (body, keep_alive) = body_of(&head)?;
        self.line.clear();
        // One that only says that the answer comes is passed over.
        if !(100..200).contains(&status) {
            (self.status, self.state, self.keep_alive) = (Some(status), body, keep_alive);
        }
        Ok(&bytes[len - before..])
    }

    /// Takes bytes of a line of the chunked coding in; gives those behind it.
    fn line<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], BadAnswer> {
        let end = memchr::memchr(b'\n', bytes).map(|at| at + 1);
        let (line, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
        if self.line.len() + line.len() > HEAD_BYTES_MAX {
            return Err(BadAnswer::Chunks);
        }
        self.line.extend_from_slice(line);
        if end.is_none() {
            return Ok(rest);
        }
        let is_empty = self.line == b"\r\n" || self.line == b"\n";
        self.state = match self.state {
            State::Size => match parse_chunk_size(&self.line) {
                Ok(Status::Complete((_, 0))) => State::Trailers,
                Ok(Status::Complete((_, size))) => State::Data(size),
                _ => return Err(BadAnswer::Chunks),
            },
            State::DataEnd if is_empty => State::Size,
            State::Trailers if is_empty => State::Over,
            State::Trailers => State::Trailers,
            _ => return Err(BadAnswer::Chunks),
        };
        self.line.clear();
        Ok(rest)
    }
}

/// How the body is coded, and whether the connection stays.
fn body_of(head: &Response<'_, '_>) -> Result<(State, bool), BadAnswer> {
    let mut keep_alive = head.version == Some(1);
    let (mut length, mut chunked) = (None, false);
    for field in head.headers.iter() {
        let value = String::from_utf8_lossy(field.value).trim().to_ascii_lowercase();
        match field.name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let bad = || BadAnswer::Head(format!("a Content-Length of {value:?}"));
                length = Some(value.parse().map_err(|_| bad())?);
            }
            "transfer-encoding" => chunked = value == "chunked",
            "connection" => keep_alive = keep_alive && value != "close",
            _ => {}
        }
    }
    Ok(match (chunked, length, head.code) {
        (_, _, Some(204 | 304)) => (State::Over, keep_alive),
        (true, ..) => (State::Size, keep_alive),
        (false, Some(0), _) => (State::Over, keep_alive),
        (false, Some(length), _) => (State::Sized(length), keep_alive),
        (false, None, _) => (State::UntilClosed, false),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZED: &str = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nEtag: z\r\n\r\n";
    const CLOSED: &str = "HTTP/1.0 404 Not Found\r\n\r\nhello";
    const CONTINUED: &str = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello";

    fn read(bytes: &[u8], cuts: &[usize]) -> Result<(AnswerReader, Vec<u8>), BadAnswer> {
        let (mut reader, mut body, mut rest) = (AnswerReader::default(), Vec::new(), bytes);
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            reader.push(piece, &mut |part| {
                body.extend_from_slice(part);
                Ok::<(), BadAnswer>(())
            })?;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        Ok((reader, body))
    }

    #[test]
    fn bodies_are_read_however_they_are_coded_and_cut() {
        for (answer, status, keeps_alive) in
            [(SIZED, 200, true), (CHUNKED, 200, true), (CLOSED, 404, false), (CONTINUED, 200, true)]
        {
            for cut in 1..20 {
                let (mut reader, body) = read(answer.as_bytes(), &[cut]).unwrap();
                assert_eq!((reader.status(), body.as_slice()), (Some(status), &b"hello"[..]), "{answer}");
                assert_eq!(reader.keeps_alive(), keeps_alive);
                assert_eq!(reader.is_over(), answer != CLOSED);
                assert_eq!(reader.close(), Ok(()));
                assert!(reader.is_over() && !reader.keeps_alive());
            }
        }
    }

    #[test]
    fn an_answer_that_is_cut_off_is_known_as_such() {
        for answer in [SIZED, CHUNKED] {
            for end in 0..answer.len() {
                let (mut reader, _) = read(&answer.as_bytes()[..end], &[usize::MAX]).unwrap();
                assert_eq!(reader.is_untouched(), end == 0);
                assert_eq!(reader.close(), Err(BadAnswer::Closed), "{end} bytes of {answer}");
            }
        }
    }

    #[test]
    fn what_is_no_answer_is_an_error_that_says_so() {
        let long = format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(HEAD_BYTES_MAX));
        for (answer, expected) in [
            ("SSH-2.0-OpenSSH\r\n\r\n", "no HTTP/1.1"),
            ("HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "many"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "chunks are damaged"),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", "chunks are damaged"),
            ("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab", "behind the answer's end"),
            (long.as_str(), "longer than"),
        ] {
            let error = read(answer.as_bytes(), &[usize::MAX]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_bad_to_be_refused_the_same_way_however_they_are_cut(
            start in prop::sample::select(vec![SIZED, CHUNKED, CLOSED, CONTINUED, ""]),
            at in 0_usize..100,
            noise in prop::collection::vec(any::<u8>(), 0..20),
            cuts in prop::collection::vec(1_usize..9, 1..4),
        ) {
            let mut bytes = start.as_bytes().to_vec();
            let at = at.min(bytes.len());
            bytes.splice(at..at, noise);
            let whole = read(&bytes, &[usize::MAX]).map(|(reader, body)| (reader.status(), reader.is_over(), body));
            let cut = read(&bytes, &cuts).map(|(reader, body)| (reader.status(), reader.is_over(), body));
            prop_assert_eq!(whole.is_ok(), cut.is_ok());
            if whole.is_ok() {
                prop_assert_eq!(whole, cut);
            }
        }
    }
}
