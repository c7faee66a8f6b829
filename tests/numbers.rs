//! Numbers at the edge: temperatures too small to divide by, and logits that are none.

mod common;

use std::fs;

use common::{Scratch, builder, greedy_request, small};
use minisgl::{FinishReason, GenerateRequest, RequestError, SamplingParams};

const NAN: u16 = 0x7fc0;
const INFINITY: u16 = 0x7f80;

/// Overwrites an element of a bf16 tensor of the folder's checkpoint.
fn damage(folder: &Scratch, tensor: &str, element: usize, bits: u16) {
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|it| it != "safetensors") || path.ends_with("expected.safetensors") {
            continue;
        }
        let mut file = fs::read(&path).unwrap();
        let header_len = u64::from_le_bytes(*file.first_chunk().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&file[8..8 + header_len]).unwrap();
        if let Some(begin) = header[tensor]["data_offsets"][0].as_u64() {
            let at = 8 + header_len + begin as usize + 2 * element;
            file[at..at + 2].copy_from_slice(&bits.to_le_bytes());
            return fs::write(path, file).unwrap();
        }
    }
    panic!("no {tensor} in {}", folder.path().display());
}

#[test]
fn a_tiny_temperature_draws_the_greedy_tokens() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let request = |temperature| {
        let sampling = SamplingParams { temperature, seed: 5, max_tokens: 12, ..SamplingParams::default() };
        GenerateRequest::tokens([5, 6, 7]).sampling(sampling)
    };
    let requests = [0.0, 1e-45, 1e-39, f32::MIN_POSITIVE, 1e-20, 1e-6].map(request);
    let completions = llm.generate(&requests).unwrap();
    assert!(completions.iter().all(|it| it.error.is_none() && it.token_ids == completions[0].token_ids));
}

#[test]
fn logits_that_are_no_numbers_fail_the_request_by_name() {
    for bits in [NAN, NAN | 0x8000, INFINITY] {
        let folder = Scratch::with_text();
        damage(&folder, "model.norm.weight", 0, bits);
        let sampling =
            |temperature| SamplingParams { temperature, logprobs: Some(2), ..SamplingParams::default() };
        let requests = [0.0, 0.7].map(|it| GenerateRequest::tokens([5, 6, 7]).sampling(sampling(it)));
        for completion in small(folder.path()).build().unwrap().generate(&requests).unwrap() {
            assert_eq!(completion.finish_reason, FinishReason::Failed);
            assert_eq!((completion.error, completion.token_ids), (Some(RequestError::NotNumbers), vec![]));
        }
    }
}

#[test]
fn a_damaged_embedding_fails_those_who_use_it_and_nobody_beside_them() {
    let folder = Scratch::new();
    folder.copy("tiny-untied");
    let requests = [[5, 6, 7], [8, 9, 10], [5, 6, 8]].map(|prompt| greedy_request(&prompt, 4));
    let expected = builder("tiny-untied").build().unwrap().generate(&requests).unwrap();
    assert!(expected.iter().all(|it| !it.token_ids.contains(&9)), "or another token must be damaged");
    let hidden = 192;
    damage(&folder, "model.embed_tokens.weight", 9 * hidden, NAN);
    let completions = small(folder.path()).build().unwrap().generate(&requests).unwrap();
    assert_eq!(completions[1].error, Some(RequestError::NotNumbers));
    assert_eq!((&completions[0], &completions[2]), (&expected[0], &expected[2]));
}
