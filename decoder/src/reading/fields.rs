//! Reading a JSON object field by field, so that every complaint names its field.
//!
//! `null` is the same as absent: transformers writes either.

use serde_json::{Map, Value};

use crate::error::ConfigError;

/// An object, and the name of the field that it is the value of (empty for the file's outermost object). Every error is a
/// [`ConfigError`] that names the field.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    parent: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of a JSON object.
    ///
    /// # Errors
    /// It is none.
    pub fn of(value: &'a Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(object) => Ok(Fields { object, parent: "" }),
            other => Err(ConfigError::NoObject(kind(other))),
        }
    }

    /// The field's value, unless it is absent or `null`.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// All fields, those that are `null` too.
    pub(crate) fn written(&self) -> &'a Map<String, Value> {
        self.object
    }

    /// Names of all fields that are there.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a String> {
        self.object.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name)
    }

    /// The field's full name, as messages give it.
    pub fn path(&self, name: &str) -> String {
        if self.parent.is_empty() { name.to_owned() } else { format!("{}.{name}", self.parent) }
    }

    /// A field that is an object itself, if it is there.
    ///
    /// # Errors
    /// It is something else.
    pub fn object(&self, name: &'a str) -> Result<Option<Fields<'a>>, ConfigError> {
        self.read(name, "an object", |value| Some(Fields { object: value.as_object()?, parent: name }))
    }

    /// A whole number that must be there.
    ///
    /// # Errors
    /// It is not, or of another type.
    pub fn u32(&self, name: &str) -> Result<u32, ConfigError> {
        let as_u32 = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
        self.required(name, self.read(name, "a whole number from 0 to 4294967295", as_u32)?)
    }

    /// A number that must be there.
    ///
    /// # Errors
    /// It is not, or of another type.
    pub fn f64(&self, name: &str) -> Result<f64, ConfigError> {
        self.required(name, self.optional_f64(name)?)
    }

    /// A number, if it is there.
    ///
    /// # Errors
    /// It is of another type.
    pub fn optional_f64(&self, name: &str) -> Result<Option<f64>, ConfigError> {
        self.read(name, "a number", Value::as_f64)
    }

    /// A truth value, if it is there.
    ///
    /// # Errors
    /// It is of another type.
    pub fn optional_bool(&self, name: &str) -> Result<Option<bool>, ConfigError> {
        self.read(name, "true or false", Value::as_bool)
    }

    /// An array, if it is there.
    ///
    /// # Errors
    /// It is of another type.
    pub fn optional_array(&self, name: &str) -> Result<Option<&'a [Value]>, ConfigError> {
        self.read(name, "an array", |value| value.as_array().map(Vec::as_slice))
    }

    /// The value, if there is one.
    ///
    /// # Errors
    /// There is none.
    pub fn required<T>(&self, name: &str, value: Option<T>) -> Result<T, ConfigError> {
        value.ok_or_else(|| ConfigError::Missing { field: self.path(name) })
    }

    /// Nothing, if the field is absent or one of `supported`.
    ///
    /// # Errors
    /// It is something else.
    pub fn only(&self, name: &str, supported: &[Value]) -> Result<(), ConfigError> {
        match self.get(name) {
            Some(value) if !supported.contains(value) => Err(ConfigError::Unsupported {
                field: self.path(name),
                value: excerpt(value),
                supported: match supported {
                    [] => "a configuration without it".to_owned(),
                    _ => supported.iter().map(Value::to_string).collect::<Vec<_>>().join(" or "),
                },
            }),
            _ => Ok(()),
        }
    }

    /// The field converted by `convert`, which gives `None` for a value of the wrong type.
    ///
    /// # Errors
    /// It did.
    pub fn read<T>(
        &self,
        name: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| ConfigError::Type {
            field: self.path(name),
            expected,
            found: excerpt(value),
        })
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The value as JSON, cut where it would fill a screen.
pub(crate) fn excerpt(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
