//! Which shards a model's index names.
//!
//! Invariant: a file that is named lies in the folder of the index or below it, and its name is written in one way alone.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use serde_json::Value;

pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The shards that an index names, each once; `None` where it is no index, or one of no file.
pub(crate) fn shards(index: &[u8]) -> Option<Vec<String>> {
    let index: Value = serde_json::from_slice(index).ok()?;
    let files = index.get("weight_map")?.as_object()?.values().map(|file| file.as_str().map(str::to_owned));
    let files: BTreeSet<String> = files.collect::<Option<_>>()?;
    let is_usable = !files.is_empty() && files.iter().all(|file| is_inside(file));
    is_usable.then(|| files.into_iter().collect())
}

/// Does a path stay inside the folder that it starts from, by a name in each step?
pub(crate) fn is_inside(file: &str) -> bool {
    let is_name = |part: &str| {
        Path::new(part).components().eq([Component::Normal(part.as_ref())]) && !part.contains(['\\', '\0'])
    };
    file.split('/').all(is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_named_once_and_none_leads_elsewhere() {
        assert_eq!(shards(br#"{"weight_map": {"x": "b", "y": "a", "z": "b"}}"#).unwrap(), ["a", "b"]);
        assert_eq!(shards(br#"{"weight_map": {"x": "a/b"}}"#).unwrap(), ["a/b"]);
        for bad in ["", "{}", "[]", r#"{"weight_map": {}}"#, r#"{"weight_map": {"x": 1}}"#] {
            assert_eq!(shards(bad.as_bytes()), None, "{bad}");
        }
        for outside in
            ["", ".", "..", "/a", "../a", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", "a\\b", "a\0b"]
        {
            let index = serde_json::json!({"weight_map": {"x": "good", "y": outside}}).to_string();
            assert_eq!(shards(index.as_bytes()), None, "{outside:?}");
        }
    }
}
