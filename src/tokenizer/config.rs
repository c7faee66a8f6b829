//! What `tokenizer_config.json` and the files of older checkpoints beside it say.
//!
//! | file | taken from it |
//! |---|---|
//! | tokenizer_config.json | the chat template, the special tokens by name, tokens that tokenizer.json may lack |
//! | special_tokens_map.json | special tokens by name, where the one above lists no `added_tokens_decoder` |
//! | added_tokens.json | tokens that tokenizer.json may lack, likewise |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::Error;
use crate::request::JsonObject;

/// The parts of a tokenizer's configuration that matter to text.
#[derive(Debug, Default)]
pub struct TokenizerConfig {
    /// Of tokenizer_config.json.
    pub path: PathBuf,
    /// `chat_template`, of whatever form; null where there is none.
    pub chat_template: Value,
    /// `bos_token`, `eos_token`, … and what each stands for; those that are null are not here.
    pub special_tokens: JsonObject,
    /// Further tokens that are special.
    pub extra_special_tokens: Vec<String>,
    /// Tokens beside the vocabulary, by id.
    pub added_tokens: BTreeMap<u32, AddedToken>,
    /// Special tokens within a text are text.
    pub split_special_tokens: bool,
    /// A text begins with the `bos_token` where tokenizer.json puts nothing around it: so it is asked of Llama's class, which
    /// makes that itself.
    pub begins_with_bos: bool,
}

impl TokenizerConfig {
    /// Reads what there is in a checkpoint's folder.
    ///
    /// # Errors
    /// A file that is there but cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("tokenizer_config.json");
        let mut fields: JsonObject = read_json(&path)?.unwrap_or_default();
        let mut config = TokenizerConfig { path: path.clone(), ..TokenizerConfig::default() };
        let listed: Option<BTreeMap<u32, Entry>> =
            take(&mut fields, "added_tokens_decoder").map_err(|error| unusable(&path, error))?;
        if listed.is_none() {
            fields.extend(
                read_json::<JsonObject>(&folder.join("special_tokens_map.json"))?.unwrap_or_default(),
            );
        }
        config.chat_template = fields.remove("chat_template").unwrap_or_default();
        config.split_special_tokens = fields.get("split_special_tokens") == Some(&Value::Bool(true));
        let class = fields.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
        config.begins_with_bos = matches!(class, "LlamaTokenizer" | "LlamaTokenizerFast")
            && fields.get("add_bos_token") == Some(&Value::Bool(true));
        for name in ["additional_special_tokens", "extra_special_tokens"] {
            match fields.get(name) {
                Some(Value::Array(tokens)) => {
                    config
                        .extra_special_tokens
                        .extend(tokens.iter().filter_map(token_text).map(str::to_owned));
                }
                Some(Value::Object(named)) => config.name_special_tokens(named),
                _ => {}
            }
        }
        fields.retain(|name, _| name.ends_with("_token"));
        config.name_special_tokens(&fields);
        config.added_tokens = match listed {
            Some(listed) => listed.into_iter().map(|(id, entry)| (id, entry.into())).collect(),
            None => config.older_added_tokens(folder)?,
        };
        Ok(config)
    }

    fn name_special_tokens(&mut self, named: &JsonObject) {
        let texts = named.iter().filter_map(|(name, token)| Some((name.clone(), token_text(token)?.into())));
        self.special_tokens.extend(texts);
    }

    fn older_added_tokens(&self, folder: &Path) -> Result<BTreeMap<u32, AddedToken>, Error> {
        let ids: BTreeMap<String, u32> = read_json(&folder.join("added_tokens.json"))?.unwrap_or_default();
        let special = |text: &str| self.all_special_tokens().any(|token| token == text);
        let token = |(text, id): (String, u32)| (id, AddedToken::from(text.clone(), special(&text)));
        Ok(ids.into_iter().map(token).collect())
    }

    /// The texts of all special tokens, some perhaps twice.
    pub fn all_special_tokens(&self) -> impl Iterator<Item = &str> {
        let named = self.special_tokens.values().filter_map(Value::as_str);
        named.chain(self.extra_special_tokens.iter().map(String::as_str))
    }

    /// The token that ends an answer.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token")?.as_str()
    }
}

/// A token as `added_tokens_decoder` describes it.
#[derive(Deserialize)]
struct Entry {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl From<Entry> for AddedToken {
    fn from(entry: Entry) -> Self {
        AddedToken::from(entry.content, entry.special)
            .single_word(entry.single_word)
            .lstrip(entry.lstrip)
            .rstrip(entry.rstrip)
            .normalized(entry.normalized.unwrap_or(true))
    }
}

/// A special token's text: a text, or in an object that describes the token.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn take<T: serde::de::DeserializeOwned>(
    fields: &mut JsonObject,
    name: &str,
) -> serde_json::Result<Option<T>> {
    serde_json::from_value(fields.remove(name).unwrap_or_default())
}

/// A file's JSON; `None` where there is no file.
///
/// # Errors
/// A file that cannot be read, or holds something else.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let Some(text) = read(path)? else { return Ok(None) };
    serde_json::from_str(&text).map_err(|error| unusable(path, error)).map(Some)
}

/// A file's text; `None` where there is no file. A link to nothing is an error: a cache was cut off, or copied without
/// what it links to.
///
/// # Errors
/// A file that cannot be read, or is no UTF-8.
pub fn read(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(_) if path.symlink_metadata().is_err() => Ok(None),
        Err(error) => Err(unusable(path, error)),
    }
}

/// The error that names a file.
pub fn unusable(path: &Path, error: impl ToString) -> Error {
    Error::TokenizerFile { path: path.to_owned(), reason: error.to_string() }
}
