//! `/v1/embeddings`: what its bodies ask for and what its answers hold, for lines and the service alike.
//!
//! ```text
//!   input: "…", [ids], ["…", "…"], [[ids], [ids]] ──> a request each ──> Embeddings { data: [{ index, embedding }] }
//!   encoding_format  float:   [0.25, -0.5, …]
//!                    base64:  "AACAPgAAAL8…"    the same values, four bytes each, the lowest first
//! ```

use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::{Serialize, Serializer};

use super::body::{name_of, text_prompts};
use super::error::FieldError;
use super::fields::Fields;
use super::model_name::ModelName;
use super::rest::{Only, check_only, take_without_effect};
use crate::embed::EmbedRequest;
use crate::request::{Completion, GenerateRequest, Prompt};

/// How an embedding's values are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// A list of numbers.
    #[default]
    Float,
    /// Their bytes as base64: less than half as long.
    Base64,
}

/// What a body asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbedBody {
    /// What is embedded.
    pub prompts: Vec<Prompt>,
    /// How many values each embedding is to have.
    pub dimensions: Option<u32>,
    /// How they are written.
    pub encoding: Encoding,
    /// The name by which it calls the model.
    pub model: Option<Arc<str>>,
}

/// Fields of vLLM's that are taken where they ask for nothing.
const ONLY: [Only; 4] = [
    ("add_special_tokens", &["true"], "the tokenizer's are added to texts; give token ids for others"),
    ("messages", &[], "texts and token ids are embedded; give the conversation as one of them"),
    ("normalize", &["true"], "embeddings have length 1, unless the checkpoint's files say otherwise"),
    ("truncate_prompt_tokens", &[], "prompts are not cut"),
];

impl EmbedBody {
    /// Reads what a request asks for, its prompts in the field `input`.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn read(
        mut fields: Fields<'_>,
        input: &'static str,
        model: &ModelName,
    ) -> Result<EmbedBody, FieldError> {
        fields.check_once()?;
        let model = name_of(model, &mut fields)?;
        let dimensions = fields.whole("dimensions", 1, "a whole number from 1 on")?;
        let encoding = encoding(&mut fields)?;
        let fix = "give what is to be embedded: a text or a list of token ids";
        let value = fields.raw(input).ok_or(FieldError::Missing { field: input, fix })?;
        let prompts = text_prompts(input, value)?;
        take_without_effect(&mut fields);
        check_only(&mut fields, &ONLY)?;
        fields.finish()?;
        Ok(EmbedBody { prompts, dimensions: dimensions.map(|count| count as u32), encoding, model })
    }

    /// The requests that it makes, in the order of its prompts.
    pub fn requests(self) -> impl ExactSizeIterator<Item = GenerateRequest> {
        let dimensions = self.dimensions;
        self.prompts.into_iter().map(move |prompt| EmbedRequest { prompt, dimensions }.into())
    }
}

fn encoding(fields: &mut Fields<'_>) -> Result<Encoding, FieldError> {
    match fields.text("encoding_format")?.as_deref() {
        None | Some("float") => Ok(Encoding::Float),
        Some("base64") => Ok(Encoding::Base64),
        Some(other) => Err(FieldError::Wrong {
            field: "encoding_format",
            value: super::shown(&format!("{other:?}")),
            expected: "\"float\" or \"base64\"",
        }),
    }
}

/// An answer.
#[derive(Debug, Serialize)]
pub struct Embeddings<'a> {
    object: &'static str,
    data: Vec<Item<'a>>,
    model: &'a str,
    usage: InputUsage,
}

#[derive(Debug, Serialize)]
struct Item<'a> {
    object: &'static str,
    index: u32,
    embedding: Vector<'a>,
}

/// Tokens in; nothing comes out.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct InputUsage {
    prompt_tokens: u32,
    total_tokens: u32,
}

impl<'a> Embeddings<'a> {
    /// Of what came of a body's requests, in their order.
    pub fn new(model: &'a str, encoding: Encoding, completions: &'a [Completion]) -> Self {
        let tokens = completions.iter().map(|completion| completion.prompt_tokens).sum();
        let item = |(index, completion)| Item {
            object: "embedding",
            index,
            embedding: Vector::of(completion, encoding),
        };
        Embeddings {
            object: "list",
            data: (0..).zip(completions).map(item).collect(),
            model,
            usage: InputUsage { prompt_tokens: tokens, total_tokens: tokens },
        }
    }
}

/// An embedding's values, to be written.
#[derive(Clone, Copy, Debug)]
pub struct Vector<'a> {
    values: &'a [f32],
    encoding: Encoding,
}

impl<'a> Vector<'a> {
    /// Of what came of a request.
    pub fn of(completion: &'a Completion, encoding: Encoding) -> Self {
        Vector { values: completion.embedding.as_deref().unwrap_or_default(), encoding }
    }
}

impl Serialize for Vector<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.encoding {
            Encoding::Float => self.values.serialize(serializer),
            Encoding::Base64 => {
                let bytes: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                serializer.serialize_str(&BASE64_STANDARD.encode(bytes))
            }
        }
    }
}
