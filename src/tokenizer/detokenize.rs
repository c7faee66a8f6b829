//! Tokens to text, token by token.
//!
//! A token may be a part of a character, so its bytes wait until they are complete, three at most:
//!
//! ```text
//!   token     bytes               waits     becomes certain
//!   "ĠGr"     20 47 72                      " Gr"
//!   "Ã"       C3                  C3        ""
//!   "¼n"      BC 6E                         "ün"
//! ```
//!
//! Where tokens are no rows of bytes (see `pieces`), a token is decoded together with the tokens before it back to the
//! last point where the text was complete, and what is new is the difference.
//!
//! A stop text ends the output before its first occurrence, or with it, and nothing that may still become one is given out.
//!
//! Invariant: what was given out is `text[..given]`, and it is never taken back. A token costs time in proportion to its
//! own bytes and to the stop texts, however long the output is.

use crate::tokenizer::Text;
use crate::tokenizer::pieces::{Pieces, Row};

/// What stands for bytes that are no character, or not yet one.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;

/// The text of one request's output.
pub struct Detokenizer {
    waiting: Waiting,
    /// All text that is certain.
    text: String,
    /// Bytes of it given out.
    given: usize,
    ending: Ending,
    /// Tokens taken.
    taken: u32,
    /// Which stop text came up.
    stopped: Option<usize>,
}

/// What ends an output's text.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// Texts that do.
    pub stop: Vec<String>,
    /// Let the text end with the stop text, not before it.
    pub include: bool,
    /// Tokens at least: a stop text may not end within them.
    pub min_tokens: u32,
}

impl Detokenizer {
    /// For an output that ends so.
    pub fn new(ending: Ending) -> Self {
        let (waiting, text) = (Waiting::default(), String::new());
        Detokenizer { waiting, text, given: 0, ending, taken: 0, stopped: None }
    }

    /// Takes the next token; gives the text that became certain. Behind a stop text there is none.
    pub fn push(&mut self, token: u32, codec: &Text) -> &str {
        if self.stopped() {
            return "";
        }
        let before = self.text.len();
        self.waiting.push(token, codec, &mut self.text);
        self.taken += 1;
        self.stop_behind(before);
        let end = self.text.len() - self.held_back();
        self.give(end)
    }

    /// The output is over; gives the rest of the text.
    pub fn finish(&mut self, codec: &Text) -> &str {
        if !self.stopped() {
            let before = self.text.len();
            self.waiting.finish(codec, &mut self.text);
            self.stop_behind(before);
        }
        self.give(self.text.len())
    }

    /// Has a stop text come up?
    pub fn stopped(&self) -> bool {
        self.stopped.is_some()
    }

    /// The stop text that came up.
    pub fn stop_text(&self) -> Option<&str> {
        self.stopped.map(|which| self.ending.stop[which].as_str())
    }

    /// The whole text.
    pub fn into_text(self) -> String {
        self.text
    }

    /// Cuts the text at the first stop text that ends behind `before`.
    fn stop_behind(&mut self, before: usize) {
        let Ending { stop, include, min_tokens } = &self.ending;
        if self.taken <= *min_tokens {
            return;
        }
        let found = |(which, stop): (usize, &String)| {
            // The first byte of one that ends just behind `before`.
            let from = self.text.ceil_char_boundary((before + 1).saturating_sub(stop.len()));
            let at = from + self.text.get(from..)?.find(stop.as_str())?;
            Some((at, if *include { at + stop.len() } else { at }, which))
        };
        if let Some((_, end, which)) = stop.iter().enumerate().filter_map(found).min() {
            self.text.truncate(end);
            self.stopped = Some(which);
        }
    }

    /// Bytes at the end of the text that may be the beginning of a stop text.
    fn held_back(&self) -> usize {
        if self.stopped() {
            return 0;
        }
        let beginning = |stop: &String| {
            let lengths = stop.char_indices().map(|(at, _)| at).rev();
            lengths.filter(|len| *len > 0).find(|len| self.text.ends_with(&stop[..*len]))
        };
        self.ending.stop.iter().filter_map(beginning).max().unwrap_or(0)
    }

    fn give(&mut self, end: usize) -> &str {
        let from = self.given;
        self.given = end.max(from);
        &self.text[from..self.given]
    }
}

