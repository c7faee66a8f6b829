//! Several ranks on the CPU, threads with a device each that compute every step together: the bits of one.

mod common;

use std::fs;

use common::ranks::{bits, random_checkpoint, requests, run, way, with_experts};
use common::{CHECKPOINTS, FAMILIES, FP8, Numbers, Scratch, family, fixture, greedy, small};
use minisgl::{
    EmbedRequest, Embedding, GenerateRequest, Grammar, KvFormat, LlmBuilder, Prompt, Quantize, SamplingParams,
};

/// As many ranks as a golden checkpoint can be shared out among: by its heads, and by the slices of its products.
fn ranks_max(name: &str) -> u32 {
    match name {
        "qwen2-yarn" | "phi4-mini" | "olmo2" => 1,
        "qwen2-bias" | "smollm3-nope" | "seed-oss" | "gemma3" | "qwen3-fp8" | "qwen3-moe-fp8" => 2,
        _ => 4,
    }
}

#[test]
fn ranks_give_the_bits_of_one_for_every_checkpoint_however_they_are_computed() {
    for (i, name) in (0..).zip(CHECKPOINTS.into_iter().chain(FAMILIES).chain(FP8)) {
        let requests = requests(7, 250);
        let builder = || family(name);
        let expected = run(builder(), &requests);
        for ranks in [2, 4].into_iter().filter(|ranks| *ranks <= ranks_max(name)) {
            for bits in [i * 7 + ranks, i * 11 + 3 * ranks + 21] {
                let given = run(way(builder(), bits % 32).tensor_parallel(ranks), &requests);
                assert!(given == expected, "{name}: {ranks} ranks, way {}", bits % 32);
            }
        }
    }
}

#[test]
fn ranks_in_fp8_give_the_bits_of_one_in_fp8() {
    // A rank must have whole groups of columns where inputs are rounded by them: 128 of the checkpoint in fp8, 256 of what is made so.
    let groups = of_sizes(64, 1024, 128);
    let requests = requests(6, 100);
    let models = [
        (groups.path().to_owned(), false),
        (fixture("qwen3-fp8"), false),
        (fixture("tiny-tied"), true),
        (fixture("llama-rope3"), true),
        (fixture("tiny-untied"), true),
        (fixture("qwen3-moe"), true),
    ];
    for (folder, plain) in models {
        let plainly = || small(&folder);
        let builder =
            || plainly().kv_dtype(Some(KvFormat::Fp8)).quantize(Some(Quantize::Fp8)).plain_inputs(plain);
        let expected = run(builder(), &requests);
        assert!(expected != run(plainly(), &requests), "{}: it is in fp8", folder.display());
        for bits in [6, 17] {
            let given = run(way(builder(), bits).tensor_parallel(2), &requests);
            assert!(given == expected, "{}, way {bits}", folder.display());
        }
    }
    let scratch = of_four_slices();
    let builder = || small(scratch.path()).quantize(Some(Quantize::Fp8)).plain_inputs(true);
    assert!(run(builder().tensor_parallel(8), &requests) == run(builder(), &requests), "rows, 8 ranks");
}

#[test]
fn ranks_give_the_embeddings_of_one() {
    let prompt = |i: u32| (0..9 * i).map(|at| at * i % 250).collect::<Vec<_>>();
    let prompts: Vec<_> = (1..8).map(|i| EmbedRequest::tokens(prompt(i))).collect();
    for name in ["tiny-untied", "mistral-window"] {
        let embeddings = |builder: LlmBuilder| {
            let mut llm = builder.build().unwrap();
            let values = |one: &Embedding| one.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            llm.embed(&prompts).unwrap().iter().map(values).collect::<Vec<_>>()
        };
        let expected = embeddings(family(name));
        assert!(expected.iter().all(|values| !values.is_empty()));
        for ranks in [2, 4] {
            assert!(embeddings(family(name).tensor_parallel(ranks)) == expected, "{name}: {ranks} ranks");
        }
    }
}

#[test]
fn a_tiny_pool_preempts_and_ranks_go_on_with_the_same_tokens() {
    let mut requests = requests(12, 700);
    for request in &mut requests {
        if let Prompt::Tokens(prompt) = &mut request.prompt {
            prompt.truncate(40);
        }
        request.sampling.max_tokens = 80;
    }
    let builder = || small(fixture("tiny-untied")).max_seq_len(Some(256));
    let expected = run(builder(), &requests);
    for bits in [0b00000, 0b10101] {
        let tiny = way(builder(), bits).page_size(16).num_pages(Some(18));
        let mut llm = tiny.tensor_parallel(2).build().unwrap();
        let given: Vec<_> = llm.generate(&requests).unwrap().iter().map(self::bits).collect();
        assert!(given == expected, "way {bits}");
        assert!(llm.stats().retractions > 0, "{:?}", llm.stats());
        llm.check();
    }
}

