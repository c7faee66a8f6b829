//! Fields of OpenAI's and vLLM's requests that ask for nothing here.
//!
//! Some never change what comes out. The others do, but have a value that asks for nothing: exports write every
//! parameter, at its default. Whoever asks for more is told so by name.

use serde_json::Value;

use super::error::{FieldError, shown};
use super::fields::Fields;
use crate::request::Prompt;

/// They don't change the result, whatever they hold.
const WITHOUT_EFFECT: &[&str] = &[
    "cache_salt",
    "metadata",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
];

/// A field that is taken at these values alone, given as JSON, or as null, and why.
pub type Only = (&'static str, &'static [&'static str], &'static str);

const STRUCTURED: &str = "its place is structured_outputs";

const ONLY: &[Only] = &[
    ("audio", &[], "only text comes out"),
    ("chat_template", &[], "the checkpoint's chat template is used"),
    ("detokenize", &["true"], "text comes out wherever the model has a tokenizer"),
    ("echo", &["false"], "the prompt is not repeated"),
    ("enable_thinking", &[], "its place is chat_template_kwargs"),
    ("function_call", &["\"auto\""], "its place is tool_choice"),
    ("functions", &["[]"], "their place is tools"),
    ("guided_choice", &[], STRUCTURED),
    ("guided_grammar", &[], STRUCTURED),
    ("guided_json", &[], STRUCTURED),
    ("guided_regex", &[], STRUCTURED),
    ("include_reasoning", &["true"], "reasoning stays in the text"),
    ("length_penalty", &["1"], "beam search is not supported"),
    ("logits_processors", &["[]"], "requests bring no code; say what the text may be in structured_outputs"),
    ("mm_processor_kwargs", &["{}"], "only text goes in"),
    ("modalities", &["[\"text\"]"], "only text comes out"),
    ("moderation", &[], "nothing is moderated"),
    ("reasoning_effort", &[], "its place is chat_template_kwargs if the template knows it"),
    ("return_token_ids", &["false"], "native lines give token ids"),
    ("return_tokens_as_token_ids", &["false"], "native lines give token ids"),
    ("skip_special_tokens", &["true"], "special tokens are no text"),
    ("spaces_between_special_tokens", &["true"], "special tokens are no text"),
    ("stream", &["false"], "a line gives one result"),
    ("structural_tag", &[], "a Lark grammar in structured_outputs says the same"),
    ("suffix", &["\"\""], "text is not inserted before another"),
    ("truncate_prompt_tokens", &[], "prompts are not cut"),
    ("use_beam_search", &["false"], "beam search is not supported"),
    ("verbosity", &["\"medium\""], "its place is chat_template_kwargs if the template knows it"),
    ("web_search_options", &[], "nothing is searched"),
];

/// The fields that only conversations have, but `messages`.
pub const CHAT_FIELDS: [&str; 5] =
    ["tools", "documents", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"];

const ADD_SPECIAL_TOKENS: &str = "add_special_tokens";

/// Takes the fields that change no result.
pub fn take_without_effect(fields: &mut Fields<'_>) {
    fields.take_all(WITHOUT_EFFECT.iter().copied());
}

/// Takes all that [`check_rest`] knows, whatever it asks for.
pub fn take_all_known(fields: &mut Fields<'_>) {
    take_without_effect(fields);
    let only = ONLY.iter().map(|(name, ..)| *name);
    fields.take_all(only.chain(CHAT_FIELDS).chain([ADD_SPECIAL_TOKENS]));
}

/// Checks that what is left of a request asks for nothing.
///
/// # Errors
/// A field that does, or that is not known.
pub fn check_rest(mut fields: Fields<'_>, prompts: &[Prompt]) -> Result<(), FieldError> {
    take_without_effect(&mut fields);
    check_only(&mut fields, ONLY)?;
    match prompts.first() {
        None | Some(Prompt::Tokens(_) | Prompt::Rerank(_)) => drop(fields.raw(ADD_SPECIAL_TOKENS)),
        Some(Prompt::Text(_)) => {
            check(&mut fields, (ADD_SPECIAL_TOKENS, &["true"], "the tokenizer's are added"))?
        }
        Some(Prompt::Chat(_)) => {
            check(&mut fields, (ADD_SPECIAL_TOKENS, &["false"], "the template writes them"))?
        }
    }
    match CHAT_FIELDS.into_iter().find(|name| fields.raw(name).is_some()) {
        Some(field) => Err(FieldError::NeedsMessages { field }),
        None => fields.finish(),
    }
}

/// Takes such fields.
///
/// # Errors
/// One that has another value.
pub fn check_only(fields: &mut Fields<'_>, only: &[Only]) -> Result<(), FieldError> {
    only.iter().try_for_each(|only| check(fields, *only))
}

fn check(fields: &mut Fields<'_>, (field, accepted, why): Only) -> Result<(), FieldError> {
    let Some(value) = fields.raw(field) else { return Ok(()) };
    let found: Option<Value> = serde_json::from_str(value.get()).ok();
    let is = |accepted: &&str| match (serde_json::from_str(accepted), &found) {
        (Ok(accepted), Some(found)) => same(&accepted, found),
        _ => false,
    };
    if accepted.iter().any(is) {
        return Ok(());
    }
    let fix = match accepted {
        [] => format!("{why}; leave it out"),
        _ => format!("it may only be {}: {why}", accepted.join(" or ")),
    };
    Err(FieldError::Unsupported { field, value: shown(value.get()), fix })
}

/// Equal as JSON, 1 and 1.0 being one number.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asks_for_nothing_here_does_so_in_python() {
        let (_, table) =
            include_str!("../../python/package/minisgl/sampling_params.py").split_once("_NEUTRAL: ").unwrap();
        let (table, _) = table.split_once("\n}").unwrap();
        let mut compared = 0;
        for row in table.lines().skip(1) {
            let (name, values) = row.trim().trim_start_matches('"').split_once("\": (").unwrap();
            let Some((_, accepted, _)) = ONLY.iter().find(|only| only.0 == name) else { continue };
            let values = values.trim_end_matches("),").split(", ").map(|value| value.trim_end_matches(','));
            // A field that is None is one that is not given.
            let values: Vec<_> = values.filter(|value| *value != "None").map(str::to_lowercase).collect();
            assert_eq!(values, *accepted, "{name}");
            compared += 1;
        }
        assert!(compared >= 5, "{compared} fields");
    }

    #[test]
    fn every_field_stands_in_the_table_of_the_services_docs() {
        let docs = include_str!("../../docs/serving.md");
        let only = ONLY.iter().map(|(name, ..)| name);
        for name in WITHOUT_EFFECT.iter().chain(only).chain(&CHAT_FIELDS) {
            assert!(docs.contains(&format!("`{name}`")), "{name} is missing");
        }
    }
}