/// What was drawn and is not yet text.
#[derive(Default)]
struct Waiting {
    /// Of a row of bytes: the beginning of a character.
    bytes: Vec<u8>,
    /// Has there been a token that is text?
    begun: bool,
    /// Of tokens that are no row of bytes: those back to the last complete text but one.
    ids: Vec<u32>,
    /// How many of `ids` are context: their text is known.
    context: usize,
}

impl Waiting {
    /// Tokens that are no text together at most so long wait for more.
    const PATIENCE: usize = 16;

    /// Takes a token, and appends what became certain.
    fn push(&mut self, token: u32, codec: &Text, text: &mut String) {
        let Some(pieces) = codec.pieces().filter(|pieces| !pieces.is_special(token)) else { return };
        match pieces.row {
            Some(row) => {
                self.read(token, pieces, row, codec);
                self.complete(row, false, text);
            }
            None => {
                self.ids.push(token);
                let new = self.difference(codec);
                let complete = !new.is_empty() && !new.ends_with(INCOMPLETE);
                if complete || self.ids.len() - self.context >= Self::PATIENCE {
                    self.ids.drain(..self.context);
                    self.context = self.ids.len();
                    text.push_str(&new);
                }
            }
        }
    }

    /// Appends what waits, complete or not.
    fn finish(&mut self, codec: &Text, text: &mut String) {
        match codec.pieces().and_then(|pieces| pieces.row) {
            Some(row) => self.complete(row, true, text),
            None => {
                text.push_str(&self.difference(codec));
                self.ids.clear();
                self.context = 0;
            }
        }
    }

    /// Takes the bytes of a token of a row.
    fn read(&mut self, token: u32, pieces: &Pieces, row: Row, codec: &Text) {
        let Some(piece) = pieces.get(token).filter(|piece| !piece.is_empty()) else { return };
        let first = !std::mem::replace(&mut self.begun, true);
        match piece {
            // The decoder strips the first token, unless it is only a part of a character.
            piece if first && row.strips_first && str::from_utf8(piece).is_ok() => {
                self.bytes.extend(codec.decode_whole(&[token]).as_bytes());
            }
            piece => self.bytes.extend(piece),
        }
    }

    /// Appends the characters that are complete; at the end, what never became one too.
    fn complete(&mut self, row: Row, at_end: bool, text: &mut String) {
        let mut done = 0;
        while done < self.bytes.len() {
            let rest = &self.bytes[done..];
            let (valid, invalid) = match str::from_utf8(rest) {
                Ok(_) => (rest.len(), 0),
                Err(error) => match error.error_len() {
                    None if at_end => (error.valid_up_to(), rest.len() - error.valid_up_to()),
                    None => (error.valid_up_to(), 0),
                    Some(len) => (error.valid_up_to(), len),
                },
            };
            text.push_str(str::from_utf8(&rest[..valid]).unwrap_or_default());
            let marks = if row.byte_by_byte { invalid } else { invalid.min(1) };
            text.extend(std::iter::repeat_n(INCOMPLETE, marks));
            done += valid + invalid;
            if invalid == 0 {
                break;
            }
        }
        self.bytes.drain(..done);
    }

    /// The text of the tokens behind the context.
    fn difference(&self, codec: &Text) -> String {
        let known = codec.decode_whole(&self.ids[..self.context]);
        let mut all = codec.decode_whole(&self.ids);
        let same = all.bytes().zip(known.bytes()).take_while(|(a, b)| a == b).count();
        all.drain(..all.floor_char_boundary(same));
        all
    }
}

