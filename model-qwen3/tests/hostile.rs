//! Checkpoints that are not as they must be: each is refused with an error that names the thing.

mod support;

use std::fs;
use std::path::Path;

use minisgl_core::tensor::TensorData;
use minisgl_decoder::{Checkpoint, preset_names};
use serde_json::{Value, json};
use support::{
    Entry, FAMILIES, TempDir, checkpoint, config, entries, file, header, read, safetensors,
    sharded_checkpoint,
};

/// The error's text, which must name all of `things`.
#[track_caller]
fn assert_refused(dir: &Path, things: &[&str]) {
    let text = match Checkpoint::open(dir, FAMILIES) {
        Ok(_) => panic!("opened, though {things:?} should be refused"),
        Err(error) => error.to_string(),
    };
    for thing in things {
        assert!(text.contains(thing), "the error does not name {thing:?}: {text}");
    }
}

/// Rewrites the weights of a good checkpoint as `change` leaves them.
fn checkpoint_with(change: impl FnOnce(&mut Vec<Entry>)) -> TempDir {
    let dir = checkpoint();
    let mut tensors = entries();
    change(&mut tensors);
    dir.write("model.safetensors", safetensors(&tensors));
    dir
}

#[test]
fn a_good_checkpoint_opens_whole_or_in_shards_with_any_float_type() {
    let (sharded, _) = sharded_checkpoint();
    for dir in [checkpoint(), sharded] {
        let opened = Checkpoint::open(dir.path(), FAMILIES).unwrap();
        assert_eq!(opened.config().spec.dims.qkv_width(), 16);
        assert_eq!(opened.tensors().iter().count(), 14);
    }
    for dtype in ["F16", "F32"] {
        let dir = checkpoint_with(|tensors| tensors.iter_mut().for_each(|t| t.dtype = dtype.to_owned()));
        Checkpoint::open(dir.path(), FAMILIES).unwrap();
    }
}

#[test]
fn a_tensor_is_exactly_its_bytes_of_the_file() {
    let dir = checkpoint();
    let (json, data_bytes) = header(&entries());
    let mut bytes = file(&json, data_bytes);
    let data_start = bytes.len() - data_bytes;
    bytes[data_start..].iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
    dir.write("model.safetensors", &bytes);
    let opened = Checkpoint::open(dir.path(), FAMILIES).unwrap();
    for tensor in opened.tensors().iter() {
        let begin = json[&tensor.name]["data_offsets"][0].as_u64().unwrap() as usize;
        let TensorData::Bytes { owner, range, .. } = &tensor.data else { panic!("{tensor:?} has no bytes") };
        let expected = &bytes[data_start + begin..][..2 * tensor.rows * tensor.cols];
        assert_eq!(&(**owner).as_ref()[range.clone()], expected, "{}", tensor.name);
    }
}

#[test]
fn extra_tensors_are_ignored_and_a_tied_head_needs_no_tensor() {
    let extra = checkpoint_with(|tensors| tensors.push(Entry::new("rotary.inv_freq", "I64", &[3])));
    assert_eq!(Checkpoint::open(extra.path(), FAMILIES).unwrap().tensors().iter().count(), 14);

    let tied = checkpoint_with(|tensors| tensors.retain(|tensor| tensor.name != "lm_head.weight"));
    assert_refused(tied.path(), &["lm_head.weight", "model.safetensors"]);
    let mut tied_config = config();
    tied_config["tie_word_embeddings"] = json!(true);
    tied.write("config.json", tied_config.to_string());
    assert!(Checkpoint::open(tied.path(), FAMILIES).unwrap().tensors().head.is_none());
}

