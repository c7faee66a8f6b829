//! By which names a request may call the model that runs.

use std::sync::Arc;

/// A model's names: as `--model` has it, and its last part, so that both `Qwen/Qwen3-0.6B` and `Qwen3-0.6B` are meant
/// by either, and the folder `~/models/Qwen3-0.6B` by its own name. A folder of Hugging Face's cache
/// (`…/models--Qwen--Qwen3-0.6B/snapshots/…`) is called as the model that it holds.
#[derive(Clone, Debug)]
pub struct ModelName {
    names: Vec<Arc<str>>,
}

impl ModelName {
    /// Of a model as it was asked for: a checkpoint's folder, a preset, or a name.
    pub fn new(model: &str) -> Self {
        let whole = model.trim_end_matches('/');
        let cached = whole.split('/').find_map(|part| part.strip_prefix("models--"));
        let cached = cached.map(|name| name.replace("--", "/"));
        let mut names: Vec<Arc<str>> = Vec::new();
        for name in cached.iter().map(String::as_str).chain([whole]) {
            names.push(name.into());
            if let Some((_, last)) = name.rsplit_once('/') {
                names.push(last.into());
            }
        }
        ModelName { names }
    }

    /// What it is called where nobody asked.
    pub fn first(&self) -> &Arc<str> {
        &self.names[0]
    }

    /// The name that equals `asked`.
    pub fn find(&self, asked: &str) -> Option<&Arc<str>> {
        let asked = asked.trim_end_matches('/');
        self.names.iter().find(|name| &***name == asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_as_it_was_asked_for_or_by_its_last_part() {
        let name = ModelName::new("Qwen/Qwen3-0.6B/");
        assert_eq!(&**name.first(), "Qwen/Qwen3-0.6B");
        for (asked, found) in [
            ("Qwen/Qwen3-0.6B", true),
            ("Qwen3-0.6B", true),
            ("Qwen3-0.6B/", true),
            ("Qwen", false),
            ("qwen3-0.6b", false),
            ("", false),
        ] {
            assert_eq!(name.find(asked).is_some(), found, "{asked}");
        }
        assert!(ModelName::new("tiny").find("tiny").is_some());
    }

    #[test]
    fn a_folder_of_the_cache_is_called_as_the_model_in_it() {
        let name = ModelName::new("/home/u/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abcd");
        assert_eq!(&**name.first(), "Qwen/Qwen3-0.6B");
        assert!(name.find("Qwen3-0.6B").is_some() && name.find("0123abcd").is_some());
        assert!(name.find("snapshots").is_none());
    }
}
