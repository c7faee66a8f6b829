//! Random damage to a checkpoint's files: an error or a checkpoint that keeps its promises, never a panic.

mod support;

use minisgl_core::spec::{Attention, Mixer};
use minisgl_core::tensor::TensorData;
use minisgl_decoder::{Checkpoint, Config};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use support::{FAMILIES, TempDir, checkpoint, config, entries, file, header, read, safetensors};

/// Values that break parsers: of each kind, at the edges of each range.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        prop_oneof![Just(0), Just(1), Just(2), Just(u64::MAX), Just(1 << 32), 0..100u64, any::<u64>()]
            .prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        "[ -~]{0,12}".prop_map(Value::from),
        prop_oneof![
            Just("BF16"),
            Just("F32"),
            Just("I8"),
            Just("F4"),
            Just("silu"),
            Just("default"),
            Just("..")
        ]
        .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z_]{1,12}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

/// Damage to bytes: some overwritten, some cut out, the end cut off.
fn damage(bytes: &mut Vec<u8>, overwrite: &[(Index, u8)], cut: Option<(Index, usize)>, keep: Option<Index>) {
    for (at, byte) in overwrite {
        let at = at.index(bytes.len());
        bytes[at] = *byte;
    }
    if let Some((at, len)) = cut {
        let at = at.index(bytes.len());
        bytes.drain(at..(at + len).min(bytes.len()));
    }
    if let Some(keep) = keep.filter(|_| !bytes.is_empty()) {
        bytes.truncate(keep.index(bytes.len()));
    }
}

fn check_config(result: Result<Config, impl ToString>) {
    match result {
        Ok(Config { spec, max_positions, .. }) => {
            let Mixer::Attention(Attention { rope: Some(rope), .. }) = spec.layers[0].mixer else { panic!() };
            let dims = spec.dims;
            assert_eq!(spec.layers.len(), dims.layers as usize);
            assert!(dims.heads.is_multiple_of(dims.kv_heads) && dims.head_dim.is_multiple_of(2));
            assert!(dims.hidden > 0 && dims.layers > 0 && dims.vocab > 0 && dims.intermediate > 0);
            assert!(max_positions > 0 && rope.base > 0.0 && dims.norm_eps > 0.0);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Opens a directory; what opens must hold each tensor's bytes within its file.
fn check_open(dir: &TempDir) {
    let Ok(checkpoint) = Checkpoint::open(dir.path(), FAMILIES) else { return };
    for tensor in checkpoint.tensors().iter() {
        let TensorData::Bytes { owner, range, dtype } = &tensor.data else { panic!("{tensor:?}") };
        assert!(range.end <= (**owner).as_ref().len(), "{tensor:?} ends behind its file");
        assert_eq!(range.len(), tensor.rows * tensor.cols * dtype.bytes(), "{tensor:?}");
    }
}

fn cases() -> ProptestConfig {
    ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_configuration_with_one_field_changed_is_read_or_refused_by_that_field(
        field in any::<Index>(),
        value in prop::option::of(any_value()),
    ) {
        let mut changed = config();
        let fields = changed.as_object_mut().unwrap();
        let mut names: Vec<String> = fields.keys().cloned().collect();
        names.extend(["rope_parameters", "quantization_config", "layer_types", "dtype"].map(String::from));
        let name = &names[field.index(names.len())];
        match value {
            Some(value) => fields.insert(name.clone(), value),
            None => fields.remove(name),
        };
        let result = read(changed.to_string().as_bytes());
        if let Err(error) = &result {
            prop_assert!(error.to_string().contains(name.as_str()), "{name} is not named: {error}");
        }
        check_config(result);
    }

    #[test]
    fn a_configuration_with_damaged_bytes_is_read_or_refused(
        overwrite in prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        cut in prop::option::of((any::<Index>(), 0..40usize)),
        keep in prop::option::weighted(0.2, any::<Index>()),
    ) {
        let mut bytes = config().to_string().into_bytes();
        damage(&mut bytes, &overwrite, cut, keep);
        check_config(read(&bytes).and_then(|config| config.with_generation_config(&bytes)));
    }
}

#[test]
fn a_header_with_changed_entries_is_read_or_refused() {
    let dir = checkpoint();
    let (good, data_bytes) = header(&entries());
    let names: Vec<String> = entries().into_iter().map(|entry| entry.name).collect();
    let change = (any::<Index>(), any::<Index>(), any_value());
    proptest!(cases(), |(changes in prop::collection::vec(change, 1..4))| {
        let mut changed = good.clone();
        for (tensor, part, value) in changes {
            let entry = &mut changed[&names[tensor.index(names.len())]];
            match ["dtype", "shape", "data_offsets", ""][part.index(4)] {
                "" => *entry = value,
                part if entry.is_object() => entry[part] = value,
                _ => {}
            }
        }
        dir.write("model.safetensors", file(&changed, data_bytes));
        check_open(&dir);
    });
}

#[test]
fn a_safetensors_file_with_damaged_bytes_is_read_or_refused() {
    let dir = checkpoint();
    let damages = (
        prop::collection::vec((any::<Index>(), any::<u8>()), 0..4),
        prop::option::weighted(0.3, (any::<Index>(), 0..40usize)),
        prop::option::weighted(0.2, any::<Index>()),
    );
    let length = prop::option::weighted(0.3, any::<u64>());
    proptest!(cases(), |((overwrite, cut, keep) in damages, length in length)| {
        let mut bytes = safetensors(&entries());
        if let Some(length) = length {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        damage(&mut bytes, &overwrite, cut, keep);
        dir.write("model.safetensors", bytes);
        check_open(&dir);
    });
}

#[test]
fn an_index_with_a_changed_target_is_read_or_refused() {
    let (dir, good) = support::sharded_checkpoint();
    let names: Vec<String> = entries().into_iter().map(|entry| entry.name).collect();
    proptest!(cases(), |(tensor in any::<Index>(), value in any_value())| {
        let mut map = good.clone();
        map[&names[tensor.index(names.len())]] = value;
        support::write_index(&dir, &map);
        check_open(&dir);
    });
}

/// Offsets and shapes so large that sums of them leave 64 bits.
#[test]
fn a_header_of_huge_tensors_is_refused() {
    let dir = checkpoint();
    proptest!(cases(), |(bits in prop::collection::vec(50..62u32, 1..12))| {
        let mut begin = 0_u64;
        let mut huge = json!({});
        for (i, bits) in bits.iter().enumerate() {
            let end = begin.saturating_add(1 << bits);
            let entry = json!({ "dtype": "BF16", "shape": [(end - begin) / 2], "data_offsets": [begin, end] });
            huge[format!("t{i:02}")] = entry;
            begin = end;
        }
        dir.write("model.safetensors", file(&huge, 64));
        let text = Checkpoint::open(dir.path(), FAMILIES).unwrap_err().to_string();
        prop_assert!(text.contains("model.safetensors"), "{text}");
    });
}