#[test]
fn a_directory_that_is_missing_empty_or_a_file_is_named() {
    let dir = TempDir::new();
    let missing = dir.path().join("nowhere");
    assert_refused(&missing, &["nowhere", "does not exist"]);
    assert_refused(dir.path(), &[dir.path().to_str().unwrap(), "config.json"]);
    dir.write("config.json", config().to_string());
    assert_refused(&dir.path().join("config.json"), &["config.json", "not a directory"]);
    assert_refused(dir.path(), &[dir.path().to_str().unwrap(), "model.safetensors"]);
}

#[test]
fn weights_in_another_format_are_refused_by_their_file() {
    for file in ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.gguf"] {
        let dir = TempDir::new();
        dir.write("config.json", config().to_string());
        dir.write(file, b"weights");
        assert_refused(dir.path(), &[file, "safetensors", "convert"]);
    }
}

#[test]
fn what_is_no_checkpoint_is_refused_by_what_it_is() {
    for (file, word) in [
        ("adapter_config.json", "merge"),
        ("params.json", "Hugging Face's"),
        ("model-Q4_K_M.gguf", "safetensors"),
    ] {
        let dir = TempDir::new();
        dir.write(file, b"{}");
        assert_refused(dir.path(), &[file, word]);
    }
    let trained = TempDir::new();
    trained.write("model.safetensors", safetensors(&entries()));
    trained.write("training_args.bin", b"pickled");
    assert_refused(trained.path(), &["config.json"]);
    for (file, word) in
        [("adapter_model.safetensors", "merge"), ("consolidated.safetensors", "Hugging Face's")]
    {
        let dir = TempDir::new();
        dir.write("config.json", config().to_string());
        dir.write(file, b"weights");
        assert_refused(dir.path(), &[file, word]);
        // Beside the model's own it is nobody's business.
        dir.write("model-00001-of-00001.safetensors", safetensors(&entries()));
        Checkpoint::open(dir.path(), FAMILIES).unwrap();
    }
}

#[test]
fn a_missing_or_wrongly_typed_field_of_the_configuration_is_named() {
    let required = [
        "architectures",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
    ];
    for field in required {
        let mut without = config();
        without.as_object_mut().unwrap().remove(field);
        assert_config_refused(&without, &[field, "missing"]);
        for wrong in [json!("8"), json!({}), json!(true)] {
            let mut mistyped = config();
            mistyped[field] = wrong.clone();
            assert_config_refused(&mistyped, &[field, "must be", &wrong.to_string()]);
        }
    }
    for (field, wrong) in [("tie_word_embeddings", json!("no")), ("eos_token_id", json!([1, -2]))] {
        let mut mistyped = config();
        mistyped[field] = wrong;
        assert_config_refused(&mistyped, &[field, "must be"]);
    }
    assert_config_refused(&json!([1]), &["object"]);
}

#[test]
fn what_would_be_computed_wrongly_is_refused_by_field() {
    let unsupported = [
        ("architectures", json!(["LlamaForCausalLM"])),
        ("model_type", json!("llama")),
        ("rope_scaling", json!({ "rope_type": "dynamic", "factor": 4.0, "alpha": 1000.0 })),
        ("rope_scaling", json!({ "rope_type": "ntk", "factor": 4.0 })),
        ("rope_scaling", json!({ "type": "longrope", "factor": 2.0 })),
        ("rope_scaling", json!({ "type": "yarn", "factor": 2.0, "mscale": 1.0 })),
        ("rope_parameters", json!({ "rope_type": "su", "rope_theta": 10000.0 })),
        ("rope_parameters", json!({ "partial_rotary_factor": 0.5, "rope_theta": 10000.0 })),
        ("layer_types", json!(["sliding_attention"])),
        ("layer_types", json!(["chunked_attention"])),
        ("attention_bias", json!(true)),
        ("hidden_act", json!("gelu")),
        ("torch_dtype", json!("float8_e4m3fn")),
        ("dtype", json!("int8")),
    ];
    for (field, value) in unsupported {
        let mut changed = config();
        changed[field] = value;
        assert_config_refused(&changed, &[field, "not supported"]);
    }
}

