//! How few tokens a text can have: a bound that needs no encoding.
//!
//! A token stands for at most so many bytes of text, if no step of the tokenizer drops text or shortens it without
//! bound. The steps known not to are listed here; any other gives no bound.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::pieces::Pieces;

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
