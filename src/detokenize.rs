//! Tokens to text, token by token.
//!
//! A token may be part of a character, and what it reads as may depend on the one before (a leading space that only
//! the first word lacks). So a token is decoded together with the tokens before it back to the last point where the
//! text was complete, and what is new is the difference:
//!
//! ```text
//!   ids    … | context | pending …          decode(context)            = "Gr"
//!              known     new                decode(context + pending)  = "Grü"   ── gives "ü"
//!                                                                      = "Gr\u{FFFD}"  ── gives "", waits
//! ```
//!
//! A stop text ends the output before its first occurrence, and nothing that may still become one is given out.
//!
//! Invariant: what was given out is `text[..given]`, and it is never taken back.

use crate::tokenizer::Text;

/// What stands for bytes that are no character, or not yet one.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;

/// The text of one request's output.
pub struct Detokenizer {
    /// Tokens back to the last complete text but one.
    ids: Vec<u32>,
    /// How many of `ids` are context: their text is in `text`.
    context: usize,
    /// All text that is certain.
    text: String,
    /// Bytes of it given out.
    given: usize,
    stop: Vec<String>,
    stopped: bool,
}

impl Detokenizer {
    /// For an output that the texts `stop` end.
    pub fn new(stop: Vec<String>) -> Self {
        Detokenizer { ids: Vec::new(), context: 0, text: String::new(), given: 0, stop, stopped: false }
    }

    /// Takes the next token; gives the text that became certain. Behind a stop text there is none.
    pub fn push(&mut self, token: u32, codec: &Text) -> &str {
        if self.stopped {
            return "";
        }
        self.ids.push(token);
        let new = self.pending(codec);
        if new.is_empty() || new.ends_with(INCOMPLETE) {
            return "";
        }
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        self.append(&new);
        let end = self.text.len() - self.held_back();
        self.give(end)
    }

    /// The output is over; gives the rest of the text.
    pub fn finish(&mut self, codec: &Text) -> &str {
        if !self.stopped {
            let new = self.pending(codec);
            self.append(&new);
        }
        self.ids.clear();
        self.context = 0;
        self.give(self.text.len())
    }

    /// Has a stop text come up?
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// The whole text.
    pub fn into_text(self) -> String {
        self.text
    }

    /// The text of the tokens behind the context.
    fn pending(&self, codec: &Text) -> String {
        let known = codec.decode(&self.ids[..self.context]).unwrap_or_default();
        let mut all = codec.decode(&self.ids).unwrap_or_default();
        let same = all.bytes().zip(known.bytes()).take_while(|(a, b)| a == b).count();
        all.drain(..all.floor_char_boundary(same));
        all
    }

    /// Appends text, and cuts all of it before the first stop text.
    fn append(&mut self, new: &str) {
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0);
        let from = self.text.floor_char_boundary(self.text.len().saturating_sub(longest));
        self.text.push_str(new);
        let first = self.stop.iter().filter_map(|stop| self.text[from..].find(stop.as_str())).min();
        if let Some(at) = first {
            self.text.truncate(from + at);
            self.stopped = true;
        }
    }

    /// Bytes at the end of the text that may be the beginning of a stop text.
    fn held_back(&self) -> usize {
        if self.stopped {
            return 0;
        }
        let beginning = |stop: &String| {
            let lengths = stop.char_indices().map(|(at, _)| at).rev();
            lengths.filter(|len| *len > 0).find(|len| self.text.ends_with(&stop[..*len]))
        };
        self.stop.iter().filter_map(beginning).max().unwrap_or(0)
    }

    fn give(&mut self, end: usize) -> &str {
        let from = self.given;
        self.given = end.max(from);
        &self.text[from..self.given]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn codec() -> Text {
        Text::open(Path::new("tests/fixtures/text")).unwrap()
    }

    fn ids(codec: &Text, text: &str) -> Vec<u32> {
        codec.encode(crate::Prompt::Text(text.to_owned())).unwrap()
    }

    #[test]
    fn a_character_of_several_tokens_comes_out_whole_with_its_last_one() {
        let codec = codec();
        let crab = ids(&codec, "🦀");
        assert!(crab.len() > 1, "the character must be spread over tokens for this test to mean anything");
        let mut detokenizer = Detokenizer::new(Vec::new());
        for id in &crab[..crab.len() - 1] {
            assert_eq!(detokenizer.push(*id, &codec), "");
        }
        assert_eq!(detokenizer.push(crab[crab.len() - 1], &codec), "🦀");
        assert_eq!(detokenizer.push(ids(&codec, "ж")[0], &codec), "");
        assert_eq!(detokenizer.finish(&codec), "\u{FFFD}", "a character that never came whole");
        assert_eq!(detokenizer.into_text(), "🦀\u{FFFD}");
    }

    #[test]
    fn pieces_make_the_text_and_no_piece_is_broken() {
        let codec = codec();
        let text = "Größe: 🦀 ist 3 щука, naïve 🙂🚀 漢字!\n  fn main() {}";
        let mut detokenizer = Detokenizer::new(Vec::new());
        let mut pieces = String::new();
        for id in ids(&codec, text) {
            let piece = detokenizer.push(id, &codec);
            assert!(!piece.contains(INCOMPLETE));
            pieces += piece;
        }
        assert_eq!(pieces, text);
        assert_eq!(detokenizer.finish(&codec), "");
    }

    #[test]
    fn text_that_may_become_a_stop_text_is_held_back_until_it_does_not() {
        let codec = codec();
        let mut detokenizer = Detokenizer::new(vec!["##end".to_owned(), "#!".to_owned()]);
        let mut push = |text: &str| {
            let pieces: Vec<String> =
                ids(&codec, text).into_iter().map(|id| detokenizer.push(id, &codec).to_owned()).collect();
            (pieces.concat(), detokenizer.stopped())
        };
        assert_eq!(push("a#"), ("a".to_owned(), false));
        assert_eq!(push("#e"), (String::new(), false));
        assert_eq!(push("x#"), ("##ex".to_owned(), false));
        assert_eq!(push("#end of it"), (String::new(), true));
        assert_eq!(detokenizer.finish(&codec), "");
        assert_eq!(detokenizer.into_text(), "a##ex");
    }
}
