//! What an earlier run left in the output: which input lines have a good result, and how much of the file is sound.
//!
//! ```text
//!   good 1 │ good 2 │ error 3 │ good 4 │ good 5 │ go              a run that was killed
//!     └────────┴────────┬──────────┴────────┘     └─ torn: cut
//!                 results by line: 1 2 4 5 are done, 3 runs again and its line is dropped
//! ```
//!
//! Invariant: a line is never called done on the word of a torn or failed result.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use super::compression::{Compression, Members};
use super::input::Lines;
use crate::lines::{self, Origin};

/// The good results of an output, by input line.
#[derive(Debug, Default)]
pub(super) struct Earlier {
    /// Sorted by line, which no two share.
    good: Vec<Good>,
    /// Of `good`, the next that a line can have.
    next: usize,
    /// Whole result lines, good or not.
    pub(super) results: u64,
    /// Where the last whole line, and the last whole member, ends.
    pub(super) whole_end: u64,
    /// Are there whole lines behind `whole_end`, in a member that is cut off?
    pub(super) rescued: bool,
}

#[derive(Clone, Copy, Debug)]
struct Good {
    line: u64,
    fingerprint: u64,
    /// Its place among the output's lines.
    place: u64,
}

/// What an output has of an input line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No good result.
    Nothing,
    /// A good result of this line.
    Result,
    /// A good result of another line that had this number.
    Stranger,
}

/// Why an output can't be gone on from.
#[derive(Debug)]
pub(super) enum Unreadable {
    Io(io::Error),
    /// A line, from 1, is no result, or doesn't say which line it is of.
    NotResult(u64),
}

impl Earlier {
    /// Reads the results that `file` has from its beginning.
    pub(super) fn read(file: File, compression: Compression) -> Result<Self, Unreadable> {
        let mut lines = ResultLines::new(file, compression);
        let mut earlier = Earlier::default();
        let mut line = Vec::new();
        while lines.next(&mut line).map_err(Unreadable::Io)? {
            let unknown = Unreadable::NotResult(earlier.results + 1);
            let outcome = lines::read_result(&line).ok_or(unknown)?;
            let place = earlier.results;
            earlier.results += 1;
            match outcome.origin {
                Some(Origin { line, fingerprint }) if outcome.good => {
                    earlier.good.push(Good { line, fingerprint, place });
                }
                Some(_) => {}
                None => return Err(Unreadable::NotResult(earlier.results)),
            }
        }
        earlier.whole_end = lines.whole_end;
        earlier.rescued = lines.whole_lines < earlier.results;
        // What is cut off must be a result too, before it is cut off.
        let torn = line.as_slice();
        if !(torn.starts_with(RESULT) || RESULT.starts_with(torn)) {
            return Err(Unreadable::NotResult(earlier.results + 1));
        }
        // Of two results of a line the later one counts.
        earlier.good.sort_unstable_by_key(|good| (good.line, std::cmp::Reverse(good.place)));
        earlier.good.dedup_by_key(|good| good.line);
        Ok(earlier)
    }

    /// How many lines have a good result.
    pub(super) fn good(&self) -> u64 {
        self.good.len() as u64
    }

    /// What there is of a line. Asked with growing numbers.
    pub(super) fn find(&mut self, line: u64, fingerprint: u64) -> Found {
        self.next += self.good[self.next..].iter().take_while(|good| good.line < line).count();
        match self.good.get(self.next) {
            Some(good) if good.line == line && good.fingerprint == fingerprint => Found::Result,
            Some(good) if good.line == line => Found::Stranger,
            _ => Found::Nothing,
        }
    }

    /// A line behind `last` that has a result: one that the input does not have.
    pub(super) fn beyond(&self, last: u64) -> Option<u64> {
        self.good.last().map(|good| good.line).filter(|line| *line > last)
    }

    /// Says of each good result whether the input's line of that number is the one that it is of.
    pub(super) fn compare(&mut self, input: &mut Lines) -> io::Result<Vec<bool>> {
        let mut same = vec![false; self.good.len()];
        while self.next < self.good.len()
            && let Some(line) = input.next()?
        {
            if self.find(line.number, line.fingerprint) == Found::Result {
                same[self.next] = true;
            }
        }
        self.next = 0;
        Ok(same)
    }

    /// Says which results are of lines that the input does not have: those for which `same` has false.
    pub(super) fn strangers(&self, same: &[bool]) -> Option<String> {
        let mut strangers = self.good.iter().zip(same).filter(|(_, same)| !**same).map(|(good, _)| good.line);
        let first = strangers.next()?;
        let more = match strangers.count() {
            0 => String::new(),
            more => format!(", nor are {more} others"),
        };
        Some(format!("line {first} of the input is not the line that the result is of{more}"))
    }

    /// Forgets the good results for which `same` has false.
    pub(super) fn keep(&mut self, same: &[bool]) {
        let mut same = same.iter();
        self.good.retain(|_| same.next().copied().unwrap_or(false));
    }

    /// The results to keep, by their places in the output, if any other line is to go.
    pub(super) fn places(&self) -> Option<Vec<u64>> {
        if self.good() == self.results && !self.rescued {
            return None;
        }
        let mut places: Vec<u64> = self.good.iter().map(|good| good.place).collect();
        places.sort_unstable();
        Some(places)
    }
}

/// How every result line begins, in either format.
const RESULT: &[u8] = b"{\"id\":";

/// The whole lines of an output.
pub(super) struct ResultLines {
    reader: BufReader<Members>,
    /// In the text, behind the lines that were read, and how many those are.
    position: u64,
    lines: u64,
    /// In the file, behind the last line that ends a member, and which one that is. Known when the next line is read.
    whole_end: u64,
    whole_lines: u64,
}

impl ResultLines {
    pub(super) fn new(file: File, compression: Compression) -> Self {
        let reader = BufReader::with_capacity(1 << 18, Members::new(file, compression));
        ResultLines { reader, position: 0, lines: 0, whole_end: 0, whole_lines: 0 }
    }

    /// Reads the next line with its end. False where no whole one is left; `line` then has the torn one.
    pub(super) fn next(&mut self, line: &mut Vec<u8>) -> io::Result<bool> {
        line.clear();
        let read = self.reader.read_until(b'\n', line);
        if let Some(end) = self.reader.get_mut().member_end(self.position) {
            (self.whole_end, self.whole_lines) = (end, self.lines);
        }
        match read {
            Ok(_) if line.ends_with(b"\n") => {
                self.position += line.len() as u64;
                self.lines += 1;
                Ok(true)
            }
            Ok(_) => Ok(false),
            // A member that is cut off.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }
}
