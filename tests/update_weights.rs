//! Weights that are updated in a running engine: the same bits as of an engine that was loaded with them.

mod common;

use std::fs;
use std::path::Path;

use common::stored::{Stored, Tensors, all_trained, checkpoint, given, stored, trained, write};
use common::{CPU_ALONE, FP8, Numbers, Scratch, family, fixture, greedy, in_time, small};
use minisgl::{
    BackendChoice, Completion, Dtype, Error, GenerateRequest, KernelSet, KvFormat, Llm, LlmBuilder,
    NamedTensor, PromptLogprobs, Quantize, SamplingParams, ScoreRequest, SessionEvent, SessionOptions,
};

/// Of each kind that is loaded in a way of its own: tied and untied heads, biases, norms around, experts one by one and stacked,
/// two forms of fp8, q, k and v in one.
const MODELS: [&str; 9] = [
    "tiny-tied",
    "tiny-untied",
    "qwen2-bias",
    "gemma3",
    "qwen3-moe",
    "qwen3-moe-nonorm",
    "qwen3-fp8",
    "llama-fp8ct",
    "phi3",
];

fn of(folder: &Scratch) -> LlmBuilder {
    small(folder.path()).max_seq_len(Some(256))
}

/// Greedy and drawn tokens with their log-probabilities, and given ones; prompts that begin alike.
fn requests() -> Vec<GenerateRequest> {
    let mut numbers = Numbers(5);
    let mut ids = |count: u64| (0..count).map(|_| numbers.below(250) as u32).collect::<Vec<_>>();
    let shared = ids(50);
    let prompts = [ids(1), [shared.clone(), ids(3)].concat(), ids(90), [shared, ids(20)].concat()];
    let sampled = |(i, prompt): (usize, Vec<u32>)| {
        let logprobs = SamplingParams { logprobs: Some(2), ..greedy(12) };
        let temperature = if i % 2 == 0 { 0.0 } else { 0.9 };
        let sampling = SamplingParams { temperature, seed: i as u64, ..logprobs };
        GenerateRequest::tokens(prompt).sampling(sampling)
    };
    let scored = SamplingParams { prompt_logprobs: Some(PromptLogprobs { from: 1, top: 1 }), ..greedy(0) };
    let scored = GenerateRequest::tokens(ids(30)).sampling(scored);
    prompts.into_iter().enumerate().map(sampled).chain([scored]).collect()
}

/// What comes of them, cached tokens included: of an engine that has just been built, or whose cache is empty.
fn outputs(llm: &mut Llm) -> Vec<Completion> {
    let completions = llm.generate(&requests()).unwrap();
    assert!(completions.iter().all(|completion| completion.error.is_none()), "{completions:?}");
    llm.check();
    completions
}

fn fresh(name: &str, tensors: &Tensors) -> Vec<Completion> {
    outputs(&mut of(&checkpoint(name, tensors)).build().unwrap())
}

/// The same of engines that `on` makes of a checkpoint's.
fn assert_updated_as_loaded(what: &str, name: &str, on: impl Fn(LlmBuilder) -> LlmBuilder) {
    let (old, new) = (stored(name), all_trained(&stored(name), 1));
    let mut llm = on(family(name)).build().unwrap();
    let before = outputs(&mut llm);
    llm.update_weights(given(&new)).unwrap();
    let after = outputs(&mut llm);
    assert_eq!(after, outputs(&mut on(of(&checkpoint(name, &new))).build().unwrap()), "{what}");
    assert!(before.iter().zip(&after).all(|(before, after)| before != after), "{what}: another model");
    // And back.
    llm.update_weights(given(&old)).unwrap();
    assert_eq!(outputs(&mut llm), before, "{what}");
}

#[test]
fn an_updated_model_is_bit_for_bit_one_that_is_loaded_so_and_forgets_its_prefixes() {
    for name in MODELS {
        assert_updated_as_loaded(name, name, |builder| builder);
    }
}

