//! What a run goes on from, as Python gives it.
//!
//! ```text
//!   "text"  {"prompt": "text"}                                        a text
//!   [1, 2]  array([1, 2])  {"prompt_token_ids": [1, 2]}               token ids; arrays are numpy's, torch's, …
//!   Chat(messages, …)                                                 a conversation
//! ```

use minisgl::{ChatPrompt, Message, Prompt};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyDict, PyString};
use serde::de::DeserializeOwned;

use crate::array::token_ids;

/// A conversation for the chat template. Everything that is made of dicts comes as JSON.
#[pyclass(module = "minisgl._minisgl", frozen)]
pub struct Chat(ChatPrompt);

#[pymethods]
impl Chat {
    #[new]
    #[pyo3(signature = (messages, *, tools, kwargs, add_generation_prompt, continue_final_message))]
    fn new(
        messages: &str,
        tools: Option<&str>,
        kwargs: Option<&str>,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> PyResult<Self> {
        let messages: Vec<Message> = parse("messages", messages)?;
        Ok(Chat(ChatPrompt {
            tools: tools.map(|tools| parse("tools", tools)).transpose()?,
            kwargs: kwargs
                .map(|kwargs| parse("chat_template_kwargs", kwargs))
                .transpose()?
                .unwrap_or_default(),
            add_generation_prompt,
            continue_final_message,
            ..ChatPrompt::new(messages)
        }))
    }
}

fn parse<T: DeserializeOwned>(what: &str, json: &str) -> PyResult<T> {
    serde_json::from_str(json).map_err(|error| PyValueError::new_err(format!("{what}: {error}")))
}

/// A prompt of any of the forms.
pub fn prompt(given: &Bound<'_, PyAny>) -> PyResult<Prompt> {
    if let Ok(text) = given.cast::<PyString>() {
        return Ok(Prompt::Text(text.to_str()?.to_owned()));
    }
    if let Ok(chat) = given.cast::<Chat>() {
        return Ok(Prompt::Chat(chat.get().0.clone()));
    }
    if let Ok(fields) = given.cast::<PyDict>() {
        return of_fields(fields);
    }
    if let Some(ids) = token_ids(given)? {
        return Ok(Prompt::Tokens(ids));
    }
    let refused = |reason: String| {
        let kind = given.get_type().name().map_or_else(|_| "?".to_owned(), |name| name.to_string());
        PyTypeError::new_err(format!(
            "a prompt is a text, token ids (a list or an array of integers, 0 or above), or a dict with `prompt` or \
             `prompt_token_ids`; this one is of type {kind}: {reason}"
        ))
    };
    // They are sequences of integers too, but nobody means those.
    if given.is_instance_of::<PyBytes>() || given.is_instance_of::<PyByteArray>() {
        return Err(refused("decode it to a text".to_owned()));
    }
    given.extract::<Vec<u32>>().map(Prompt::Tokens).map_err(|error| refused(error.to_string()))
}

fn of_fields(fields: &Bound<'_, PyDict>) -> PyResult<Prompt> {
    let set = |name: &str| Ok::<_, PyErr>(fields.get_item(name)?.filter(|value| !value.is_none()));
    if let Some(other) = set("multi_modal_data")?.or(set("prompt_embeds")?) {
        let reason =
            format!("a prompt is a text or token ids; images, audio and embeddings ({other}) are not read");
        return Err(PyValueError::new_err(reason));
    }
    match (set("prompt_token_ids")?, set("prompt")?) {
        (Some(ids), _) => prompt(&ids),
        (None, Some(text)) => prompt(&text),
        (None, None) => {
            Err(PyValueError::new_err("a prompt's dict has neither `prompt` nor `prompt_token_ids`"))
        }
    }
}
