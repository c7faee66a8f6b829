//! What is wrong with a request's fields: which one, what it holds, what to do.

use minisgl_core::request::SubmitError;
use thiserror::Error;

use super::INVALID_REQUEST;
use crate::request::RequestError;

/// The status of a request that ran or was to run and has no output, and OpenAI's type of its error.
pub fn status(error: &RequestError) -> (u16, &'static str) {
    match error {
        RequestError::NotNumbers => (500, "server_error"),
        RequestError::EngineFailed { .. }
        | RequestError::Refused(SubmitError::QueueFull { .. } | SubmitError::Stopped) => {
            (503, "service_unavailable")
        }
        _ => (400, INVALID_REQUEST),
    }
}

/// How much of a request an error repeats, in characters.
const SHOWN_MAX: usize = 60;

/// Text that is no JSON object.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ObjectError {
    /// Text that is no JSON.
    #[error("not valid JSON: {cause} at line {line}, column {column}; a request is a JSON object")]
    NotJson {
        /// What the parser says.
        cause: String,
        /// Where, counted from 1.
        line: usize,
        /// Where in that line, counted from 1.
        column: usize,
    },
    /// JSON of another kind.
    #[error("not a JSON object; a request is one")]
    NotObject,
}

/// Why a request can't be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FieldError {
    /// A field that must be there.
    #[error("the request has no {field}; {fix}")]
    Missing {
        /// Its name.
        field: &'static str,
        /// What to give.
        fix: &'static str,
    },
    /// A key that occurs twice in an object.
    #[error("{field} is given twice; keep one")]
    Twice {
        /// Its name.
        field: String,
    },
    /// A field that means nothing here: most likely misspelt.
    #[error("there is no field {field:?}; {fix}")]
    Unknown {
        /// Its name.
        field: String,
        /// What to do.
        fix: String,
    },
    /// A field that only conversations have.
    #[error("{field} goes with messages; give the prompt as messages, or leave {field} out")]
    NeedsMessages {
        /// Its name.
        field: &'static str,
    },
    /// A value of another type, or out of range.
    #[error("{field} is {value}; it must be {expected}")]
    Wrong {
        /// Its name.
        field: &'static str,
        /// The beginning of what it holds, as JSON.
        value: String,
        /// What it may hold.
        expected: &'static str,
    },
    /// A value that can't be read though the request is JSON: nested too deep, a number too large, half a character.
    #[error("{field} can't be read: {cause}")]
    Unreadable {
        /// Its name.
        field: &'static str,
        /// What the parser says.
        cause: String,
    },
    /// A value that asks for what is not done here.
    #[error("{field} is {value}; {fix}")]
    Unsupported {
        /// Its name.
        field: &'static str,
        /// The beginning of what it holds, as JSON.
        value: String,
        /// What to do.
        fix: String,
    },
    /// Two fields that contradict each other.
    #[error("{field} is {value} and {other} says otherwise; {fix}")]
    Contradiction {
        /// One.
        field: &'static str,
        /// The beginning of what it holds, as JSON.
        value: String,
        /// The other.
        other: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// No prompt, or several.
    #[error("give {right}")]
    Prompt {
        /// Where it belongs, if there is one such place.
        field: Option<&'static str>,
        /// What is right.
        right: &'static str,
    },
    /// Another model than the one that runs.
    #[error("model is {asked:?}, but {loaded:?} is loaded; correct it or leave it out")]
    Model {
        /// As the request says.
        asked: String,
        /// What runs.
        loaded: String,
    },
    /// An error of a field of an object that is a field itself.
    #[error("in {object}, {error}")]
    Within {
        /// The object's name.
        object: &'static str,
        /// The field's, behind the object's and a point.
        field: String,
        /// What is wrong with it.
        error: Box<FieldError>,
    },
}

impl FieldError {
    /// The same error, of a field of `object`; one that names the object already stays as it is.
    pub fn within(self, object: &'static str) -> Self {
        let inner = self.field().unwrap_or_default();
        if inner.split('.').next() == Some(object) {
            return self;
        }
        FieldError::Within { object, field: format!("{object}.{inner}"), error: Box::new(self) }
    }

    /// A field that means nothing, and the known one that it may have been meant to be.
    pub(super) fn unknown(field: &str, near: Option<&str>) -> Self {
        let fix = match near {
            Some(near) => format!("did you mean {near}?"),
            None => "remove or correct it".to_owned(),
        };
        FieldError::Unknown { field: shown(field), fix }
    }

    /// The field that it is about, where it is about one.
    pub fn field(&self) -> Option<&str> {
        match self {
            FieldError::Prompt { field, .. } => *field,
            FieldError::Model { .. } => Some("model"),
            FieldError::Missing { field, .. }
            | FieldError::Wrong { field, .. }
            | FieldError::Unreadable { field, .. }
            | FieldError::Unsupported { field, .. }
            | FieldError::NeedsMessages { field }
            | FieldError::Contradiction { field, .. } => Some(field),
            FieldError::Twice { field }
            | FieldError::Unknown { field, .. }
            | FieldError::Within { field, .. } => Some(field),
        }
    }

    /// OpenAI's word for this kind of error, where it has one.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            FieldError::Missing { .. } | FieldError::Prompt { .. } => Some("missing_required_parameter"),
            FieldError::Unknown { .. } | FieldError::NeedsMessages { .. } => Some("unknown_parameter"),
            FieldError::Wrong { .. } | FieldError::Unreadable { .. } | FieldError::Contradiction { .. } => {
                Some("invalid_value")
            }
            FieldError::Unsupported { .. } => Some("unsupported_value"),
            FieldError::Model { .. } => Some("model_not_found"),
            FieldError::Twice { .. } => None,
            FieldError::Within { error, .. } => error.code(),
        }
    }
}

/// A part of a request, cut where it is long.
pub fn shown(part: &str) -> String {
    match part.char_indices().nth(SHOWN_MAX) {
        None => part.to_owned(),
        Some((end, _)) => format!("{}…", &part[..end]),
    }
}