/// Uploads to where the old weights are, in the forms that kernels read: pairs, squares, experts, fp8, norms that are folded in.
#[test]
#[ignore = "needs a GPU"]
fn so_it_is_on_a_gpu() {
    let refused = |name: &&str| CPU_ALONE.iter().any(|(alone, _)| alone == name);
    for name in MODELS.into_iter().filter(|name| !refused(name)) {
        let in_fp8 = FP8.contains(&name);
        // Kernels for any GPU know no fp8.
        let sets = if in_fp8 { 1 } else { 2 };
        for kernels in [KernelSet::Auto, KernelSet::Portable].into_iter().take(sets) {
            assert_updated_as_loaded(&format!("{name}, {kernels:?}"), name, |builder| {
                builder.backend(BackendChoice::Cuda).kernels(kernels).plain_inputs(in_fp8)
            });
        }
    }
    assert_updated_as_loaded("made fp8", "tiny-untied", |builder| {
        let builder = builder.backend(BackendChoice::Cuda).plain_inputs(true);
        builder.quantize(Some(Quantize::Fp8)).kv_dtype(Some(KvFormat::Fp8))
    });
}

#[test]
fn some_tensors_count_together_with_those_that_stay() {
    let mut numbers = Numbers(11);
    for name in ["tiny-tied", "tiny-untied", "gemma3", "qwen3-moe", "qwen3-fp8", "phi3"] {
        let mut tensors = stored(name);
        let mut llm = family(name).build().unwrap();
        for round in 0..4 {
            // One alone, some, most.
            let share = [0, 2, 12, 1][round % 4];
            let lone = numbers.below(tensors.len() as u64) as usize;
            let chosen = |i: usize, numbers: &mut Numbers| i == lone || numbers.below(16) < share;
            let names: Vec<String> = tensors.keys().cloned().collect();
            let names = names.into_iter().enumerate().filter(|(i, _)| chosen(*i, &mut numbers));
            let names: Vec<String> = names.map(|(_, name)| name).collect();
            let new = |name: &String| (name.clone(), trained(&tensors[name], &mut Numbers(round as u64)));
            let new: Tensors = names.iter().map(new).collect();
            tensors.extend(new.clone());
            llm.update_weights(given(&new)).unwrap();
            assert_eq!(outputs(&mut llm), fresh(name, &tensors), "{name}: {names:?}");
        }
    }
}

/// An update that is refused, by words that its error has.
fn refused(llm: &mut Llm, tensors: Vec<NamedTensor>, words: &[&str]) {
    let error = llm.update_weights(tensors).unwrap_err();
    assert!(matches!(error, Error::Model(_)), "{error}");
    let error = error.to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{error} has not {words:?}");
}

#[test]
fn an_update_that_cannot_hold_is_refused_by_name_and_changes_nothing() {
    const NORM: &str = "model.norm.weight";
    const Q: &str = "model.layers.1.self_attn.q_proj.weight";
    let (old, new) = (stored("tiny-tied"), all_trained(&stored("tiny-tied"), 2));
    let mut llm = family("tiny-tied").build().unwrap();
    let before = outputs(&mut llm);
    // What is right with it must not be written either.
    let with = |name: &str, tensor: Stored| {
        let mut new = new.clone();
        new.insert(name.to_owned(), tensor);
        given(&new)
    };
    let q = &old[Q];
    let transposed = Stored { shape: q.shape.iter().rev().copied().collect(), ..q.clone() };
    refused(&mut llm, with(Q, transposed), &[Q, "shape"]);
    let half = Stored { bytes: q.bytes[..q.bytes.len() / 2].to_vec(), ..q.clone() };
    refused(&mut llm, with(Q, half), &[Q, "bytes"]);
    let integers = Stored { dtype: Dtype::I16, ..q.clone() };
    refused(&mut llm, with(Q, integers), &[Q, "I16"]);
    let unscaled = Stored { dtype: Dtype::F8_E4M3, bytes: vec![0; q.bytes.len() / 2], ..q.clone() };
    refused(&mut llm, with(Q, unscaled), &[Q, "F8_E4M3"]);
    refused(&mut llm, with("model.layers.2.self_attn.q_proj.weight", q.clone()), &["model.layers.2"]);
    refused(&mut llm, with("norm.weight", old[NORM].clone()), &["`norm.weight`", NORM]);
    refused(&mut llm, [given(&new), given(&new)].concat(), &["twice"]);
    // Folders and files.
    let from = |path: &Path, llm: &mut Llm| llm.update_weights_from(path).unwrap_err().to_string();
    let other = checkpoint("tiny-tied", &new);
    let config = fs::read_to_string(other.join("config.json")).unwrap();
    other.write("config.json", config.replace("\"rms_norm_eps\": ", "\"rms_norm_eps\": 1"));
    assert!(from(other.path(), &mut llm).contains("another model"));
    assert!(from(&fixture("tiny-untied"), &mut llm).contains("another model"));
    assert!(
        from(&fixture("tiny-untied").join("model-00001-of-00002.safetensors"), &mut llm).contains("shape")
    );
    assert!(from(&fixture("tiny-tied").join("config.json"), &mut llm).contains("safetensors"));
    assert!(from(Path::new("nowhere.safetensors"), &mut llm).contains("nowhere.safetensors"));

    llm.clear_prefix_cache();
    assert_eq!(outputs(&mut llm), before);
    llm.update_weights([]).unwrap();
    assert_eq!(outputs(&mut llm), before, "an update of nothing");
}

