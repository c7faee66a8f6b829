//! Server-sent events out of bytes that come cut anywhere.
//!
//! ```text
//!   data: {"choices": …}\n      a line; of an event's lines only those of `data` count here
//!   \n                          an empty line ends the event
//!   : ping\n                    a comment
//! ```
//!
//! As the HTML standard defines them (section "Server-sent events"): lines end with LF, CR LF or CR, and an event with several
//! lines of `data` has them joined by LF. An event that no empty line has ended is none.
//!
//! Invariant: how the bytes are cut changes no event.

use memchr::memchr2;
use thiserror::Error;

/// Bytes of an event at most.
const EVENT_BYTES_MAX: usize = 16 << 20;

/// An event that never ends.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("an event of its stream is longer than {EVENT_BYTES_MAX} bytes")]
pub struct EventTooLong;

/// Reads a stream of events.
#[derive(Debug, Default)]
pub struct EventReader {
    /// The line so far.
    line: Vec<u8>,
    /// The event's data so far; `None` before its first line of data.
    data: Option<Vec<u8>>,
    /// The last byte was a CR, so an LF belongs to it.
    after_cr: bool,
}

impl EventReader {
    /// Takes the stream's next bytes, and hands on the data of each event that they end.
    ///
    /// # Errors
    /// An event longer than 16 MiB, or an error of `take`. The stream is of no use then.
    pub fn push<E: From<EventTooLong>>(
        &mut self,
        mut bytes: &[u8],
        take: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(first) = bytes.first() {
            if std::mem::take(&mut self.after_cr) && *first == b'\n' {
                bytes = &bytes[1..];
                continue;
            }
            let end = memchr2(b'\n', b'\r', bytes);
            let (line, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
            if self.line.len() + line.len() + self.data.as_ref().map_or(0, Vec::len) > EVENT_BYTES_MAX {
                return Err(EventTooLong.into());
            }
            self.line.extend_from_slice(line);
            let Some(end) = rest.first() else { return Ok(()) };
            self.after_cr = *end == b'\r';
            bytes = &rest[1..];
            if let Some(data) = self.end_line() {
                take(&data)?;
            }
        }
        Ok(())
    }

    /// Takes a whole line in; gives the event's data if it has ended.
    fn end_line(&mut self) -> Option<Vec<u8>> {
        if self.line.is_empty() {
            return self.data.take();
        }
        if let Some(value) = data_of(&self.line) {
            match &mut self.data {
                Some(data) => {
                    data.push(b'\n');
                    data.extend_from_slice(value);
                }
                None => self.data = Some(value.to_vec()),
            }
        }
        self.line.clear();
        None
    }
}

/// The value of a line of `data`.
fn data_of(line: &[u8]) -> Option<&[u8]> {
    match line.strip_prefix(b"data")? {
        [] => Some(&[]),
        [b':', b' ', value @ ..] | [b':', value @ ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The events of a stream that comes in pieces of these lengths, over and over.
    fn events(stream: &[u8], cuts: &[usize]) -> Result<Vec<String>, EventTooLong> {
        let (mut reader, mut found, mut rest) = (EventReader::default(), Vec::new(), stream);
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            reader.push(piece, &mut |data| {
                found.push(String::from_utf8_lossy(data).into_owned());
                Ok::<(), EventTooLong>(())
            })?;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        Ok(found)
    }

    #[test]
    fn events_end_at_empty_lines_and_only_data_counts() {
        for (stream, expected) in [
            ("data: a\n\ndata:b\n\n", vec!["a", "b"]),
            ("data: a\r\n\r\ndata: b\r\rdata: c\n\n", vec!["a", "b", "c"]),
            (": ping\n\nevent: x\nid: 1\ndata: a\nretry: 3\ndata:  b\n\n", vec!["a\n b"]),
            ("data\n\ndata:\n\n\n\n", vec!["", ""]),
            ("database: x\n\ndata: never ended\n", vec![]),
        ] {
            assert_eq!(events(stream.as_bytes(), &[usize::MAX]).unwrap(), expected, "{stream:?}");
            assert_eq!(events(stream.as_bytes(), &[1]).unwrap(), expected, "{stream:?}, byte by byte");
        }
    }

    #[test]
    fn an_event_that_never_ends_is_an_error_and_not_all_memory() {
        let long = vec![b'x'; EVENT_BYTES_MAX + 1];
        assert_eq!(events(&long, &[1 << 16]), Err(EventTooLong));
        let lines = b"data: 0123456789\n".repeat(EVENT_BYTES_MAX / 10);
        assert_eq!(events(&lines, &[1 << 16]), Err(EventTooLong));
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_changes_no_event(
            stream in prop::collection::vec(prop::sample::select(b"data: \n\r:x".to_vec()), 0..200),
            cuts in prop::collection::vec(1_usize..7, 1..5),
        ) {
            prop_assert_eq!(events(&stream, &cuts), events(&stream, &[usize::MAX]));
        }
    }
}
