//! What each token stands for, as bytes.
//!
//! Most tokenizers' decoders work token by token: the text is the tokens' bytes in a row, and only the very first
//! token may lose a space.
//!
//! ```text
//!   byte-level                     "Ġgrün"  ──> 20 67 72 C3 BC 6E           each character stands for a byte
//!   ▁ for a space, byte fallback   "▁grün"  ──> 20 67 72 C3 BC 6E     "<0xC3>" ──> C3      first: "grün"
//! ```
//!
//! Then the text of an output grows by a look-up a token. Other decoders (WordPiece's, …) give no such row: for them the
//! bytes are those of the token alone, and text is decoded by the tokenizer itself.

use std::collections::HashMap;

use serde_json::Value;
use tokenizers::{Decoder, Tokenizer};

/// Far more than any vocabulary has: a table of all ids must fit into memory.
const IDS_MAX: usize = 1 << 24;

/// The bytes of all tokens.
pub struct Pieces {
    /// Of all tokens in a row.
    bytes: Vec<u8>,
    /// `[id]`: where its bytes end.
    ends: Vec<u32>,
    /// `[id]`: left out of texts.
    special: Vec<bool>,
    /// How bytes become text; `None` where they don't.
    pub row: Option<Row>,
}

/// How the tokens' bytes, in a row, become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The first token loses what the decoder strips from a text's beginning.
    pub strips_first: bool,
    /// What is no character becomes one U+FFFD a byte, not one altogether.
    pub byte_by_byte: bool,
}

impl Pieces {
    /// Those of a tokenizer.
    ///
    /// # Errors
    /// An id that no vocabulary reaches.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, String> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).unwrap_or_default();
        let scheme = Scheme::of(&decoder);
        let ids = tokenizer.get_vocab(true).into_values();
        let count = ids.max().map_or(0, |id| id as usize + 1);
        if count > IDS_MAX {
            return Err(format!("it gives a token the id {}; ids lie below {IDS_MAX}", count - 1));
        }
        let mut pieces = Pieces {
            bytes: Vec::new(),
            ends: Vec::with_capacity(count),
            special: Vec::with_capacity(count),
            row: scheme.as_ref().map(Scheme::row),
        };
        let bytes_of_characters = byte_level_alphabet();
        for id in 0..count as u32 {
            let token = tokenizer.id_to_token(id).unwrap_or_default();
            let special = tokenizer.get_added_vocabulary().is_special_token(&token);
            match &scheme {
                _ if special => pieces.bytes.extend(token.as_bytes()),
                Some(scheme) => scheme.push(&token, &bytes_of_characters, &mut pieces.bytes),
                None => pieces.bytes.extend(behind_another(tokenizer, token).as_bytes()),
            }
            pieces.special.push(special);
            pieces.ends.push(pieces.bytes.len() as u32);
        }
        Ok(pieces)
    }

    /// The bytes of a token, a special one's too; `None` for an id that stands for nothing.
    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)? as usize;
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        Some(&self.bytes[start..end])
    }

    /// Is the token left out of texts?
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The bytes of all tokens, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.ends.len() as u32).filter_map(|id| self.get(id))
    }
}

/// A decoder that works token by token.
enum Scheme {
    /// Each character stands for a byte.
    ByteLevel,
    /// Replacements, bytes written as `<0x0A>`, and what is stripped from the first token.
    Replacing { replacements: Vec<(String, String)>, byte_fallback: bool, strips_first: bool },
}

impl Scheme {
    /// What a decoder amounts to, where it works token by token.
    fn of(decoder: &Value) -> Option<Scheme> {
        let steps = match decoder["type"].as_str()? {
            "Sequence" => decoder["decoders"].as_array()?.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        if let [step] = steps
            && step["type"] == "ByteLevel"
        {
            return Some(Scheme::ByteLevel);
        }
        let mut replacements = Vec::new();
        let (mut byte_fallback, mut fused, mut strips_first) = (false, false, false);
        for step in steps {
            match step["type"].as_str()? {
                "Replace" => {
                    let (from, to) = (step["pattern"]["String"].as_str()?, step["content"].as_str()?);
                    // A longer pattern could match across tokens once they are fused.
                    if fused && from.chars().count() != 1 {
                        return None;
                    }
                    replacements.push((from.to_owned(), to.to_owned()));
                }
                "ByteFallback" => byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" => match (step["start"].as_u64()?, step["stop"].as_u64()?) {
                    (0, 0) => {}
                    (1, 0) if fused => strips_first = true,
                    _ => return None,
                },
                "Metaspace" if !fused => {
                    replacements.push((step["replacement"].as_str()?.to_owned(), " ".to_owned()));
                    strips_first |= step["prepend_scheme"] != "never";
                }
                _ => return None,
            }
        }
        Some(Scheme::Replacing { replacements, byte_fallback, strips_first })
    }

    fn row(&self) -> Row {
        match *self {
            Scheme::ByteLevel => Row { strips_first: false, byte_by_byte: false },
            Scheme::Replacing { strips_first, .. } => Row { strips_first, byte_by_byte: true },
        }
    }

