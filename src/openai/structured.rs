//! What an output is to be, as requests say it.
//!
//! ```text
//!   response_format      {"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}    OpenAI's
//!   structured_outputs   {"json": {…}}, {"json_object": true}, {"regex": "…"}, {"choice": […]}, {"grammar": "…"}        vLLM's
//! ```

use serde_json::Value;

use super::error::{FieldError, shown};
use super::fields::Fields;
use crate::grammar::Grammar;

const FORMATS: &str = "its type may be text, json_object or json_schema";
const ONE: &str = "ask for one thing";

/// Takes the fields that ask for constrained output: which of them does, and for what.
///
/// # Errors
/// What can't be read, or asks for two things.
pub fn grammar(fields: &mut Fields<'_>) -> Result<Option<(&'static str, Grammar)>, FieldError> {
    const FORMAT: &str = "response_format";
    const OUTPUTS: &str = "structured_outputs";
    let format: Option<Fields<'_>> = fields.take(FORMAT, "an object")?;
    let outputs: Option<Fields<'_>> = fields.take(OUTPUTS, "an object")?;
    let format = format.map(response_format).transpose().map_err(|error| error.within(FORMAT))?.flatten();
    let outputs =
        outputs.map(structured_outputs).transpose().map_err(|error| error.within(OUTPUTS))?.flatten();
    match (format, outputs) {
        (Some(_), Some(_)) => Err(FieldError::Contradiction {
            field: FORMAT,
            value: "a format".to_owned(),
            other: OUTPUTS,
            fix: ONE,
        }),
        (Some(format), None) => Ok(Some((FORMAT, format))),
        (None, outputs) => Ok(outputs.map(|outputs| (OUTPUTS, outputs))),
    }
}

fn response_format(mut format: Fields<'_>) -> Result<Option<Grammar>, FieldError> {
    let Some(kind) = format.text("type")? else {
        return Err(FieldError::Missing { field: "response_format.type", fix: FORMATS });
    };
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(Grammar::JsonObject),
        "json_schema" => {
            let missing =
                FieldError::Missing { field: "response_format.json_schema", fix: "give the schema there" };
            let json: Fields<'_> = format.take("json_schema", "an object")?.ok_or(missing)?;
            Some(json_schema(json).map_err(|error| error.within("json_schema"))?)
        }
        other => {
            let value = shown(&format!("{other:?}"));
            return Err(FieldError::Unsupported { field: "response_format", value, fix: FORMATS.to_owned() });
        }
    };
    format.finish()?;
    Ok(grammar)
}

fn json_schema(mut json: Fields<'_>) -> Result<Grammar, FieldError> {
    // For the model to read; the output is valid whether strictness is asked for or not.
    for told in ["name", "description", "strict"] {
        json.raw(told);
    }
    let schema = json.take("schema", "a JSON schema")?;
    json.finish()?;
    Ok(schema.map_or(Grammar::JsonObject, Grammar::JsonSchema))
}

fn structured_outputs(mut outputs: Fields<'_>) -> Result<Option<Grammar>, FieldError> {
    let json = outputs.take("json", "a JSON schema, or its text")?.map(schema).transpose()?;
    let object = outputs.flag("json_object")?.unwrap_or(false).then_some(Grammar::JsonObject);
    let regex = outputs.text("regex")?.map(Grammar::Regex);
    let choice = outputs.take("choice", "a list of texts")?.map(Grammar::Choice);
    let grammar = outputs.text("grammar")?.map(Grammar::Lark);
    outputs.finish()?;
    let mut asked = [json, object, regex, choice, grammar].into_iter().flatten();
    match (asked.next(), asked.next()) {
        (_, Some(_)) => Err(FieldError::Unsupported {
            field: "structured_outputs",
            value: "several at once".to_owned(),
            fix: ONE.to_owned(),
        }),
        (one, None) => Ok(one),
    }
}

/// A schema, which may stand as a text.
fn schema(value: Value) -> Result<Grammar, FieldError> {
    let Value::String(text) = &value else { return Ok(Grammar::JsonSchema(value)) };
    let parsed = serde_json::from_str(text).map(Grammar::JsonSchema);
    parsed.map_err(|error| FieldError::Unreadable {
        field: "structured_outputs.json",
        cause: shown(&error.to_string()),
    })
}