impl Text {
    /// The text of tokens, special ones left out; what is no character becomes U+FFFD. `None` without a tokenizer.
    pub fn decode(&self, ids: &[u32]) -> Option<String> {
        if self.pieces()?.row.is_none() {
            return Some(self.decode_whole(ids));
        }
        let mut detokenizer = Detokenizer::new(Ending::default());
        for id in ids {
            detokenizer.push(*id, self);
        }
        detokenizer.finish(self);
        Some(detokenizer.into_text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn codec() -> Text {
        Text::open(Path::new("tests/fixtures/text")).unwrap()
    }

    fn stop(texts: &[&str]) -> Ending {
        Ending { stop: texts.iter().map(|text| (*text).to_owned()).collect(), ..Ending::default() }
    }

    fn ids(codec: &Text, text: &str) -> Vec<u32> {
        codec.encode(crate::Prompt::Text(text.to_owned())).unwrap()
    }

    #[test]
    fn a_character_of_several_tokens_comes_out_whole_with_its_last_one() {
        let codec = codec();
        let crab = ids(&codec, "🦀");
        assert!(crab.len() > 1, "the character must be spread over tokens for this test to mean anything");
        let mut detokenizer = Detokenizer::new(Ending::default());
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
        let mut detokenizer = Detokenizer::new(Ending::default());
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
        let mut detokenizer = Detokenizer::new(stop(&["##end", "#!"]));
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

    #[test]
    fn of_stop_texts_in_one_token_the_first_ends_the_text() {
        let codec = codec();
        let two_letters = |id: &u32| {
            let text = codec.decode(&[*id])?;
            let [first, second] = text.as_bytes() else { return None };
            (first != second && text.is_ascii()).then(|| (*id, text.clone()))
        };
        let (token, text) = (0..640).find_map(|id| two_letters(&id)).unwrap();
        for stops in [[&text[1..], &text[..1]], [&text[..1], &text[1..]]] {
            let mut detokenizer = Detokenizer::new(stop(&stops));
            assert_eq!(detokenizer.push(token, &codec), "");
            assert_eq!(detokenizer.stop_text(), Some(&text[..1]), "{text:?}");
        }
    }

    #[test]
    fn a_stop_text_does_not_count_within_the_least_tokens() {
        let codec = codec();
        let mut detokenizer = Detokenizer::new(Ending { min_tokens: 2, ..stop(&["#"]) });
        let pieces: Vec<String> = ["#", "!", "#", "!"]
            .iter()
            .flat_map(|text| ids(&codec, text))
            .map(|id| detokenizer.push(id, &codec).to_owned())
            .collect();
        assert_eq!(pieces.len(), 4, "a token each");
        assert_eq!((pieces.concat(), detokenizer.stop_text()), ("#!".to_owned(), Some("#")));
    }

    /// A small tokenizer of SentencePiece's kind: ▁ for a space, bytes for what it doesn't know.
    fn byte_fallback(decoder: serde_json::Value) -> Text {
        let words = ["<unk>", "<s>", "</s>", "▁", "▁the", "s", "ö", "▁Grö", "🙂", "<0x100>", "▁▁", "e</w>"];
        let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
        let vocab: serde_json::Map<_, _> = words
            .map(str::to_owned)
            .into_iter()
            .chain(bytes)
            .zip(0..)
            .map(|(word, id)| (word, id.into()))
            .collect();
        let special = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let file = serde_json::json!({
            "version": "1.0", "added_tokens": [special(1, "<s>"), special(2, "</s>")], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true},
        });
        let folder = std::env::temp_dir().join(format!(
            "minisgl-detokenize-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
        let text = Text::open(&folder).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        text
    }

    fn decoders() -> Vec<serde_json::Value> {
        let replace = serde_json::json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let (bytes, fuse) =
            (serde_json::json!({"type": "ByteFallback"}), serde_json::json!({"type": "Fuse"}));
        let strip = serde_json::json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
        let sequence =
            |decoders: &[&serde_json::Value]| serde_json::json!({"type": "Sequence", "decoders": decoders});
        let metaspace = |scheme: &str| serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
        vec![
            sequence(&[&replace, &bytes, &fuse, &strip]),
            sequence(&[&replace, &bytes, &fuse]),
            sequence(&[&bytes, &metaspace("always")]),
            metaspace("first"),
            metaspace("never"),
            serde_json::json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
            serde_json::json!({"type": "BPEDecoder", "suffix": "</w>"}),
            serde_json::Value::Null,
        ]
    }

    /// Pushes all tokens, and asserts that the pieces make the text; gives it.
    fn in_pieces(codec: &Text, ids: &[u32]) -> String {
        let mut detokenizer = Detokenizer::new(Ending::default());
        let mut pieces = String::new();
        for id in ids {
            pieces += detokenizer.push(*id, codec);
        }
        pieces += detokenizer.finish(codec);
        assert_eq!(detokenizer.into_text(), pieces);
        pieces
    }

    /// Bytes that stand in a row, as tokens of [`byte_fallback`], for whole characters.
    fn whole_characters(ids: &[u32]) -> bool {
        let byte = |id: &u32| id.checked_sub(12).map(|byte| byte as u8);
        ids.split(|id| byte(id).is_none()).all(|run| {
            let bytes: Vec<u8> = run.iter().filter_map(byte).collect();
            str::from_utf8(&bytes).is_ok()
        })
    }

    proptest::proptest! {
        #[test]
        fn pieces_of_any_tokens_are_the_text_that_the_tokenizer_decodes(
            ids in proptest::collection::vec(0..640_u32, 0..40),
        ) {
            let codec = codec();
            proptest::prop_assert_eq!(in_pieces(&codec, &ids), codec.decode_whole(&ids));
        }

        #[test]
        fn pieces_of_a_text_are_the_text(text in "\\PC{0,40}") {
            let codec = codec();
            proptest::prop_assert_eq!(in_pieces(&codec, &ids(&codec, &text)), codec.decode_whole(&ids(&codec, &text)));
        }

        #[test]
        fn a_stop_text_is_found_wherever_tokens_are_cut(
            drawn in proptest::collection::vec(0..640_u32, 0..40),
            (from, len) in (0..60_usize, 1..5_usize),
        ) {
            let codec = codec();
            let whole = codec.decode(&drawn).unwrap();
            let stop: String = whole.chars().skip(from).take(len).collect();
            if !stop.is_empty() {
                let mut detokenizer = Detokenizer::new(super::tests::stop(&["\u{0}never", &stop]));
                let mut pieces: String = drawn.iter().map(|id| detokenizer.push(*id, &codec).to_owned()).collect();
                pieces += detokenizer.finish(&codec);
                proptest::prop_assert_eq!(detokenizer.stop_text(), Some(stop.as_str()));
                proptest::prop_assert_eq!(pieces, &whole[..whole.find(&stop).unwrap()]);
            }
        }
    }

    #[test]
    fn pieces_are_the_text_by_every_kind_of_decoder() {
        for decoder in decoders() {
            let codec = byte_fallback(decoder.clone());
            let mut state = 1_u64;
            let mut compared = 0;
            for _ in 0..3000 {
                let mut below = |bound: u64| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) % bound
                };
                // Words, and bytes of which many make characters.
                let mut ids = Vec::new();
                for _ in 0..below(8) {
                    match below(3) {
                        0 => ids.extend(
                            ['ж', '漢', '🦀', ' ', 'a'][below(5) as usize]
                                .to_string()
                                .bytes()
                                .map(|byte| 12 + u32::from(byte)),
                        ),
                        1 => ids.push(below(12) as u32),
                        _ => ids.push(below(272) as u32),
                    }
                }
                let pieces = in_pieces(&codec, &ids);
                let byte_by_byte = decoder.to_string().contains("ByteFallback");
                if !byte_by_byte || whole_characters(&ids) {
                    assert_eq!(pieces, codec.decode_whole(&ids), "{decoder}: {ids:?}");
                    compared += 1;
                }
            }
            assert!(compared > 500, "{decoder}: {compared}");
        }
    }

    #[test]
    fn characters_that_came_whole_stay_whatever_bytes_follow() {
        let codec = byte_fallback(decoders().remove(0));
        let bytes = |bytes: &[u8]| bytes.iter().map(|byte| 12 + u32::from(*byte)).collect::<Vec<u32>>();
        assert_eq!(in_pieces(&codec, &bytes("漢字".as_bytes())), "漢字");
        assert_eq!(in_pieces(&codec, &bytes(&"漢字".as_bytes()[..5])), "漢\u{FFFD}\u{FFFD}");
        assert_eq!(in_pieces(&codec, &bytes(b"\xFFa\xE6")), "\u{FFFD}a\u{FFFD}");
    }

    #[test]
    fn a_token_costs_the_same_however_long_the_output_is() {
        let codec = codec();
        for drawn in [vec![0_u32], vec![639], ids(&codec, "🦀")[..1].to_vec(), vec![42]] {
            let mut detokenizer = Detokenizer::new(stop(&["never"]));
            for _ in 0..100_000 {
                drawn.iter().for_each(|id| {
                    detokenizer.push(*id, &codec);
                });
            }
            let waiting = &detokenizer.waiting;
            assert!(waiting.bytes.len() <= 3 && waiting.ids.len() <= 2 * Waiting::PATIENCE);
            detokenizer.finish(&codec);
        }
    }
}