#[test]
fn a_quantized_checkpoint_is_refused_with_what_to_take_instead() {
    for (field, value) in [
        ("quantization_config", json!({ "quant_method": "gptq", "bits": 4 })),
        ("compression_config", json!({ "format": "int-quantized" })),
        ("quantization_config", json!("awq")),
    ] {
        let mut changed = config();
        changed[field] = value.clone();
        assert_config_refused(
            &changed,
            &[field, &value.to_string(), "quantized", "not supported", "bfloat16"],
        );
    }
    let mut long = config();
    long["quantization_config"] = json!({
        "_load_in_4bit": true, "_load_in_8bit": false, "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8", "quant_method": "bitsandbytes",
    });
    assert_config_refused(&long, &["bitsandbytes", "bfloat16"]);
    let dir = checkpoint();
    dir.write("hf_quant_config.json", json!({ "quantization": { "quant_algo": "NVFP4" } }).to_string());
    assert_refused(dir.path(), &["hf_quant_config.json", "NVFP4", "bfloat16"]);
}

#[test]
fn sizes_that_make_no_model_are_refused_by_field() {
    let out_of_range = [
        ("vocab_size", json!(0)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(4_000_000_000_u32)),
        ("intermediate_size", json!(0)),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(u32::MAX)),
        ("num_key_value_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("head_dim", json!(5)),
        ("head_dim", json!(1 << 30)),
        ("max_position_embeddings", json!(0)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!(-1e-6)),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(1e300)),
    ];
    for (field, value) in out_of_range {
        let mut changed = config();
        changed[field] = value;
        assert_config_refused(&changed, &[field, "it must be"]);
    }
}

#[track_caller]
fn assert_config_refused(config: &Value, things: &[&str]) {
    let dir = checkpoint();
    dir.write("config.json", config.to_string());
    assert_refused(dir.path(), &[&["config.json"], things].concat());
}

#[test]
fn both_generations_of_transformers_write_rope_and_type() {
    let mut five = config();
    let fields = five.as_object_mut().unwrap();
    fields.remove("rope_theta");
    fields.remove("torch_dtype");
    fields.insert("dtype".into(), json!("bfloat16"));
    fields.insert("rope_parameters".into(), json!({ "rope_type": "default", "rope_theta": 10000.0 }));
    let [four, five] = [config(), five].map(|text| read(text.to_string().as_bytes()).unwrap());
    assert_eq!(four, five);

    let mut contradicting = config();
    contradicting["rope_parameters"] = json!({ "rope_theta": 5000.0 });
    assert_config_refused(&contradicting, &["rope_theta", "10000", "5000"]);
}

#[test]
fn what_changes_longer_sequences_alone_leaves_those_within_the_positions_as_they_are() {
    let read = |config: &Value| read(config.to_string().as_bytes()).unwrap();
    let mut dynamic = config();
    dynamic["rope_scaling"] = json!({ "type": "dynamic", "factor": 4.0 });
    assert_eq!(read(&dynamic), read(&config()));
    let mut chunked = config();
    chunked["max_position_embeddings"] = json!(1_010_000);
    chunked["dual_chunk_attention_config"] =
        json!({ "chunk_size": 64, "local_size": 8, "original_max_position_embeddings": 64 });
    assert_eq!(read(&chunked), read(&config()));
    chunked["dual_chunk_attention_config"] = json!({ "chunk_size": 64 });
    assert_config_refused(
        &chunked,
        &["dual_chunk_attention_config.original_max_position_embeddings", "missing"],
    );
}