#[test]
fn one_of_several_stacked_matrices_does_not_leave_their_quantization() {
    let name = "qwen3-fp8";
    let mut llm = family(name).build().unwrap();
    let before = outputs(&mut llm);
    let plain = |tensor: &str| {
        let Stored { shape, .. } = stored(name)[tensor].clone();
        let bytes = vec![0; 2 * shape.iter().product::<usize>()];
        (tensor.to_owned(), Stored { dtype: Dtype::BF16, shape, bytes })
    };
    let [q, k] = ["q", "k"].map(|part| format!("model.layers.0.self_attn.{part}_proj.weight"));
    refused(&mut llm, given(&Tensors::from([plain(&q)])), &[&q, &k, "stacked"]);
    llm.clear_prefix_cache();
    assert_eq!(outputs(&mut llm), before);
    // All of them may.
    let o = "model.layers.0.self_attn.o_proj.weight";
    llm.update_weights(given(&Tensors::from([plain(o)]))).unwrap();
    let mut tensors = stored(name);
    tensors.extend([plain(o)]);
    assert_eq!(outputs(&mut llm), fresh(name, &tensors));
}

#[test]
fn files_and_folders_are_read_whole_and_may_be_written_again() {
    let name = "tiny-untied";
    let new = all_trained(&stored(name), 3);
    let expected = fresh(name, &new);
    let folder = checkpoint(name, &new);
    for file in [true, false] {
        let mut llm = family(name).build().unwrap();
        let path = folder.join("model.safetensors");
        llm.update_weights_from(if file { &path } else { folder.path() }).unwrap();
        fs::write(&path, []).unwrap();
        assert_eq!(outputs(&mut llm), expected);
        write(&new, &path);
    }
    // A folder without a configuration, of two files.
    let folder = Scratch::new();
    let (first, second): (Tensors, Tensors) =
        new.clone().into_iter().partition(|(name, _)| name.contains("mlp"));
    write(&first, &folder.join("a.safetensors"));
    write(&second, &folder.join("b.safetensors"));
    let mut llm = family(name).build().unwrap();
    llm.update_weights_from(folder.path()).unwrap();
    assert_eq!(outputs(&mut llm), expected);
}

#[test]
fn what_is_left_aside_when_a_model_is_loaded_may_be_given() {
    let mut new = all_trained(&stored("tiny-tied"), 4);
    let expected = fresh("tiny-tied", &new);
    let head = new["model.embed_tokens.weight"].clone();
    new.insert("lm_head.weight".to_owned(), head);
    let angles = Stored { dtype: Dtype::F32, shape: vec![2], bytes: vec![0; 8] };
    new.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), angles);
    let mut llm = family("tiny-tied").build().unwrap();
    llm.update_weights(given(&new)).unwrap();
    assert_eq!(outputs(&mut llm), expected);
}

