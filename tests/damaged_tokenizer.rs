//! A tokenizer.json that is cut off or damaged is an error that names it; nothing panics.

mod common;

use std::sync::atomic::{AtomicU32, Ordering};

use common::{Numbers, Scratch};
use minisgl::{Prompt, Text};
use serde_json::{Value, json};

static PANICS: AtomicU32 = AtomicU32::new(0);

/// Opens a checkpoint with this tokenizer; where it opens, it encodes and decodes.
fn try_out(scratch: &Scratch, file: &[u8]) -> bool {
    scratch.write("tokenizer.json", file);
    match Text::open(scratch.path()) {
        Ok(text) => {
            if let Ok(ids) = text.encode(Prompt::Text("Größe: 🦀 <|im_start|>".to_owned())) {
                text.decode(&ids);
            }
            true
        }
        Err(error) => {
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
            false
        }
    }
}

/// tokenizer.json with a part changed.
fn changed(whole: &[u8], pointer: &str, value: Value) -> Vec<u8> {
    let mut file: Value = serde_json::from_slice(whole).unwrap();
    *file.pointer_mut(pointer).unwrap() = value;
    file.to_string().into_bytes()
}

#[test]
fn a_tokenizer_that_makes_texts_long_without_bound_is_refused() {
    let whole = std::fs::read("tests/fixtures/text/tokenizer.json").unwrap();
    let scratch = Scratch::new();
    let replace =
        |from: Value, to: usize| json!({"type": "Replace", "pattern": from, "content": "b".repeat(to)});
    let (letter, empty) = (json!({"String": "a"}), json!({"Regex": ""}));
    let all = |steps: Vec<Value>, of: &str| json!({"type": "Sequence", of: steps});
    for (pointer, step) in [
        ("/normalizer", replace(letter.clone(), 100_000)),
        ("/normalizer", all(vec![replace(letter.clone(), 1000), replace(empty, 1000)], "normalizers")),
        ("/normalizer", json!({"type": "Prepend", "prepend": "b".repeat(100_000)})),
        (
            "/decoder",
            all(vec![replace(letter.clone(), 1000), replace(json!({"String": "b"}), 1000)], "decoders"),
        ),
    ] {
        scratch.write("tokenizer.json", changed(&whole, pointer, step));
        let error = Text::open(scratch.path()).err().unwrap().to_string();
        assert!(error.contains("times as long") && error.contains(&pointer[1..]), "{error}");
    }
    // What published ones do.
    let spaces = all(vec![json!({"type": "Prepend", "prepend": "▁"}), replace(letter, 3)], "normalizers");
    assert!(try_out(&scratch, &changed(&whole, "/normalizer", spaces)));
}

#[test]
fn a_damaged_tokenizer_is_an_error_that_names_the_file_and_never_a_panic() {
    let whole = std::fs::read("tests/fixtures/text/tokenizer.json").unwrap();
    let scratch = Scratch::new();
    std::panic::set_hook(Box::new(|_| {
        PANICS.fetch_add(1, Ordering::Relaxed);
    }));
    assert!(try_out(&scratch, &whole));
    let mut numbers = Numbers(3);
    let mut places: Vec<usize> = (0..150).map(|_| numbers.below(whole.len() as u64) as usize).collect();
    // Within the decoder, which the parser trusts.
    let decoder = whole.windows(9).position(|window| window == b"\"decoder\"").unwrap();
    places.extend(decoder..decoder + 120);
    let opened = places.iter().filter(|place| try_out(&scratch, &whole[..**place])).count();
    let mut failed = 0;
    for place in &places {
        // A byte changed, a piece missing, a piece doubled.
        let mut other = whole.clone();
        other[*place] = b"{}[]\",:0a\xff "[numbers.below(11) as usize];
        let end = (place + 1 + numbers.below(40) as usize).min(whole.len());
        let missing = [&whole[..*place], &whole[end..]].concat();
        let doubled = [&whole[..end], &whole[*place..]].concat();
        failed += [other, missing, doubled].iter().filter(|file| !try_out(&scratch, file)).count();
    }
    let longest = "Ġ".repeat(300);
    let processor = |single: Value| {
        let b = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]);
        json!({"type": "TemplateProcessing", "single": single, "pair": b, "special_tokens": {}})
    };
    let parts = [
        ("/model/merges/0", json!(["Ġ", "absent"])),
        ("/model/merges/0", json!([longest, longest])),
        ("/model/continuing_subword_prefix", json!("###")),
        ("/model/vocab", json!({})),
        ("/model/vocab/!", json!(4_294_967_295_u32)),
        ("/model/type", json!("Unigram")),
        ("/added_tokens/0/id", json!(-1)),
        ("/post_processor", processor(json!([{"Sequence": {"id": "B", "type_id": 0}}]))),
        ("/decoder", json!({"type": "Unheard"})),
        ("/decoder", json!(7)),
        ("/version", json!("2.0")),
    ];
    for (pointer, value) in parts {
        assert!(!try_out(&scratch, &changed(&whole, pointer, value.clone())), "{pointer}: {value}");
    }
    let panics = PANICS.load(Ordering::Relaxed);
    let _ = std::panic::take_hook();
    assert_eq!((opened, panics), (0, 0));
    assert!(failed > places.len() * 2, "{failed}");
}