    /// Appends the bytes that a token, which is not the first one, stands for.
    fn push(&self, token: &str, byte_level: &HashMap<char, u8>, out: &mut Vec<u8>) {
        match self {
            Scheme::ByteLevel => {
                let before = out.len();
                for c in token.chars() {
                    match byte_level.get(&c) {
                        Some(byte) => out.push(*byte),
                        None => {
                            // A token with any other character stands for itself.
                            out.truncate(before);
                            out.extend(token.as_bytes());
                            return;
                        }
                    }
                }
            }
            Scheme::Replacing { replacements, byte_fallback, .. } => match written_byte(token) {
                Some(byte) if *byte_fallback => out.push(byte),
                _ => {
                    let replace =
                        |text: String, (from, to): &(String, String)| text.replace(from.as_str(), to);
                    out.extend(replacements.iter().fold(token.to_owned(), replace).as_bytes());
                }
            },
        }
    }
}

/// What a token adds to a text behind another one.
fn behind_another(tokenizer: &Tokenizer, token: String) -> String {
    let Some(decoder) = tokenizer.get_decoder() else { return token };
    let decode = |tokens: Vec<String>| decoder.decode(tokens).unwrap_or_default();
    let (before, both) = (decode(vec!["a".to_owned()]), decode(vec!["a".to_owned(), token.clone()]));
    both.strip_prefix(&before).map_or(token, str::to_owned)
}

/// The byte of a token like `<0x0A>`.
fn written_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok().filter(|_| digits.len() == 2)
}

/// The characters that stand for bytes in byte-level vocabularies: printable ones of Latin-1 for themselves, those from
/// U+0100 on for the other bytes in order (as in GPT-2).
fn byte_level_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let others = (0..=255u8).filter(|byte| !printable(*byte)).zip('\u{100}'..).map(|(byte, c)| (c, byte));
    (0..=255u8).filter(|byte| printable(*byte)).map(|byte| (char::from(byte), byte)).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(tokenizer: &Tokenizer, id: u32) -> Option<Vec<u8>> {
        Pieces::of(tokenizer).unwrap().get(id).map(<[u8]>::to_vec)
    }

    #[test]
    fn the_bytes_of_a_texts_tokens_are_the_text_whatever_it_is() {
        let tokenizer = Tokenizer::from_file("tests/fixtures/text/tokenizer.json").unwrap();
        let pieces = Pieces::of(&tokenizer).unwrap();
        let every_byte: String = (0..0x250_u32).filter_map(char::from_u32).collect();
        for text in
            [" Größe: 🦀 ist 3 щука,\n\tnaïve 🙂 漢字!", "<|im_start|>user\nHi<|im_end|>", &every_byte]
        {
            let encoding = tokenizer.encode(text, false).unwrap();
            let bytes: Vec<u8> =
                encoding.get_ids().iter().flat_map(|id| pieces.get(*id).unwrap().to_vec()).collect();
            assert_eq!(bytes, text.as_bytes());
        }
        assert_eq!(pieces.get(1_000_000), None);
    }

    #[test]
    fn every_byte_of_the_byte_level_alphabet_is_there_once() {
        let mut bytes: Vec<u8> = byte_level_alphabet().into_values().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    /// A tokenizer of whole words with this decoder.
    fn words(decoder: &str, words: &[&str]) -> Tokenizer {
        let vocab: serde_json::Map<_, _> =
            words.iter().zip(0..).map(|(word, id)| (word.to_string(), id.into())).collect();
        let file = serde_json::json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": serde_json::from_str::<Value>(decoder).unwrap(),
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
        });
        Tokenizer::from_bytes(file.to_string()).unwrap()
    }

    #[test]
    fn a_token_keeps_the_space_that_it_would_lose_at_the_beginning_of_a_text() {
        let sentence_piece = r#"{"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}"#;
        let metaspace =
            r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}"#;
        for decoder in [sentence_piece, metaspace] {
            let tokenizer = words(decoder, &["▁the", "s"]);
            assert_eq!(bytes(&tokenizer, 0).unwrap(), b" the", "{decoder}");
            assert_eq!(bytes(&tokenizer, 1).unwrap(), b"s", "{decoder}");
        }
        assert_eq!(bytes(&words(sentence_piece, &["<0xE2>", "<0x100>"]), 0).unwrap(), [0xE2]);
        assert_eq!(bytes(&words(sentence_piece, &["<0xE2>", "<0x100>"]), 1).unwrap(), b"<0x100>");
        let word_piece =
            words(r#"{"type": "WordPiece", "prefix": "\u0023#", "cleanup": true}"#, &["the", "##s"]);
        assert_eq!(bytes(&word_piece, 0).unwrap(), b" the");
        assert_eq!(bytes(&word_piece, 1).unwrap(), b"s");
        assert_eq!(bytes(&words("null", &["the"]), 0).unwrap(), b"the");
    }
}
