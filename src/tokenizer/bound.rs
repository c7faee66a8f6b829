//! What a text is too long for: bounds on its tokens that need not all of it encoded; and on what a tokenizer's steps make of it.
//!
//! A token stands for at most so many bytes of text, if no step of the tokenizer drops text or shortens it without
//! bound. The steps known not to are listed here; any other gives no bound. Mostly that is far more than a token does
//! stand for, so the beginning of a long text is encoded too: what is said there has its tokens whatever follows, all
//! but the last word and what is near the cut.
//!
//! ```text
//!   beginning of the text                  | the rest
//!   word  word  word  …  word  word  last w|ord …
//!   ─── counted ───────────  ─ 4 KiB ─     |
//! ```

use serde_json::Value;
use tokenizers::Tokenizer;

use super::pieces::Pieces;

/// As much of a text is encoded as has more tokens than fit, if a token stands for less than so many bytes.
const BYTES_PER_TOKEN: usize = 8;
/// What ends so near the cut might be encoded otherwise with what follows: an added token across it, marks on a letter.
const MARGIN: usize = 4096;

/// Has a text more than `most` tokens, for all that its beginning shows? Shorter ones are not looked at.
pub fn is_longer(text: &str, most: usize, tokenizer: &Tokenizer) -> bool {
    let cut = text.floor_char_boundary(most.saturating_mul(BYTES_PER_TOKEN).saturating_add(4 * MARGIN));
    if text.len() / 2 < cut {
        return false;
    }
    let Ok(encoding) = tokenizer.encode(&text[..cut], false) else { return false };
    let words = encoding.get_word_ids();
    let last = words.last();
    let ends = encoding.get_offsets().iter().map(|(_, end)| *end);
    let certain = |(end, word): &(usize, &Option<u32>)| end + MARGIN <= cut && Some(*word) != last;
    ends.zip(words).filter(certain).count() > most
}

/// The most bytes of text that one token can stand for.
pub fn max_token_bytes(tokenizer: &Tokenizer, pieces: &Pieces) -> Option<usize> {
    let value = |part: serde_json::Result<Value>| part.unwrap_or_default();
    let shrinking = shrinking(&value(serde_json::to_value(tokenizer.get_normalizer())))?;
    let keeps = keeps_text(&value(serde_json::to_value(tokenizer.get_pre_tokenizer())));
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    // Those take white space beside them along.
    let greedy = added.values().any(|token| token.lstrip || token.rstrip);
    (keeps && !greedy && knows_each_byte(pieces))
        .then(|| pieces.iter().map(<[u8]>::len).max().unwrap_or(0) * shrinking)
}

/// How many bytes may become one by a normalizer.
fn shrinking(normalizer: &Value) -> Option<usize> {
    if normalizer.is_null() {
        return Some(1);
    }
    match normalizer["type"].as_str()? {
        // Three letters of Hangul, nine bytes, become a syllable of three; U+212A, three bytes, becomes K.
        "NFC" => Some(3),
        "Prepend" => Some(1),
        "Replace" => {
            let (from, to) = (normalizer["pattern"]["String"].as_str()?, normalizer["content"].as_str()?);
            (to.len() >= from.len()).then_some(1)
        }
        "Sequence" => normalizer["normalizers"].as_array()?.iter().map(shrinking).product(),
        _ => None,
    }
}

/// How many bytes a byte may become by a normalizer or a decoder whose steps put texts in place of others.
pub fn growing(step: &Value) -> usize {
    let bytes = |text: &Value| text.as_str().map_or(0, str::len);
    match step["type"].as_str() {
        Some("Replace") => {
            // An expression may match a byte, or none.
            let from = bytes(&step["pattern"]["String"]).max(1);
            1 + bytes(&step["content"]) / from
        }
        Some("Prepend") => 1 + bytes(&step["prepend"]),
        Some("Sequence") => {
            let steps = step["normalizers"].as_array().or(step["decoders"].as_array());
            steps.into_iter().flatten().map(growing).fold(1, usize::saturating_mul)
        }
        _ => 1,
    }
}

/// Is all text still there once it is split?
fn keeps_text(pre_tokenizer: &Value) -> bool {
    if pre_tokenizer.is_null() {
        return true;
    }
    match pre_tokenizer["type"].as_str() {
        Some("ByteLevel" | "Metaspace" | "Digits") => true,
        Some("Split" | "Punctuation") => pre_tokenizer["behavior"] != "Removed",
        Some("Sequence") => {
            pre_tokenizer["pretokenizers"].as_array().is_some_and(|all| all.iter().all(keeps_text))
        }
        _ => false,
    }
}

/// Has each byte that occurs in UTF-8 a token? Without one, any text may be one unknown token, or none.
fn knows_each_byte(pieces: &Pieces) -> bool {
    let mut known = [false; 256];
    for byte in pieces.iter().filter_map(|piece| <[u8; 1]>::try_from(piece).ok()) {
        known[usize::from(byte[0])] = true;
    }
    let in_utf8 = (0x00..=0xBF).chain(0xC2..=0xF4);
    pieces.row.is_some() && in_utf8.into_iter().all(|byte: usize| known[byte])
}
