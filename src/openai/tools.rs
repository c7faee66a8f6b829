//! Which calls of tools a request asks for.
//!
//! ```text
//!   tools                 [{"type": "function", "function": {"name": "f", "parameters": {…}, "strict": true}}, …]
//!   tool_choice           "auto", "none", "required" or {"type": "function", "function": {"name": "f"}}
//!   parallel_tool_calls   true or false
//! ```
//!
//! The tools themselves are the chat template's to read, so long as they are functions: calls of anything else are not told
//! from text. What their parameters say is looked at where calls are asked for, bounded in number, or strict: then the output
//! is held to it.

use serde_json::{Value, json};

use super::error::{FieldError, shown};
use super::fields::{Fields, read};
use crate::request::{ChatPrompt, Prompt};
use crate::tools::{Function, ToolCalls};

/// What a model is to do with its tools.
enum Choice {
    Auto,
    None,
    Required,
    Named(String),
}

/// Takes the fields that say which tools are called. Tools that are not to be used are kept from the model.
///
/// # Errors
/// What can't be read, or asks for calls of tools that are not there.
pub fn tool_calls(fields: &mut Fields<'_>, prompts: &mut [Prompt]) -> Result<Option<ToolCalls>, FieldError> {
    let choice = choice(fields)?;
    let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
    let tools = match prompts {
        [Prompt::Chat(ChatPrompt { tools, .. })] => tools,
        _ => &mut None,
    };
    let (choice, given) = match (choice, tools) {
        (Choice::None, tools) => {
            *tools = None;
            return Ok(None);
        }
        (Choice::Auto, None) => return Ok(None),
        (_, None) => {
            return Err(FieldError::Missing { field: "tools", fix: "tool_choice asks for a call of one" });
        }
        (choice, Some(tools)) => (choice, tools),
    };
    let names = given.iter().enumerate().map(name_of).collect::<Result<Vec<_>, _>>()?;
    let is_strict = given.iter().any(|tool| tool["function"]["strict"] == true);
    if matches!(choice, Choice::Auto) && parallel && !is_strict {
        return Ok(None);
    }
    let named = match &choice {
        Choice::Named(name) => Some(name.as_str()),
        _ => None,
    };
    let functions = functions(given, &names, named)?;
    if functions.is_empty() {
        let fix = "it names no function of tools; give the name of one".to_owned();
        let value = shown(named.unwrap_or_default());
        return Err(FieldError::Unsupported { field: "tool_choice", value, fix });
    }
    let (required, parallel) = (!matches!(choice, Choice::Auto), parallel && named.is_none());
    Ok(Some(ToolCalls { functions, format: None, required, parallel }))
}

fn choice(fields: &mut Fields<'_>) -> Result<Choice, FieldError> {
    const CHOICES: &str = r#""auto", "none", "required" or {"type": "function", "function": {"name": "…"}}"#;
    let Some(raw) = fields.raw("tool_choice") else { return Ok(Choice::Auto) };
    let value: Value = read("tool_choice", raw, CHOICES)?;
    let named = (value["type"] == "function").then(|| value["function"]["name"].as_str()).flatten();
    match (value.as_str(), named) {
        (Some("auto"), _) => Ok(Choice::Auto),
        (Some("none"), _) => Ok(Choice::None),
        (Some("required"), _) => Ok(Choice::Required),
        (_, Some(name)) => Ok(Choice::Named(name.to_owned())),
        _ => {
            let fix = format!("it may be {CHOICES}");
            Err(FieldError::Unsupported { field: "tool_choice", value: shown(raw.get()), fix })
        }
    }
}

/// The name of a tool, which must be a function.
fn name_of((at, tool): (usize, &Value)) -> Result<&str, FieldError> {
    let kind = &tool["type"];
    if !kind.is_null() && kind != "function" {
        let cause = format!(".type is {}; it may only be \"function\"", shown(&kind.to_string()));
        return Err(unreadable(at, &cause));
    }
    let name = tool["function"]["name"].as_str().filter(|name| !name.is_empty());
    name.ok_or_else(|| unreadable(at, ".function has no name; give it one as a text"))
}

/// All functions, or those of a name.
fn functions(tools: &[Value], names: &[&str], named: Option<&str>) -> Result<Vec<Function>, FieldError> {
    let mut functions = Vec::new();
    for (at, (tool, name)) in tools.iter().zip(names).enumerate() {
        if named.is_none_or(|named| named == *name) {
            let parameters = arguments(&tool["function"]["parameters"]).ok_or_else(|| {
                unreadable(at, ".function.parameters is no JSON schema of an object, which arguments are")
            })?;
            functions.push(Function { name: (*name).to_owned(), parameters });
        }
    }
    Ok(functions)
}

fn unreadable(at: usize, cause: &str) -> FieldError {
    FieldError::Unreadable { field: "tools", cause: format!("tools[{at}]{cause}") }
}

/// The schema of a call's arguments: an object, whatever else is said of it. Without any there are none.
fn arguments(parameters: &Value) -> Option<Value> {
    let may_be_object = |kind: &Value| match kind {
        Value::Array(kinds) => kinds.iter().any(|kind| kind == "object"),
        kind => kind.is_null() || kind == "object",
    };
    match parameters {
        Value::Null => Some(json!({"type": "object", "properties": {}, "additionalProperties": false})),
        Value::Bool(true) => Some(json!({"type": "object"})),
        Value::Object(fields) if may_be_object(&parameters["type"]) => {
            let mut fields = fields.clone();
            fields.insert("type".to_owned(), "object".into());
            Some(Value::Object(fields))
        }
        _ => None,
    }
}
