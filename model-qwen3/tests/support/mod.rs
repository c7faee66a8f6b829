//! Checkpoints made on the fly: a good one, whose files a test then spoils.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod golden;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use minisgl_decoder::{Config, ConfigError, Family};
use minisgl_qwen3::QWEN3;
use serde_json::{Value, json};

/// What a checkpoint may be of.
pub const FAMILIES: &[&Family] = &[&QWEN3];

/// The text of a `config.json`.
pub fn read(text: &[u8]) -> Result<Config, ConfigError> {
    Config::from_json(text, FAMILIES).map(|(config, _)| config)
}

/// A directory of its own, removed at the end.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("minisgl-qwen3-{}-{count}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        TempDir(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        // A new file: some file systems flush one that is cut short and written again, which takes milliseconds.
        let _ = fs::remove_file(self.0.join(name));
        fs::write(self.0.join(name), bytes).unwrap();
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A model of one layer: hidden 8, heads 2/1 of 4, MLP 12, vocabulary 16, untied.
pub fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
        "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "attention_bias": false,
        "use_sliding_window": false, "sliding_window": null, "rope_scaling": null,
        "tie_word_embeddings": false, "eos_token_id": 2,
    })
}

/// A tensor's entry in a header to be.
#[derive(Clone, Debug)]
pub struct Entry {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
}

impl Entry {
    pub fn new(name: &str, dtype: &str, shape: &[u64]) -> Entry {
        Entry { name: name.to_owned(), dtype: dtype.to_owned(), shape: shape.to_vec() }
    }

    fn bytes(&self) -> u64 {
        let element = match self.dtype.as_str() {
            "I8" | "U8" | "F8_E4M3" => 1,
            "BF16" | "F16" => 2,
            "I64" | "F64" => 8,
            _ => 4,
        };
        self.shape.iter().product::<u64>() * element
    }
}

/// The tensors of [`config`], as bf16.
pub fn entries() -> Vec<Entry> {
    let shapes: &[(&str, &[u64])] = &[
        ("lm_head", &[16, 8]),
        ("model.embed_tokens", &[16, 8]),
        ("model.layers.0.input_layernorm", &[8]),
        ("model.layers.0.mlp.down_proj", &[8, 12]),
        ("model.layers.0.mlp.gate_proj", &[12, 8]),
        ("model.layers.0.mlp.up_proj", &[12, 8]),
        ("model.layers.0.post_attention_layernorm", &[8]),
        ("model.layers.0.self_attn.k_norm", &[4]),
        ("model.layers.0.self_attn.k_proj", &[4, 8]),
        ("model.layers.0.self_attn.o_proj", &[8, 8]),
        ("model.layers.0.self_attn.q_norm", &[4]),
        ("model.layers.0.self_attn.q_proj", &[8, 8]),
        ("model.layers.0.self_attn.v_proj", &[4, 8]),
        ("model.norm", &[8]),
    ];
    shapes.iter().map(|(name, shape)| Entry::new(&format!("{name}.weight"), "BF16", shape)).collect()
}

/// The header that puts the entries back to back, and the bytes of data behind it.
pub fn header(entries: &[Entry]) -> (Value, usize) {
    let mut end = 0;
    let mut header = json!({});
    for entry in entries {
        let begin = end;
        end += entry.bytes();
        header[&entry.name] =
            json!({ "dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end] });
    }
    (header, end as usize)
}

/// A safetensors file: length, header padded to 8 bytes, data.
pub fn file(header: &Value, data_bytes: usize) -> Vec<u8> {
    let mut text = header.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.resize(file.len() + data_bytes, 0);
    file
}

/// A safetensors file of these entries.
pub fn safetensors(entries: &[Entry]) -> Vec<u8> {
    let (header, data_bytes) = header(entries);
    file(&header, data_bytes)
}

/// A directory with a good checkpoint in one file.
pub fn checkpoint() -> TempDir {
    let dir = TempDir::new();
    dir.write("config.json", config().to_string());
    dir.write("model.safetensors", safetensors(&entries()));
    dir
}

/// A directory with a good checkpoint in two files, and the index's `weight_map`.
pub fn sharded_checkpoint() -> (TempDir, Value) {
    let dir = TempDir::new();
    dir.write("config.json", config().to_string());
    let mut map = json!({});
    for (shard, part) in ["model-1.safetensors", "model-2.safetensors"].iter().zip(entries().chunks(7)) {
        dir.write(shard, safetensors(part));
        for entry in part {
            map[&entry.name] = json!(shard);
        }
    }
    write_index(&dir, &map);
    (dir, map)
}

pub fn write_index(dir: &TempDir, weight_map: &Value) {
    dir.write("model.safetensors.index.json", json!({ "weight_map": weight_map }).to_string());
}
