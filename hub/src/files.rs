//! Which of a repository's files a model is opened from.

use std::fs;
use std::path::Path;

use crate::error::HubError;
use crate::index::{INDEX, is_inside, shards};
use crate::name::RepoName;

const SINGLE: &str = "model.safetensors";

/// Files beside the weights, where there are any of them.
const BESIDE: [&str; 10] = [
    "config.json",
    "hf_quant_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
];
/// How the file ends that says how hidden states become an embedding; sentence-transformers numbers its folder.
const POOLING: &str = "_Pooling/config.json";
/// Folder of a model's further chat templates.
const TEMPLATES: &str = "additional_chat_templates/";

/// What is to be fetched.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    /// Configuration, tokenizer, templates, and the index if there is one.
    pub beside: Vec<String>,
    /// The weights; empty where the index names them.
    pub weights: Vec<String>,
}

/// Chooses among the files of a repository.
pub(crate) fn needed(name: &RepoName, files: &[String]) -> Result<Needed, HubError> {
    let has = |file: &str| files.iter().any(|it| it == file);
    let is_template = |file: &&String| file.starts_with(TEMPLATES) && file.ends_with(".jinja");
    let mut beside: Vec<String> =
        BESIDE.iter().filter(|file| has(file)).map(|file| (*file).to_owned()).collect();
    let is_pooling = |file: &&String| file.ends_with(POOLING);
    beside.extend(files.iter().filter(|file| is_template(file) || is_pooling(file)).cloned());
    if let Some(file) = beside.iter().find(|file| !is_inside(file)) {
        return Err(HubError::NoFile {
            name: name.to_string(),
            file: format!("file of a usable name, but {file}"),
        });
    }
    if !has("config.json") {
        return Err(without(name, files, "config.json"));
    }
    if has(SINGLE) {
        return Ok(Needed { beside, weights: vec![SINGLE.to_owned()] });
    }
    if has(INDEX) {
        beside.push(INDEX.to_owned());
        return Ok(Needed { beside, weights: Vec::new() });
    }
    let is_shard = |file: &&String| {
        file.ends_with(".safetensors") && !file.contains('/') && other_layout(file).is_none()
    };
    let weights: Vec<String> = files.iter().filter(is_shard).cloned().collect();
    match weights.is_empty() {
        true => Err(without(name, files, SINGLE)),
        false => Ok(Needed { beside, weights }),
    }
}

/// Why a repository of these files lacks one: by what they are in place of it, if that can be told.
fn without(name: &RepoName, files: &[String], missing: &str) -> HubError {
    let name = name.to_string();
    // Beside safetensors they are what training left.
    let is_safetensors = |file: &String| file.ends_with(".safetensors");
    let is_other_format = |file: &&String| {
        [".bin", ".pth", ".pt", ".gguf"].iter().any(|end| file.ends_with(end))
            && !files.iter().any(is_safetensors)
    };
    if let Some((file, what)) = files.iter().find_map(|file| Some((file, other_layout(file)?))) {
        return HubError::OtherLayout { name, file: file.clone(), what };
    }
    match files.iter().find(is_other_format) {
        Some(file) => HubError::NoSafetensors { name, file: file.clone() },
        None => HubError::NoFile { name, file: missing.to_owned() },
    }
}

/// What a file is that belongs to no model in the hub's usual layout, and what to do.
fn other_layout(file: &str) -> Option<&'static str> {
    const ADAPTER: &str = "is an adapter's: merge it into the model that it was trained on, and give the directory of the result";
    const MAKERS: &str =
        "is of its makers' own layout; look for a repository that has config.json and model*.safetensors";
    let begins = |starts: [&str; 2]| starts.iter().any(|start| file.starts_with(start));
    match file {
        _ if begins(["adapter_config.json", "adapter_model"]) => Some(ADAPTER),
        _ if begins(["params.json", "consolidated"]) => Some(MAKERS),
        _ => None,
    }
}

/// Does a snapshot have its weights? Then it has everything, since they come last.
pub(crate) fn is_whole(snapshot: &Path) -> bool {
    let has = |file: &str| snapshot.join(file).exists();
    if !has("config.json") {
        return false;
    }
    if has(SINGLE) {
        return true;
    }
    match fs::read(snapshot.join(INDEX)) {
        Ok(index) => shards(&index).is_some_and(|shards| shards.iter().all(|shard| has(shard))),
        Err(_) => fs::read_dir(snapshot).is_ok_and(|entries| {
            let is_shard = |name: &Path| name.extension().is_some_and(|it| it == "safetensors");
            entries.flatten().any(|entry| is_shard(&entry.path()) && entry.path().exists())
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(files: &[&str]) -> Result<Needed, HubError> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        needed(&"a/b".parse().unwrap(), &files)
    }

    #[test]
    fn only_what_a_model_is_opened_from_is_fetched_and_safetensors_before_all_else() {
        let all = [
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "vocab.json",
            "model.safetensors",
            "pytorch_model.bin",
            "onnx/model.onnx",
            "original/consolidated.00.pth",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "logo.jinja",
            "modules.json",
            "1_Pooling/config.json",
            "2_Dense/config.json",
        ];
        let needed = choose(&all).unwrap();
        assert_eq!(needed.weights, ["model.safetensors"]);
        let beside = "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja \
                      modules.json additional_chat_templates/tool_use.jinja 1_Pooling/config.json";
        assert_eq!(needed.beside.join(" "), beside);
    }

    #[test]
    fn shards_are_those_of_the_index_and_without_one_all() {
        let indexed =
            choose(&["config.json", INDEX, "model-1.safetensors", "consolidated.safetensors"]).unwrap();
        assert_eq!((indexed.beside.len(), indexed.weights.len()), (2, 0));
        let listed = choose(&["config.json", "b.safetensors", "a.safetensors", "sub/c.safetensors"]).unwrap();
        assert_eq!(listed.weights, ["b.safetensors", "a.safetensors"]);
    }

    #[test]
    fn what_is_no_model_is_refused_by_what_it_lacks() {
        let refusal = |files: &[&str]| choose(files).unwrap_err().to_string();
        assert!(refusal(&["model.safetensors"]).contains("config.json"));
        assert!(refusal(&["model.safetensors", "training_args.bin"]).contains("config.json"));
        assert!(refusal(&["config.json"]).contains("model.safetensors"));
        assert!(refusal(&["config.json", "pytorch_model.bin"]).contains("pytorch_model.bin"));
        assert!(refusal(&["README.md", "model-Q4_K_M.gguf"]).contains("model-Q4_K_M.gguf"));
        assert!(refusal(&["adapter_config.json", "adapter_model.safetensors"]).contains("merge"));
        assert!(refusal(&["config.json", "adapter_model-00001-of-00002.safetensors"]).contains("merge"));
        assert!(refusal(&["config.json", "consolidated.safetensors", "tekken.json"]).contains("own layout"));
        assert!(
            refusal(&["config.json", "model.safetensors", "additional_chat_templates/../../x.jinja"])
                .contains("x.jinja")
        );
    }
}
