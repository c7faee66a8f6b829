//! Jinja2 as transformers sets it up, by minijinja.
//!
//! Lines of statements leave no white space behind (`trim_blocks`, `lstrip_blocks`); `break` and `continue` are known;
//! `generation` blocks print what they hold; `raise_exception`, `strftime_now` and `tojson` are there. What minijinja
//! does otherwise than Jinja2 is put right here and in `python`. Left are things that templates of conversations don't
//! do: `'%s' % x`, `cycler`, `joiner` and filters like `center`, `truncate` and `wordcount` are errors, and floats beyond 1e16
//! print without an exponent outside of `tojson`.
//!
//! A template is a program of others': one that does not end, or whose text grows without end, is refused once it has used up what
//! [`FUEL`] allows.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};

use super::{json, python};

/// Steps that a rendering may take, where 64 bytes that it makes or goes through are a step too: 256 MiB, and some tenths of a
/// second. A conversation of 8 MB whose texts are gone through ten times takes a third of it.
const FUEL: u64 = 1 << 22;

/// An environment without templates.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.expect("the delimiters are Jinja's own"));
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(python::method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("int", int);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment
}

/// Did a rendering end because it had used up what it may?
pub fn is_endless(error: &Error) -> bool {
    error.kind() == ErrorKind::OutOfFuel
}

/// Why a rendering failed: what the template raised, or what it tripped over and in which line.
pub fn reason(error: &Error) -> String {
    if is_endless(error) {
        return format!(
            "it takes more than {FUEL} steps, or makes more text than as many times 64 bytes ({error}); shorten the conversation, or give \
             the prompt as text"
        );
    }
    let raised = std::error::Error::source(error).is_some_and(|cause| cause.is::<Raised>());
    error.detail().filter(|_| raised).map_or_else(|| error.to_string(), str::to_owned)
}

/// Accounts for so many bytes that are made, or gone through, outside of the engine.
///
/// # Errors
/// The rendering has used up what it may.
pub fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / 64)
}

/// The cause of errors that the template itself raises.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

fn raise_exception(message: Value) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_string()).with_source(Raised))
}

/// Now, by the local clock, in a format of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}")))
}

/// `int`: what is no number is 0, or what the template says.
fn int(
    state: &State,
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    named: Kwargs,
) -> Result<Value, Error> {
    let default = default.or(named.get("default")?).unwrap_or(Value::from(0));
    minijinja::filters::int(state, value, Some(default), base, named)
}

/// Python: what has a length and places.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

/// None has no items in Python, not even no items.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// A template's source with newlines as Jinja2 reads them, and its `generation` blocks as blocks that minijinja knows.
/// Such a block is a scope of its own, as `with` is.
pub fn as_minijinja(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut rest = source.as_str();
    let mut written = String::with_capacity(source.len());
    while let Some(at) = rest.find('{') {
        let end = match rest.as_bytes().get(at + 1) {
            Some(b'#') => end_of(&rest[at..], "#}"),
            Some(b'{') => end_of_code(&rest[at..], "}}"),
            Some(b'%') => end_of_code(&rest[at..], "%}"),
            _ => 1,
        };
        let (before, from) = rest.split_at(at);
        let (tag, behind) = from.split_at(end);
        written += before;
        let word = tag.trim_start_matches(['{', '%', '-', '+']).trim_start();
        let word = word.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
        match (tag.starts_with("{%"), word) {
            (true, "generation" | "endgeneration") => {
                written += &tag.replacen(word, if word == "generation" { "with" } else { "endwith" }, 1);
            }
            _ => written += tag,
        }
        rest = behind;
        if tag.starts_with("{%") && word == "raw" {
            let end = rest.find("endraw").unwrap_or(rest.len());
            written += &rest[..end];
            // The statement that ends it is text up to here: it is copied as such.
            rest = &rest[end..];
        }
    }
    written + rest
}

/// Where a comment ends: behind `close`, or with the source.
fn end_of(source: &str, close: &str) -> usize {
    source.find(close).map_or(source.len(), |at| at + close.len())
}

/// Where an expression or a statement ends: behind the first `close` that is not within a string.
fn end_of_code(source: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, byte) in source.bytes().enumerate().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if byte == b'\\' => escaped = true,
            Some(open) if byte == open => quote = None,
            Some(_) => {}
            None if byte == b'\'' || byte == b'"' => quote = Some(byte),
            None if source.as_bytes()[at..].starts_with(close.as_bytes()) => return at + close.len(),
            None => {}
        }
    }
    source.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_scopes_and_nothing_else_changes() {
        let cases = [
            ("{% generation %}a{% endgeneration %}", "{% with %}a{% endwith %}"),
            ("{%- generation -%}a{%+ endgeneration -%}", "{%- with -%}a{%+ endwith -%}"),
            ("{%generation%}{%endgeneration%}", "{%with%}{%endwith%}"),
            (
                "{{ '{% generation %}' }}{# {% generation %} #}",
                "{{ '{% generation %}' }}{# {% generation %} #}",
            ),
            ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
            ("{% set generation = '%}' %}{{ \"}}\" }}", "{% set generation = '%}' %}{{ \"}}\" }}"),
            ("a\r\nb\rc {", "a\nb\nc {"),
            ("{% if generation %}{%", "{% if generation %}{%"),
        ];
        for (source, expected) in cases {
            assert_eq!(as_minijinja(source), expected);
        }
    }
}
