//! The bytes that one token stands for: what log-probabilities name their tokens by.
//!
//! A tokenizer's decoder makes text of a whole sequence, where a token may lose a space at the beginning, or be part of a
//! character. So a token is looked at by its own spelling:
//!
//! ```text
//!   byte-level     Ġthe       each character is a byte, by GPT-2's table
//!   byte fallback  <0xE2>     a byte
//!   else           ▁the       what it adds behind another token, by the decoder
//! ```
//!
//! Invariant: where a decoder drops nothing, the bytes of a text's tokens, one behind the other, are the text.

use tokenizers::{Decoder, DecoderWrapper, Tokenizer};

/// A token that every decoder leaves alone, so that the next one does not begin the text.
const BEFORE: &str = "a";

/// The bytes of token `id`, special or not; `None` where the tokenizer has no such token.
pub fn token_bytes(tokenizer: &Tokenizer, id: u32) -> Option<Vec<u8>> {
    if let Some(added) = tokenizer.get_added_vocabulary().simple_id_to_token(id) {
        return Some(added.into_bytes());
    }
    let token = tokenizer.id_to_token(id)?;
    let Some(decoder) = tokenizer.get_decoder() else { return Some(token.into_bytes()) };
    if has(decoder, &|decoder| matches!(decoder, DecoderWrapper::ByteLevel(_)))
        && let Some(bytes) = token.chars().map(byte_of).collect()
    {
        return Some(bytes);
    }
    if has(decoder, &|decoder| matches!(decoder, DecoderWrapper::ByteFallback(_)))
        && let Some(byte) = fallback(&token)
    {
        return Some(vec![byte]);
    }
    let text = |tokens: &[&str]| decoder.decode(tokens.iter().map(|&token| token.to_owned()).collect()).ok();
    let (before, both) = (text(&[BEFORE])?, text(&[BEFORE, &token])?);
    Some(both.strip_prefix(&before).unwrap_or(&token).as_bytes().to_vec())
}

/// Is the decoder one that `is` accepts, or a sequence with one?
fn has(decoder: &DecoderWrapper, is: &dyn Fn(&DecoderWrapper) -> bool) -> bool {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().any(|decoder| has(decoder, is)),
        decoder => is(decoder),
    }
}

/// The byte behind a character of GPT-2's table: printable bytes of Latin-1 stand for themselves, the 68 others are
/// counted off from U+0100 on.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The byte that `<0xE2>` names.
fn fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(tokenizer: &Tokenizer, text: &str) -> Vec<Vec<u8>> {
        let encoding = tokenizer.encode(text, false).unwrap();
        encoding.get_ids().iter().map(|id| token_bytes(tokenizer, *id).unwrap()).collect()
    }

    #[test]
    fn the_bytes_of_a_texts_tokens_are_the_text_whatever_it_is() {
        let tokenizer = Tokenizer::from_file("tests/fixtures/text/tokenizer.json").unwrap();
        let every_byte: String = (0..0x250_u32).filter_map(char::from_u32).collect();
        for text in
            [" Größe: 🦀 ist 3 щука,\n\tnaïve 🙂 漢字!", "<|im_start|>user\nHi<|im_end|>", &every_byte]
        {
            assert_eq!(bytes(&tokenizer, text).concat(), text.as_bytes());
        }
        assert!(
            bytes(&tokenizer, "🦀").len() > 1,
            "it must be spread over tokens for this test to mean anything"
        );
        assert_eq!(token_bytes(&tokenizer, 1_000_000), None);
    }

    #[test]
    fn every_byte_of_the_byte_level_table_is_there_once() {
        let mut bytes: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    /// A tokenizer of whole words with this decoder.
    fn words(decoder: &str, words: &[&str]) -> Tokenizer {
        let vocab = words.iter().enumerate().map(|(id, word)| format!("{word:?}: {id}"));
        let vocab = vocab.collect::<Vec<_>>().join(", ");
        let json = format!(
            r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
                "pre_tokenizer": null, "post_processor": null, "decoder": {decoder},
                "model": {{"type": "WordLevel", "vocab": {{{vocab}}}, "unk_token": "?"}}}}"#
        );
        Tokenizer::from_bytes(json).unwrap()
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
            assert_eq!(token_bytes(&tokenizer, 0).unwrap(), b" the", "{decoder}");
            assert_eq!(token_bytes(&tokenizer, 1).unwrap(), b"s", "{decoder}");
        }
        assert_eq!(token_bytes(&words(sentence_piece, &["<0xE2>", "<0x100>"]), 0).unwrap(), [0xE2]);
        assert_eq!(token_bytes(&words(sentence_piece, &["<0xE2>", "<0x100>"]), 1).unwrap(), b"<0x100>");
        let word_piece =
            words(r#"{"type": "WordPiece", "prefix": "\u0023#", "cleanup": true}"#, &["the", "##s"]);
        assert_eq!(token_bytes(&word_piece, 0).unwrap(), b" the");
        assert_eq!(token_bytes(&word_piece, 1).unwrap(), b"s");
        assert_eq!(token_bytes(&words("null", &["the"]), 0).unwrap(), b"the");
    }
}