/// A checkpoint that 8 ranks can share: 8 heads, 2 key heads, products of 8 slices.
fn wide() -> Scratch {
    of_sizes(64, 256, 32)
}

/// One whose MLP's output has 4 slices, so that 8 ranks share its rows.
fn of_four_slices() -> Scratch {
    of_sizes(128, 192, 32)
}

fn of_sizes(hidden: usize, inner: usize, head: usize) -> Scratch {
    let vocab = 103;
    let mlp = [("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)];
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": head, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": false
    });
    let mlp = mlp.map(|(name, rows, cols)| (format!("mlp.{name}.weight"), vec![rows, cols]));
    random_checkpoint(&config, &mlp)
}

#[test]
fn random_schedules_give_the_same_bits_on_1_2_4_and_8_ranks() {
    let mut numbers = Numbers(11);
    for (what, scratch) in [("dense", wide()), ("rows", of_four_slices()), ("experts", with_experts())] {
        for round in 0..4 {
            let requests = requests(5 + numbers.below(8) as usize, 100);
            let expected = run(small(scratch.path()), &requests);
            for ranks in [2, 4, 8] {
                let bits = numbers.below(32) as u32;
                let given = run(way(small(scratch.path()), bits).tensor_parallel(ranks), &requests);
                assert!(given == expected, "{what}, round {round}: {ranks} ranks, way {bits}");
            }
        }
    }
}

#[test]
fn a_grammars_masks_reach_every_rank() {
    let scratch = Scratch::with_text();
    let request = |i: u64| {
        let drawn = SamplingParams { temperature: 0.9, seed: i, ignore_eos: false, ..greedy(20) };
        let request = GenerateRequest::text("Once").sampling(drawn);
        GenerateRequest { grammar: Some(Grammar::Regex("[a-f]{3,9}".into()).into()), ..request }
    };
    let requests: Vec<_> = (0..5).map(request).chain(requests(3, 250)).collect();
    let expected = run(small(scratch.path()), &requests);
    assert!(run(small(scratch.path()).tensor_parallel(2), &requests) == expected);
}

#[test]
fn engines_of_several_ranks_stand_behind_one_queue() {
    let requests = requests(12, 300);
    let expected = run(family("tiny-tied"), &requests);
    let builder = family("tiny-tied").data_parallel(2).tensor_parallel(2);
    assert!(run(builder, &requests) == expected);
    let llm = family("tiny-tied").tensor_parallel(4).build().unwrap();
    assert!(llm.info().device.starts_with("4 ranks"), "{}", llm.info().device);
    let one = family("tiny-tied").build().unwrap();
    assert_eq!(llm.info().step_weight_bytes, one.info().step_weight_bytes);
    assert_eq!(llm.info().page_bytes, 2 * one.info().page_bytes, "two key heads, each on two ranks");
}

#[test]
fn updated_weights_are_those_of_every_rank() {
    let (before, after) = (Scratch::new(), wide());
    before.write("config.json", fs::read(after.join("config.json")).unwrap());
    let mut bytes = fs::read(after.join("model.safetensors")).unwrap();
    // Other numbers: the sign of every third element.
    let data = bytes.len() / 2;
    bytes[data..].iter_mut().skip((data % 2) ^ 1).step_by(6).for_each(|byte| *byte ^= 0x80);
    before.write("model.safetensors", bytes);
    let requests = requests(6, 100);
    let mut llm = small(before.path()).tensor_parallel(4).build().unwrap();
    let old: Vec<_> = llm.generate(&requests).unwrap().iter().map(bits).collect();
    llm.update_weights_from(after.path()).unwrap();
    let new: Vec<_> = llm.generate(&requests).unwrap().iter().map(bits).collect();
    assert!(new == run(small(after.path()), &requests) && new != old);
}

#[test]
fn what_cannot_be_shared_out_is_refused_with_its_numbers() {
    for (name, ranks, said) in [
        ("qwen2-yarn", 2, "3 query heads"),
        ("seed-oss", 4, "10 query heads"),
        ("qwen3-moe", 8, "4 query heads"),
        ("tiny-untied", 8, "320 columns, which are 4 slices"),
        ("tiny-tied", 8, "4 query heads"),
    ] {
        let error = family(name).tensor_parallel(ranks).build().err().unwrap().to_string();
        assert!(error.contains(said) && error.contains(&format!("{ranks} ranks")), "{name}: {error}");
        assert!(ranks > ranks_max(name));
    }
}