#[test]
fn inputs_that_are_left_as_they_are_stay_so() {
    let name = "llama-fp8ct";
    let new = all_trained(&stored(name), 5);
    let expected = outputs(&mut of(&checkpoint(name, &new)).plain_inputs(true).build().unwrap());
    let mut llm = family(name).plain_inputs(true).build().unwrap();
    llm.update_weights(given(&new)).unwrap();
    assert_eq!(outputs(&mut llm), expected);
    assert_ne!(expected, fresh(name, &new));
}

#[test]
fn weights_that_are_made_fp8_at_load_are_made_so_again_and_keys_and_values_stay_in_fp8() {
    for name in ["tiny-tied", "qwen3-moe"] {
        let fp8 = |builder: LlmBuilder| builder.quantize(Some(Quantize::Fp8)).kv_dtype(Some(KvFormat::Fp8));
        let new = all_trained(&stored(name), 5);
        let expected = outputs(&mut fp8(of(&checkpoint(name, &new))).build().unwrap());
        let mut llm = fp8(family(name)).build().unwrap();
        llm.update_weights(given(&new)).unwrap();
        assert_eq!(outputs(&mut llm), expected, "{name}");
        assert_ne!(expected, fresh(name, &new), "{name}");
    }
}

#[test]
fn requests_that_run_end_with_the_old_weights_and_those_that_wait_begin_with_the_new() {
    let name = "tiny-tied";
    let new = all_trained(&stored(name), 6);
    let requests: Vec<_> = (0..30).map(|i| common::greedy_request(&[7 + i, 9, 200 - i], 20 + i)).collect();
    let builder = || family(name).max_running(3).prefix_cache(false);
    let old = builder().build().unwrap().generate(&requests).unwrap();
    let folder = checkpoint(name, &new);
    let expected = of(&folder).prefix_cache(false).build().unwrap().generate(&requests).unwrap();

    let options = SessionOptions { capacity: Some(requests.len()), ..SessionOptions::default() };
    let ended = in_time(|| {
        let mut llm = builder().build().unwrap();
        let (mut submitter, events) = llm.handle().session(options);
        submitter.submit_all((0..).zip(requests.clone())).unwrap();
        drop(submitter);
        let mut ended: Vec<Option<Completion>> = vec![None; old.len()];
        let mut has_updated = false;
        for event in events {
            if let SessionEvent::Finished { tag, completion, .. } = event.unwrap() {
                ended[tag as usize] = Some(*completion);
                if !std::mem::replace(&mut has_updated, true) {
                    llm.update_weights(given(&new)).unwrap();
                }
            }
        }
        let ended: Vec<Completion> = ended.into_iter().map(Option::unwrap).collect();
        (ended.last() != old.last()).then_some(ended)
    });
    let first_new = ended.iter().zip(&old).position(|(ended, old)| ended != old).unwrap();
    assert!(first_new > 0, "the first to end had begun before");
    assert_eq!((&ended[..first_new], &ended[first_new..]), (&old[..first_new], &expected[first_new..]));
}

#[test]
fn all_engines_are_updated() {
    let name = "qwen3-moe";
    let new = all_trained(&stored(name), 7);
    let expected = fresh(name, &new);
    let mut llm = family(name).data_parallel(2).max_running(1).build().unwrap();
    outputs(&mut llm);
    llm.update_weights(given(&new)).unwrap();
    for _ in 0..3 {
        for (completion, expected) in outputs(&mut llm).into_iter().zip(&expected) {
            // Which engine has which prefix is chance.
            let cached_tokens = expected.cached_tokens;
            assert_eq!(Completion { cached_tokens, ..completion }, *expected);
        }
    }
}