#[test]
fn generation_config_gives_the_end_of_sequence_tokens_where_it_has_them() {
    let dir = checkpoint();
    let eos = || Checkpoint::open(dir.path(), FAMILIES).unwrap().config().eos.clone();
    assert_eq!(eos(), [2]);
    for (text, expected) in [
        (json!({ "eos_token_id": [3, 4] }), vec![3, 4]),
        (json!({ "eos_token_id": 5 }), vec![5]),
        (json!({ "do_sample": true }), vec![2]),
    ] {
        dir.write("generation_config.json", text.to_string());
        assert_eq!(eos(), expected);
    }
    dir.write("generation_config.json", json!({ "eos_token_id": "end" }).to_string());
    assert_refused(dir.path(), &["generation_config.json", "eos_token_id", "end"]);
    dir.write("generation_config.json", "{");
    assert_refused(dir.path(), &["generation_config.json", "JSON"]);
}

#[test]
fn every_missing_tensor_is_named_with_its_file() {
    for missing in entries() {
        let dir = checkpoint_with(|tensors| tensors.retain(|tensor| tensor.name != missing.name));
        assert_refused(dir.path(), &[&missing.name, "missing", "model.safetensors"]);
    }
}

#[test]
fn every_wrong_shape_is_named_with_its_file() {
    for (i, tensor) in entries().iter().enumerate() {
        let dir = checkpoint_with(|tensors| *tensors[i].shape.last_mut().unwrap() += 1);
        assert_refused(dir.path(), &[&tensor.name, "shape", "model.safetensors"]);
    }
    let transposed = checkpoint_with(|tensors| tensors[3].shape.reverse());
    assert_refused(transposed.path(), &["down_proj", "[12, 8]", "[8, 12]"]);
}

#[test]
fn a_wrong_type_is_named_with_tensor_and_file() {
    for dtype in ["I8", "F8_E4M3", "I64", "F64"] {
        let dir = checkpoint_with(|tensors| tensors[4].dtype = dtype.to_owned());
        assert_refused(dir.path(), &["mlp.gate_proj.weight", dtype, "model.safetensors"]);
    }
    let packed = checkpoint_with(|tensors| tensors[4] = Entry::new(&tensors[4].name, "U8", &[6, 8]));
    assert_refused(packed.path(), &["mlp.gate_proj.weight", "U8", "model.safetensors"]);
    let unknown = checkpoint_with(|tensors| tensors[4].dtype = "Q4_K".to_owned());
    assert_refused(unknown.path(), &["Q4_K", "model.safetensors"]);
}

#[test]
fn a_file_cut_anywhere_is_refused_by_name() {
    let dir = checkpoint();
    let whole = safetensors(&entries());
    for len in 0..whole.len() {
        dir.write("model.safetensors", &whole[..len]);
        assert_refused(dir.path(), &["model.safetensors"]);
    }
    dir.write("model.safetensors", &whole[..whole.len() - 1]);
    assert_refused(dir.path(), &["model.safetensors", "truncated", "model.norm.weight"]);
    dir.write("model.safetensors", [&whole[..], &[0]].concat());
    assert_refused(dir.path(), &["model.safetensors", "1 bytes follow"]);
}

#[test]
fn a_header_longer_than_the_file_is_refused_with_both_lengths() {
    let dir = checkpoint();
    let mut bytes = safetensors(&entries());
    let follow = (bytes.len() - 8).to_string();
    for length in [bytes.len() as u64, 1 << 40, u64::MAX] {
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        dir.write("model.safetensors", &bytes);
        assert_refused(dir.path(), &["model.safetensors", &length.to_string(), &follow]);
    }
}

#[test]
fn a_header_whose_offsets_lie_is_refused() {
    let dir = checkpoint();
    let (good, data_bytes) = header(&entries());
    for offsets in [json!([0, u64::MAX]), json!([u64::MAX, 0]), json!([0, 1]), json!([-1, 2]), json!([0])] {
        let mut lying = good.clone();
        lying["model.norm.weight"]["data_offsets"] = offsets;
        dir.write("model.safetensors", file(&lying, data_bytes));
        assert_refused(dir.path(), &["model.safetensors", "header"]);
    }
}

#[test]
fn weights_that_are_a_directory_are_refused() {
    let dir = checkpoint();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert_refused(dir.path(), &["model.safetensors"]);
}

