//! tokenizer.json made into a tokenizer.
//!
//! Four things differ from what the file says, as in transformers: truncation and padding, left over from training,
//! are dropped; tokens that only tokenizer_config.json lists are added, with the ids that it gives them; tokens
//! that it names as special are; and where it asks Llama's class for a token before each text there is one (DeepSeek's
//! distilled models; transformers 4 does so, 5 has lost it).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Once;

use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokenizers::{AddedToken, Model, PostProcessorWrapper, Tokenizer};

use super::Codec;
use super::bound::growing;
use super::config::{TokenizerConfig, read, unusable};
use crate::error::Error;
use crate::request::JsonObject;

/// Bytes that a byte of text may become before it is split, or a token's of its text. Published tokenizers make a space three.
const GROWTH_MAX: usize = 4096;

/// Reads a checkpoint's tokenizer.json; `None` where there is none.
///
/// # Errors
/// A file that is there but makes no tokenizer.
pub fn open(folder: &Path, config: &TokenizerConfig) -> Result<Option<Codec>, Error> {
    let path = folder.join("tokenizer.json");
    let Some(text) = read(&path)? else { return Ok(None) };
    let built = without_panic(|| {
        let codec = Codec::new(build(&text, config)?)?;
        // What panics at every text should do so here.
        let _ = codec.tokenizer.encode("a b", true);
        Ok(codec)
    });
    built
        .unwrap_or_else(|| Err("it is damaged".to_owned()))
        .map(Some)
        .map_err(|reason| unusable(&path, reason))
}

/// Does what panics at some files: the tokenizers crate trusts merges and post-processors. `None` if it did; nothing is
/// said of it.
fn without_panic<T>(work: impl FnOnce() -> T) -> Option<T> {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let said = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                said(panic);
            }
        }));
    });
    QUIET.set(true);
    let done = catch_unwind(AssertUnwindSafe(work)).ok();
    QUIET.set(false);
    done
}

fn build(text: &str, config: &TokenizerConfig) -> Result<Tokenizer, String> {
    // Sections are kept as text: the vocabulary and the merges are most of the file.
    let model;
    let mut sections: BTreeMap<String, &RawValue> =
        serde_json::from_str(text).map_err(|error| error.to_string())?;
    sections.remove("truncation");
    sections.remove("padding");
    for name in ["normalizer", "decoder"] {
        let step: Option<Value> = sections
            .get(name)
            .map(|step| serde_json::from_str(step.get()))
            .transpose()
            .map_err(|error| format!("{name}: {error}"))?;
        if step.is_some_and(|step| growing(&step) > GROWTH_MAX) {
            return Err(format!("its {name} makes texts more than {GROWTH_MAX} times as long"));
        }
    }
    let known: Vec<AddedToken> = match sections.get("added_tokens") {
        Some(listed) => {
            serde_json::from_str(listed.get()).map_err(|error| format!("added_tokens: {error}"))?
        }
        None => Vec::new(),
    };
    let is_known = |token: &AddedToken| known.iter().any(|known| known.content == token.content);
    let missing: Vec<(u32, &AddedToken)> = config
        .added_tokens
        .iter()
        .filter(|(_, token)| !is_known(token))
        .map(|(id, token)| (*id, token))
        .collect();
    if let Some(section) = sections.get_mut("model")
        && !missing.is_empty()
    {
        model = with_tokens(section, &missing)?;
        *section = &model;
    }
    let assembled = serde_json::to_string(&sections).map_err(|error| error.to_string())?;
    let mut tokenizer: Tokenizer = assembled.parse().map_err(|error: tokenizers::Error| error.to_string())?;
    add_tokens(&mut tokenizer, config).map_err(|error| error.to_string())?;
    tokenizer.set_encode_special_tokens(config.split_special_tokens);
    if config.begins_with_bos {
        begin_with_bos(&mut tokenizer, config).map_err(|error| format!("post_processor: {error}"))?;
    }
    for (id, token) in missing {
        let given = tokenizer.token_to_id(&token.content);
        if given != Some(id) && tokenizer.get_model().token_to_id(&token.content).is_none() {
            return Err(format!(
                "it can't give {:?} the id {id} that tokenizer_config.json says",
                token.content
            ));
        }
    }
    Ok(tokenizer)
}

/// The model with further tokens in its vocabulary, so that they have the ids that they are given.
fn with_tokens(model: &RawValue, tokens: &[(u32, &AddedToken)]) -> Result<Box<RawValue>, String> {
    let mut model: JsonObject =
        serde_json::from_str(model.get()).map_err(|error| format!("model: {error}"))?;
    if let Some(vocabulary) = model.get_mut("vocab").and_then(serde_json::Value::as_object_mut) {
        for (id, token) in tokens {
            vocabulary.entry(&token.content).or_insert((*id).into());
        }
    }
    serde_json::value::to_raw_value(&model).map_err(|error| error.to_string())
}

/// Puts the `bos_token` before each text, unless the file says itself what is around one.
fn begin_with_bos(tokenizer: &mut Tokenizer, config: &TokenizerConfig) -> serde_json::Result<()> {
    let Some(bos) = config.special_tokens.get("bos_token").and_then(Value::as_str) else { return Ok(()) };
    let Some(id) = tokenizer.token_to_id(bos) else { return Ok(()) };
    let says = serde_json::to_value(tokenizer.get_post_processor())?;
    if !matches!(says["type"].as_str(), None | Some("ByteLevel")) {
        return Ok(());
    }
    let special = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    tokenizer.with_post_processor(Some(serde_json::from_value::<PostProcessorWrapper>(json!({
        "type": "TemplateProcessing",
        "single": [special, text("A")],
        "pair": [special, text("A"), special, text("B")],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    }))?));
    Ok(())
}

/// Makes tokens of what the configuration lists and names, beside those of the file.
fn add_tokens(tokenizer: &mut Tokenizer, config: &TokenizerConfig) -> tokenizers::Result<()> {
    tokenizer.add_tokens(config.added_tokens.values().cloned())?;
    let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
    let special = |text: &str| {
        let known = added.get(&tokenizer.token_to_id(text)?).cloned();
        Some(known.unwrap_or_else(|| AddedToken::from(text, true)).special(true))
    };
    let special: Vec<AddedToken> = config.all_special_tokens().filter_map(special).collect();
    tokenizer.add_special_tokens(special)?;
    Ok(())
}
