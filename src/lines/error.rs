//! What is wrong with a request line, and what to do.

use thiserror::Error;

use crate::openai::{FieldError, ObjectError};

/// Why a line is no request that can run.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LineError {
    /// More bytes than a line may have.
    #[error("the line has more than {max} bytes; shorten it, or raise --max-line-bytes")]
    TooLong {
        /// How many it may have.
        max: usize,
    },
    /// Bytes that are no text.
    #[error("not valid UTF-8 at byte {at}; save the file as UTF-8")]
    NotUtf8 {
        /// Where, counted from 1.
        at: usize,
    },
    /// Text that is no JSON.
    #[error("not valid JSON: {cause} at column {column}; a request is one JSON object on one line")]
    NotJson {
        /// What the parser says.
        cause: String,
        /// Where, counted from 1.
        column: usize,
    },
    /// JSON of another kind.
    #[error("not a JSON object; a request is one JSON object on one line")]
    NotObject,
    /// Nothing to tell its result by.
    #[error("the request has no {field}; give it one, any JSON value but null")]
    NoId {
        /// `id`, or `custom_id` in a Batch line.
        field: &'static str,
    },
    /// A field of the request.
    #[error(transparent)]
    Field(#[from] FieldError),
}

impl From<ObjectError> for LineError {
    fn from(error: ObjectError) -> Self {
        match error {
            ObjectError::NotJson { cause, column, .. } => LineError::NotJson { cause, column },
            ObjectError::NotObject => LineError::NotObject,
        }
    }
}

impl LineError {
    /// The field that it is about, where it is about one.
    pub fn field(&self) -> Option<&str> {
        match self {
            LineError::NoId { field } => Some(field),
            LineError::Field(error) => error.field(),
            _ => None,
        }
    }

    /// OpenAI's word for this kind of error, where it has one.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            LineError::NoId { .. } => Some("missing_required_parameter"),
            LineError::Field(error) => error.code(),
            _ => None,
        }
    }
}