#[test]
fn shards_without_an_index_are_all_read() {
    for names in
        [["a.safetensors", "b.safetensors"], ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]]
    {
        let dir = TempDir::new();
        dir.write("config.json", config().to_string());
        for (name, part) in names.iter().zip(entries().chunks(7)) {
            dir.write(name, safetensors(part));
        }
        assert_eq!(Checkpoint::open(dir.path(), FAMILIES).unwrap().tensors().iter().count(), 14);
        fs::remove_file(dir.path().join(names[1])).unwrap();
        let missing = if names[1].contains("-of-") { names[1] } else { "q_proj.weight" };
        assert_refused(dir.path(), &[missing, dir.path().to_str().unwrap()]);
    }
}

#[test]
fn a_tensor_in_two_shards_without_an_index_is_refused_with_both_files() {
    let dir = TempDir::new();
    dir.write("config.json", config().to_string());
    dir.write("a.safetensors", safetensors(&entries()));
    dir.write("b.safetensors", safetensors(&entries()[13..]));
    assert_refused(dir.path(), &["model.norm.weight", "a.safetensors", "b.safetensors", "index"]);
}

#[test]
fn a_header_of_odd_length_opens_to_the_same_bytes() {
    let entries = entries();
    let (json, data_bytes) = header(&entries);
    let text = json.to_string() + if json.to_string().len() % 2 == 0 { " " } else { "" };
    let data: Vec<u8> = (0..data_bytes).map(|i| (i % 251) as u8).collect();
    let dir = checkpoint();
    dir.write("model.safetensors", [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat());
    for tensor in Checkpoint::open(dir.path(), FAMILIES).unwrap().tensors().iter() {
        let TensorData::Bytes { owner, range, .. } = &tensor.data else { panic!("{tensor:?} has no bytes") };
        let begin = json[&tensor.name]["data_offsets"][0].as_u64().unwrap() as usize;
        assert_eq!(&(**owner).as_ref()[range.clone()], &data[begin..][..range.len()], "{}", tensor.name);
        assert_eq!(range.start % 2, 1);
    }
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_one_that_leads_nowhere_is_named_with_its_target() {
    use std::os::unix::fs::symlink;
    let (shards, _) = sharded_checkpoint();
    for original in [checkpoint(), shards] {
        let snapshot = TempDir::new();
        for entry in fs::read_dir(original.path()).unwrap() {
            let entry = entry.unwrap();
            symlink(entry.path(), snapshot.path().join(entry.file_name())).unwrap();
        }
        let link = TempDir::new();
        symlink(snapshot.path(), link.path().join("model")).unwrap();
        Checkpoint::open(snapshot.path(), FAMILIES).unwrap();
        Checkpoint::open(link.path().join("model"), FAMILIES).unwrap();
        Checkpoint::open(snapshot.path().join(""), FAMILIES).unwrap();

        symlink("blobs/0123", snapshot.path().join("notes.txt")).unwrap();
        Checkpoint::open(snapshot.path(), FAMILIES).unwrap();
        symlink("blobs/0123", snapshot.path().join("tokenizer.json")).unwrap();
        assert_refused(snapshot.path(), &["tokenizer.json", "blobs/0123", "does not exist"]);
        fs::remove_file(snapshot.path().join("tokenizer.json")).unwrap();
        for entry in fs::read_dir(original.path()).unwrap() {
            let (from, name) = (entry.as_ref().unwrap().path(), entry.unwrap().file_name());
            let away = original.path().join("away");
            fs::rename(&from, &away).unwrap();
            assert_refused(snapshot.path(), &[name.to_str().unwrap(), from.to_str().unwrap()]);
            fs::rename(&away, &from).unwrap();
        }
        drop(snapshot);
        assert_refused(&link.path().join("model"), &["model", "does not exist"]);
    }
}

#[test]
fn an_index_that_points_to_a_missing_shard_is_refused_with_both_names() {
    let (dir, _) = sharded_checkpoint();
    fs::remove_file(dir.path().join("model-2.safetensors")).unwrap();
    assert_refused(dir.path(), &["model.safetensors.index.json", "model-2.safetensors", "does not exist"]);
}

#[test]
fn an_index_that_points_outside_the_directory_is_refused() {
    let outside = TempDir::new();
    outside.write("model-2.safetensors", safetensors(&entries()));
    let absolute = outside.path().join("model-2.safetensors");
    let sideways = Path::new("..").join(outside.path().file_name().unwrap()).join("model-2.safetensors");
    for target in [absolute.to_str().unwrap(), sideways.to_str().unwrap(), "..", "", "./model-1.safetensors"]
    {
        let (dir, mut map) = sharded_checkpoint();
        map["model.norm.weight"] = json!(target);
        support::write_index(&dir, &map);
        assert_refused(dir.path(), &["model.safetensors.index.json", "model.norm.weight", target]);
    }
}

#[test]
fn an_index_that_is_wrong_about_a_tensor_is_refused() {
    let (dir, good) = sharded_checkpoint();
    let mut elsewhere = good.clone();
    elsewhere["model.norm.weight"] = json!("model-1.safetensors");
    support::write_index(&dir, &elsewhere);
    assert_refused(dir.path(), &["model.norm.weight", "missing", "model-1.safetensors"]);

    let mut without = good.clone();
    without.as_object_mut().unwrap().remove("model.norm.weight");
    support::write_index(&dir, &without);
    assert_refused(dir.path(), &["model.norm.weight", "missing", "model.safetensors.index.json"]);

    let mut number = good;
    number["model.norm.weight"] = json!(7);
    support::write_index(&dir, &number);
    assert_refused(dir.path(), &["model.norm.weight", "model.safetensors.index.json"]);

    dir.write("model.safetensors.index.json", "{\"weight_map\": []}");
    assert_refused(dir.path(), &["model.safetensors.index.json", "weight_map"]);
    dir.write("model.safetensors.index.json", "weights");
    assert_refused(dir.path(), &["model.safetensors.index.json", "JSON"]);
}

#[test]
fn presets_have_the_published_sizes_and_an_unknown_name_gets_the_list() {
    // Parameters of the published checkpoints: embedding, layers, final norm and, where untied, head.
    let published = [
        ("qwen3-0.6b", 596_049_920_u64),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
    ];
    for (name, parameters) in published {
        let preset = Checkpoint::preset(name, FAMILIES).unwrap();
        let counted: u64 = preset.tensors().iter().map(|tensor| (tensor.rows * tensor.cols) as u64).sum();
        assert_eq!(counted, parameters, "{name}");
    }
    assert!(preset_names(FAMILIES).all(|name| Checkpoint::preset(name, FAMILIES).is_ok()));
    let text = Checkpoint::preset("qwen3-1b", FAMILIES).unwrap_err().to_string();
    assert!(text.contains("`qwen3-1b`") && preset_names(FAMILIES).all(|name| text.contains(name)), "{text}");
}

#[test]
fn dummy_weights_are_the_same_each_time_and_differ_between_tensors() {
    let seeds = || -> Vec<u64> {
        let preset = Checkpoint::preset("tiny", FAMILIES).unwrap();
        let seed = |data: &TensorData| match data {
            TensorData::Uniform { seed, .. } => *seed,
            TensorData::Bytes { .. } | TensorData::Fp8 { .. } | TensorData::Window { .. } => {
                panic!("a preset is made of seeds")
            }
        };
        preset.tensors().iter().map(|tensor| seed(&tensor.data)).collect()
    };
    assert_eq!(seeds(), seeds());
    let distinct: std::collections::HashSet<u64> = seeds().into_iter().collect();
    assert_eq!(distinct.len(), seeds().len());
}
