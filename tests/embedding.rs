//! Embeddings of prompts: those of transformers, and the same bits however they are computed.

mod common;

use std::fs;
use std::sync::Arc;

use common::{
    CHECKPOINTS, FAMILIES, Golden, Scratch, builder, families_on_cuda, family, fixture, greedy,
    relative_error, small,
};
use minisgl::{
    BackendChoice, Dtype, EmbedRequest, Embedding, FinishReason, GenerateRequest, KernelSet, LlmBuilder,
    NamedTensor, Prompt, RequestError, SamplingError, SamplingParams, SubmitError,
};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

/// What transformers computes of a golden checkpoint's prompts, `[hidden]` each.
fn expected(name: &str) -> Vec<Vec<f32>> {
    let bytes = fs::read(fixture(name).join("embeddings.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |i: usize| {
        let data = file.tensor(&format!("embedding.{i}")).unwrap().data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    (0..file.len()).map(values).collect()
}

fn requests(name: &str) -> Vec<EmbedRequest> {
    Golden::open(name).examples.iter().map(|example| EmbedRequest::tokens(&example.prompt[..])).collect()
}

/// The largest error of a checkpoint's embeddings, of their length, which is 1.
fn error(name: &str, builder: LlmBuilder) -> f32 {
    let mut llm = builder.build().unwrap();
    let (embeddings, expected) = (llm.embed(&requests(name)).unwrap(), expected(name));
    assert_eq!(embeddings.len(), expected.len());
    let errors = embeddings.iter().zip(&expected).map(|(embedding, expected)| {
        assert_eq!(embedding.error, None);
        let error = relative_error(&embedding.values, expected);
        if error.is_nan() { f32::INFINITY } else { error }
    });
    let largest = errors.fold(0.0, f32::max);
    llm.check();
    largest
}

#[test]
fn embeddings_are_those_of_transformers() {
    for name in CHECKPOINTS.into_iter().chain(FAMILIES) {
        for (prefill_tokens, prefix_cache) in [(512, true), (7, true), (512, false)] {
            let builder = family(name).max_prefill_tokens(prefill_tokens).prefix_cache(prefix_cache);
            let error = error(name, builder);
            assert!(error < 1e-3, "{name}, {prefill_tokens} prefill tokens: an embedding is off by {error}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn embeddings_on_the_gpu_are_those_of_transformers_within_bf16() {
    for name in CHECKPOINTS.into_iter().chain(families_on_cuda()) {
        for kernels in [KernelSet::Auto, KernelSet::Portable] {
            let error = error(name, family(name).backend(BackendChoice::Cuda).kernels(kernels));
            println!("{name}, {kernels:?}: largest error of an embedding {error:.5}");
            // As rows of logits are, where activations are bf16 (`tests/cuda.rs`).
            assert!(error < 0.15, "{name}, {kernels:?}: an embedding is off by {error}");
        }
    }
}

/// Prompts that share beginnings, some longer than a chunk.
fn prompts(count: u32) -> Vec<Vec<u32>> {
    let prompt = |i: u32| (0..5 + i * 53 % 190).map(move |at| (at * at * 7 + at / 60 * (i % 3) * 11) % 500);
    (0..count).map(|i| prompt(i).collect()).collect()
}

/// They hold little more than one text: of some ways' requests some are retracted.
const FEW_PAGES: u32 = 16;

fn assert_the_same_however_computed(ways: impl IntoIterator<Item = (String, LlmBuilder)>) {
    let prompts = prompts(12);
    let embed = |prompt: &Vec<u32>| GenerateRequest::from(EmbedRequest::tokens(&prompt[..]));
    // Others draw beside them.
    let draw = |prompt: &Vec<u32>| GenerateRequest::tokens(&prompt[..]).sampling(greedy(50));
    let mixed: Vec<_> = prompts.iter().flat_map(|prompt| [draw(prompt), embed(prompt)]).collect();
    let mut first: Option<Vec<Vec<f32>>> = None;
    let (mut few_pages, mut retractions) = (false, 0);
    for (way, builder) in ways {
        let mut llm = builder.build().unwrap();
        let mixed = llm.generate(&mixed).unwrap().into_iter().filter_map(|completion| completion.embedding);
        let mixed: Vec<_> = mixed.collect();
        // By now the cache may have all of them.
        let requests: Vec<_> = prompts.iter().map(|prompt| EmbedRequest::tokens(&prompt[..])).collect();
        let alone: Vec<Embedding> =
            requests.iter().flat_map(|request| llm.embed(std::slice::from_ref(request)).unwrap()).collect();
        let alone: Vec<_> = alone.into_iter().map(|embedding| embedding.values).collect();
        assert_eq!(mixed.len(), prompts.len());
        assert!(mixed == alone, "{way}: the bits depend on the company");
        assert!(*first.get_or_insert_with(|| alone.clone()) == alone, "{way}: the bits depend on the way");
        few_pages |= llm.info().limits.pages == FEW_PAGES;
        retractions += llm.stats().retractions;
        assert_eq!(llm.stats().embeddings, 24);
        llm.check();
    }
    assert_eq!(few_pages, retractions > 0, "{retractions} requests gave their pages back");
}

#[test]
fn an_embedding_has_the_same_bits_however_it_is_computed() {
    let way = |(prefill, pages, cache, running): (u32, u32, bool, u32)| {
        let builder = family("tiny-untied").max_prefill_tokens(prefill).num_pages(Some(pages));
        let builder = builder.prefix_cache(cache).max_running(running);
        (format!("{prefill} prefill tokens, {pages} pages, prefix cache {cache}, {running} at once"), builder)
    };
    let ways = [
        (512, 128, true, 8),
        (512, 128, false, 8),
        (7, 128, true, 8),
        (64, FEW_PAGES, true, 8),
        (33, FEW_PAGES, false, 8),
        (512, 128, true, 1),
    ];
    assert_the_same_however_computed(ways.map(way));
}

#[test]
#[ignore = "needs a GPU"]
fn an_embedding_on_the_gpu_has_the_same_bits_however_it_is_computed() {
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        let way = |(prefill, cache): (u32, bool)| {
            let builder = family("tiny-untied").backend(BackendChoice::Cuda).kernels(kernels);
            let builder = builder.max_prefill_tokens(prefill).prefix_cache(cache);
            (format!("{kernels:?}, {prefill} prefill tokens, prefix cache {cache}"), builder)
        };
        assert_the_same_however_computed([(512, true), (512, false), (64, true), (7, true)].map(way));
    }
}

fn length(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn an_embedding_of_fewer_dimensions_is_the_beginning_of_the_whole_at_length_1() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let request = requests("tiny-tied").remove(2);
    let cuts = [1, 32, 127, 128].map(|dimensions| request.clone().dimensions(dimensions));
    let whole = llm.embed(std::slice::from_ref(&request)).unwrap().remove(0).values;
    assert!((length(&whole) - 1.0).abs() < 1e-6);
    for (cut, dimensions) in llm.embed(&cuts).unwrap().into_iter().zip([1, 32, 127, 128]) {
        let beginning = &whole[..dimensions];
        let scaled: Vec<f32> = beginning.iter().map(|value| value / length(beginning) as f32).collect();
        assert_eq!(cut.values.len(), dimensions);
        assert!(relative_error(&cut.values, &scaled) < 1e-6, "{dimensions} dimensions");
    }
    for asked in [0, 129] {
        let refused = llm.embed(&[request.clone().dimensions(asked)]).unwrap().remove(0);
        let error = SubmitError::Sampling(SamplingError::Dimensions { asked, most: 128 });
        assert_eq!((refused.error, refused.values.len()), (Some(RequestError::Refused(error)), 0));
    }
}

#[test]
fn an_embedding_comes_alone_and_of_a_prompt_that_fits() {
    let mut llm = builder("tiny-tied").max_seq_len(Some(64)).build().unwrap();
    let fits = EmbedRequest::tokens(vec![5; 64]);
    let drawing = GenerateRequest::from(fits.clone());
    let drawing = drawing.clone().sampling(SamplingParams { max_tokens: 1, ..drawing.sampling });
    let refused = llm.generate(&[drawing]).unwrap().remove(0);
    let alone = RequestError::Refused(SubmitError::Sampling(SamplingError::EmbedAlone));
    assert_eq!((refused.error, refused.finish_reason), (Some(alone), FinishReason::Rejected));
    let one_more = EmbedRequest::tokens(vec![5; 65]);
    let empty = EmbedRequest::tokens([]);
    let unknown = EmbedRequest::tokens([1024]);
    let text = EmbedRequest::text("a");
    let embeddings = llm.embed(&[fits, one_more, empty, unknown, text]).unwrap();
    let errors: Vec<_> = embeddings.iter().map(|it| it.error.as_ref().map(RequestError::kind)).collect();
    let expected = [
        None,
        Some("prompt too long"),
        Some("empty prompt"),
        Some("token outside the vocabulary"),
        Some("no tokenizer"),
    ];
    assert_eq!(errors, expected);
    assert_eq!((embeddings[0].values.len(), embeddings[0].prompt_tokens), (128, 64));
}

#[test]
fn a_text_is_embedded_as_its_tokens_are() {
    let folder = Scratch::with_text();
    let mut llm = small(folder.path()).build().unwrap();
    let text = "Water boils at 100 degrees.";
    let ids = llm.encode(text).unwrap();
    let both = [EmbedRequest::text(text), EmbedRequest::new(Prompt::Tokens(ids))];
    let embeddings = llm.embed(&both).unwrap();
    assert_eq!(embeddings[0], embeddings[1]);
}

/// tiny-untied as a model for embeddings is published: the body alone, under names without `model.`.
fn body(folder: &Scratch) {
    let shards: Vec<Vec<u8>> = fs::read_dir(fixture("tiny-untied"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().is_some_and(|path| path.contains("model-0")))
        .map(|path| fs::read(path).unwrap())
        .collect();
    let files: Vec<_> = shards.iter().map(|shard| SafeTensors::deserialize(shard).unwrap()).collect();
    let tensors = files.iter().flat_map(SafeTensors::tensors);
    let body: Vec<(String, TensorView<'_>)> = tensors
        .filter_map(|(name, tensor)| Some((name.strip_prefix("model.")?.to_owned(), tensor)))
        .collect();
    folder.write("model.safetensors", safetensors::serialize(body, None).unwrap());
    folder.write("config.json", fs::read(fixture("tiny-untied").join("config.json")).unwrap());
}

#[test]
fn a_checkpoint_of_the_body_alone_gives_embeddings_and_says_that_it_draws_nothing() {
    let folder = Scratch::new();
    body(&folder);
    let mut llm = small(folder.path()).build().unwrap();
    let whole = builder("tiny-untied").build().unwrap().embed(&requests("tiny-untied")).unwrap();
    assert_eq!(llm.embed(&requests("tiny-untied")).unwrap(), whole);
    let refused = llm.generate(&[GenerateRequest::tokens([1, 2])]).unwrap().remove(0).error.unwrap();
    assert!(refused.to_string().contains("lm_head.weight"), "{refused}");
    llm.check();
}

#[test]
fn a_model_without_an_output_layer_is_given_none_by_an_update_and_the_refusal_says_what_to_do() {
    let folder = Scratch::new();
    body(&folder);
    let mut llm = small(folder.path()).build().unwrap();
    let before = llm.embed(&requests("tiny-untied")).unwrap();
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap();
    let shape = ["vocab_size", "hidden_size"].map(|size| config[size].as_u64().unwrap() as usize);
    let tensor = |name: &str, shape: &[usize]| {
        let bytes = Arc::new(vec![0; 2 * shape.iter().product::<usize>()]);
        NamedTensor { name: name.to_owned(), dtype: Dtype::BF16, shape: shape.to_vec(), bytes }
    };
    // What is right with the update is not written either.
    let error = llm.update_weights([tensor("norm.weight", &shape[1..]), tensor("lm_head.weight", &shape)]);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("lm_head.weight") && error.contains("load a checkpoint that has it"), "{error}");
    llm.clear_prefix_cache();
    assert_eq!(llm.embed(&requests("tiny-untied")).unwrap(), before);
    llm.update_weights([tensor("norm.weight", &shape[1..])]).unwrap();
    assert_ne!(llm.embed(&requests("tiny-untied")).unwrap(), before);
}

const LAST_TOKEN: &str =
    r#"{"pooling_mode_cls_token": false, "pooling_mode_lasttoken": true, "include_prompt": true}"#;

fn modules(kinds: &[&str]) -> String {
    let module = |(i, kind): (usize, &&str)| {
        let path = if *kind == "Transformer" { String::new() } else { format!("{i}_{kind}") };
        format!(
            r#"{{"idx": {i}, "name": "{i}", "path": "{path}", "type": "sentence_transformers.models.{kind}"}}"#
        )
    };
    format!("[{}]", kinds.iter().enumerate().map(module).collect::<Vec<_>>().join(", "))
}

/// tiny-tied with such files of sentence-transformers: an embedding of one of its prompts.
fn with_files(modules: &str, pooling: Option<&str>) -> Embedding {
    let folder = Scratch::new();
    folder.copy("tiny-tied");
    folder.write("modules.json", modules);
    if let Some(pooling) = pooling {
        fs::create_dir(folder.join("1_Pooling")).unwrap();
        folder.write("1_Pooling/config.json", pooling);
    }
    let mut llm = small(folder.path()).build().unwrap();
    let tokens = llm.generate(&[GenerateRequest::tokens([1, 2]).sampling(greedy(2))]).unwrap().remove(0);
    assert_eq!((tokens.token_ids.len(), tokens.error), (2, None), "it generates all the same");
    llm.embed(&requests("tiny-tied")[..1]).unwrap().remove(0)
}

#[test]
fn the_files_of_sentence_transformers_say_whether_embeddings_are_scaled() {
    let expected = expected("tiny-tied").remove(0);
    for pooling in [LAST_TOKEN, r#"{"pooling_mode": "lasttoken", "embedding_dimension": 128}"#] {
        let scaled = with_files(&modules(&["Transformer", "Pooling", "Normalize"]), Some(pooling));
        assert!(relative_error(&scaled.values, &expected) < 1e-3);
    }
    let unscaled = with_files(&modules(&["Transformer", "Pooling"]), Some(LAST_TOKEN)).values;
    let (length, first) = (length(&unscaled) as f32, unscaled[0]);
    assert!(length > 2.0, "a hidden state of {length}");
    assert!((first / length - expected[0]).abs() < 1e-3);
}

#[test]
fn embeddings_that_are_made_in_another_way_are_refused_by_its_name() {
    let usual = modules(&["Transformer", "Pooling", "Normalize"]);
    let outside = usual.replace("1_Pooling", "../1_Pooling");
    let mean = r#"{"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": false}"#;
    let cases = [
        (usual.clone(), Some(mean), "mean_tokens"),
        (usual.clone(), Some(r#"{"pooling_mode": "cls"}"#), "cls"),
        (usual.clone(), Some(r#"{"pooling_mode": ["lasttoken", "max"]}"#), "max"),
        (usual.clone(), Some("{}"), "1_Pooling/config.json"),
        (usual.clone(), Some("["), "1_Pooling/config.json"),
        (usual, None, "1_Pooling/config.json is missing"),
        (modules(&["Transformer", "Pooling", "Dense", "Normalize"]), Some(LAST_TOKEN), "Dense"),
        (outside, Some(LAST_TOKEN), "../1_Pooling"),
        ("{}".to_owned(), Some(LAST_TOKEN), "modules.json"),
    ];
    for (modules, pooling, named) in cases {
        let embedding = with_files(&modules, pooling);
        let error = embedding.error.expect("it is refused").to_string();
        assert!(error.contains(named) && embedding.values.is_empty(), "{named} is not named: {error}");
    }
}