#[test]
fn another_engine_is_built_with_the_weights_of_now() {
    let name = "tiny-tied";
    let new = all_trained(&stored(name), 8);
    let mut llm = family(name).build().unwrap();
    assert!(llm.updated_weights().is_none());
    llm.update_weights(given(&new)).unwrap();
    let weights = llm.updated_weights().unwrap();
    drop(llm);
    let mut again = family(name).weights(weights).build().unwrap();
    assert_eq!(outputs(&mut again), fresh(name, &new));
    // It goes on from there.
    let old = stored(name);
    again.update_weights(given(&old)).unwrap();
    assert_eq!(outputs(&mut again), outputs(&mut family(name).build().unwrap()));
}

#[test]
fn dummy_weights_give_way_to_real_ones() {
    // The preset's dummies, one by one, and a checkpoint of the same sizes.
    let preset = minisgl_qwen3::QWEN3.presets.iter().find(|preset| preset.name == "tiny").unwrap();
    let config = preset.config.replacen('{', "{\"architectures\": [\"Qwen3ForCausalLM\"], ", 1);
    let dummies = minisgl_decoder::Checkpoint::preset("tiny", &[&minisgl_qwen3::QWEN3]).unwrap();
    let mut numbers = Numbers(9);
    let tensors = dummies.tensors().iter().map(|tensor| {
        let is_vector = tensor.name.ends_with("norm.weight");
        let shape = if is_vector { vec![tensor.cols] } else { vec![tensor.rows, tensor.cols] };
        let small = |numbers: &mut Numbers| (numbers.below(1000) as f32 / 500.0 - 1.0) * 0.1;
        let elements = (0..tensor.rows * tensor.cols).flat_map(|_| small(&mut numbers).to_le_bytes());
        (tensor.name.clone(), Stored { dtype: Dtype::F32, shape, bytes: elements.collect() })
    });
    let tensors: Tensors = tensors.collect();
    let folder = Scratch::new();
    folder.write("config.json", config);
    write(&tensors, &folder.join("model.safetensors"));

    let mut llm = small("tiny").max_seq_len(Some(256)).build().unwrap();
    let dummy = outputs(&mut llm);
    let (first, second): (Tensors, Tensors) =
        tensors.clone().into_iter().partition(|(name, _)| name.contains("layers.0"));
    llm.update_weights(given(&first)).unwrap();
    assert_ne!(outputs(&mut llm), dummy);
    llm.update_weights(given(&second)).unwrap();
    assert_eq!(outputs(&mut llm), outputs(&mut of(&folder).build().unwrap()));
}

#[test]
fn what_was_drawn_gets_the_same_bits_when_it_is_scored_before_and_after_an_update() {
    let name = "tiny-tied";
    let mut llm = family(name).build().unwrap();
    let prompts: Vec<Vec<u32>> = (1..6).map(|i| (0..20 * i).map(|j| (i * j + 7) % 250).collect()).collect();
    for seed in 0..3 {
        let sampling = SamplingParams { temperature: 1.0, seed, logprobs: Some(0), ..greedy(30) };
        let drawn = prompts.iter().map(|prompt| GenerateRequest::tokens(prompt.clone()).sampling(sampling));
        let drawn = llm.generate(&drawn.collect::<Vec<_>>()).unwrap();
        let given_again = prompts.iter().zip(&drawn);
        let scored =
            given_again.map(|(prompt, drawn)| ScoreRequest::tokens(prompt.clone(), drawn.token_ids.clone()));
        let scored = llm.score(&scored.collect::<Vec<_>>()).unwrap();
        for (drawn, scored) in drawn.iter().zip(&scored) {
            let bits = |logprobs: &[minisgl::TokenLogprobs]| -> Vec<u32> {
                logprobs.iter().map(|one| one.logprob.to_bits()).collect()
            };
            assert_eq!(bits(drawn.logprobs.as_ref().unwrap()), bits(&scored.logprobs));
        }
        llm.update_weights(given(&all_trained(&stored(name), 20 + seed))).unwrap();
    }
}

#[test]
fn a_simulated_model_has_no_weights() {
    let (mut llm, _) =
        Llm::simulated(minisgl::simulated::Control::default(), minisgl::Text::default()).unwrap();
    assert!(matches!(llm.update_weights([]), Err(Error::NoWeights)));
}
