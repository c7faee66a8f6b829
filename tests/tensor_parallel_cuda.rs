//! Several ranks on GPUs, each with a part of the weights: the tokens and log-probabilities of one GPU, and a rank that fails or hangs
//! ends all.

mod common;
#[path = "../core/tests/support/fault.rs"]
#[allow(dead_code, reason = "other tests use all of it")]
mod fault;

use std::time::{Duration, Instant};

use common::logits::checkpoint;
use common::ranks::{Bits, bits, random_checkpoint, requests, run, way, with_experts};
use common::stored::{all_trained, checkpoint as checkpoint_of, given, stored};
use common::{family, fixture, greedy, mixed_requests, skipped, small};
use fault::{Fault, Faulty, FaultyError};
use minisgl::{
    BackendChoice, EmbedRequest, Embedding, Error, KernelSet, Llm, LlmBuilder, Policy, Speculation,
};
use minisgl_core::config::Limits;
use minisgl_core::engine::{Engine, EngineOptions};
use minisgl_core::executor::Executor;
use minisgl_core::local::Local;
use minisgl_core::request::Request;
use minisgl_core::scheduler::{Order, Settings};
use minisgl_cuda::{Cuda, CudaError, Link, device_count};
use minisgl_decoder::{Decoder, LoadError};
use minisgl_ranks::Ranks;

/// Golden checkpoints whose columns four ranks' slices are cut from.
const DIVISIBLE: [&str; 2] = ["tiny-tied", "llama-rope3"];

/// Are there so many GPUs? Else it says that something was not tried.
fn are_there(gpus: usize) -> bool {
    let there = device_count().expect("a driver");
    if there < gpus {
        skipped(&format!("{gpus} GPUs are needed, {there} are there"));
    }
    there >= gpus
}

/// As many ranks as can be tried.
fn ranks() -> impl Iterator<Item = u32> {
    [2, 4].into_iter().filter(|ranks| are_there(*ranks as usize))
}

fn on_gpu(builder: LlmBuilder) -> LlmBuilder {
    builder.backend(BackendChoice::Cuda)
}

#[test]
#[ignore = "needs two GPUs"]
fn ranks_give_the_bits_of_one_gpu_however_they_are_computed() {
    for name in DIVISIBLE {
        for kernels in [KernelSet::Auto, KernelSet::Portable] {
            let requests = requests(12, 250);
            let builder = || on_gpu(family(name)).kernels(kernels);
            let expected = run(builder(), &requests);
            for ranks in ranks() {
                for bits in [0, 7, 13, 22, 27] {
                    let given = run(way(builder(), bits).tensor_parallel(ranks), &requests);
                    assert!(given == expected, "{name}, {kernels:?}: {ranks} ranks, way {bits}");
                }
            }
        }
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn ranks_of_experts_give_the_bits_of_one_gpu_however_they_are_computed() {
    let scratch = with_experts();
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        let requests = requests(12, 100);
        let builder = || on_gpu(small(scratch.path())).kernels(kernels).max_seq_len(Some(256));
        let expected = run(builder(), &requests);
        for ranks in ranks() {
            for bits in [0, 7, 13, 22, 27] {
                let given = run(way(builder(), bits).tensor_parallel(ranks), &requests);
                assert!(given == expected, "{kernels:?}: {ranks} ranks, way {bits}");
            }
        }
    }
}

/// An MLP's output of five blocks of columns, which two ranks do not share as columns, but as rows, and eight ranks attention's too.
#[test]
#[ignore = "needs two GPUs"]
fn ranks_that_share_rows_give_the_bits_of_one_gpu_however_they_are_computed() {
    let (hidden, inner) = (512, 320);
    let mlp = [("gate_proj", inner, hidden), ("up_proj", inner, hidden), ("down_proj", hidden, inner)];
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 103,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 512, "tie_word_embeddings": false
    });
    let mlp = mlp.map(|(name, rows, cols)| (format!("mlp.{name}.weight"), vec![rows, cols]));
    let folder = random_checkpoint(&config, &mlp);
    for kernels in [KernelSet::Auto, KernelSet::Portable] {
        let requests = requests(12, 100);
        let builder = || on_gpu(small(folder.path())).kernels(kernels);
        let expected = run(builder(), &requests);
        for ranks in [2, 8].into_iter().filter(|ranks| are_there(*ranks as usize)) {
            for bits in [0, 7, 13, 22, 27] {
                let given = run(way(builder(), bits).tensor_parallel(ranks), &requests);
                assert!(given == expected, "{kernels:?}: {ranks} ranks, way {bits}");
            }
        }
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn a_tiny_pool_preempts_and_ranks_go_on_with_the_same_tokens() {
    let mut requests = mixed_requests(12, 500);
    requests.iter_mut().for_each(|request| request.sampling.max_tokens = 60);
    let builder = || on_gpu(small(fixture("tiny-tied"))).max_seq_len(Some(512));
    let expected = run(builder(), &requests);
    for ranks in ranks() {
        let tiny = way(builder(), 0b10101).page_size(16).num_pages(Some(34));
        let mut llm = tiny.tensor_parallel(ranks).build().unwrap();
        let given: Vec<Bits> = llm.generate(&requests).unwrap().iter().map(bits).collect();
        assert!(given == expected, "{ranks} ranks");
        assert!(llm.stats().retractions > 0, "{:?}", llm.stats());
        llm.check();
    }
}

/// A model of a size that is used, with dummy weights: recorded steps of many rows, chunks, retraction.
fn assert_the_same(model: &str, count: usize) {
    let requests = mixed_requests(count, 2000);
    let base = || {
        let builder = on_gpu(Llm::builder(model)).max_seq_len(Some(512)).max_running(256);
        builder.num_pages(Some(9000)).max_prefill_tokens(4096)
    };
    let expected = run(base(), &requests);
    for ranks in ranks() {
        let ways = [
            ("recorded", base()),
            ("not recorded, in chunks", base().max_graph_batch(0).max_prefill_tokens(100)),
            (
                "few at once, with retraction",
                base().max_running(24).num_pages(Some(64)).policy(Policy::Latency),
            ),
        ];
        for (what, builder) in ways {
            let given = run(builder.tensor_parallel(ranks), &requests);
            let differing = (0..count).filter(|i| given[*i] != expected[*i]).count();
            assert_eq!(differing, 0, "{model}, {ranks} ranks, {what}");
        }
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn ranks_of_a_small_model_give_its_tokens() {
    assert_the_same("qwen3-0.6b", 256);
}

#[test]
#[ignore = "needs two GPUs"]
fn ranks_of_a_large_model_give_its_tokens() {
    assert_the_same("qwen3-14b", 64);
}

#[test]
#[ignore = "needs two GPUs"]
fn ranks_of_a_model_with_experts_give_its_tokens() {
    assert_the_same("qwen3-30b-a3b", 64);
}

#[test]
#[ignore = "needs two GPUs"]
fn ranks_give_the_embeddings_of_one_gpu() {
    let prompt = |i: u32| (0..9 * i).map(|at| at * i % 250).collect::<Vec<_>>();
    let prompts: Vec<_> = (1..8).map(|i| EmbedRequest::tokens(prompt(i))).collect();
    let embeddings = |builder: LlmBuilder| {
        let values = |one: &Embedding| one.values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        builder.build().unwrap().embed(&prompts).unwrap().iter().map(values).collect::<Vec<_>>()
    };
    let expected = embeddings(on_gpu(family("tiny-tied")));
    for ranks in ranks() {
        assert!(embeddings(on_gpu(family("tiny-tied")).tensor_parallel(ranks)) == expected, "{ranks} ranks");
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn engines_of_several_ranks_stand_behind_one_queue() {
    let requests = requests(12, 300);
    let expected = run(on_gpu(family("tiny-tied")), &requests);
    if are_there(2) {
        assert!(
            run(on_gpu(family("tiny-tied")).data_parallel(2), &requests) == expected,
            "an engine on each"
        );
        let backwards = on_gpu(family("tiny-tied")).devices([1, 0]).tensor_parallel(2);
        assert!(run(backwards, &requests) == expected, "the second GPU is rank 0");
    }
    if are_there(4) {
        let builder = on_gpu(family("tiny-tied")).data_parallel(2).tensor_parallel(2);
        assert!(run(builder, &requests) == expected);
    }
}

#[test]
#[ignore = "needs two GPUs"]
fn weights_that_are_updated_are_those_of_every_rank() {
    if !are_there(2) {
        return;
    }
    let requests = requests(6, 250);
    let new = all_trained(&stored("tiny-tied"), 3);
    let loaded =
        run(on_gpu(small(checkpoint_of("tiny-tied", &new).path())).max_seq_len(Some(256)), &requests);
    let mut llm = on_gpu(family("tiny-tied")).tensor_parallel(2).build().unwrap();
    let generate = |llm: &mut Llm| llm.generate(&requests).unwrap().iter().map(bits).collect::<Vec<Bits>>();
    let before = generate(&mut llm);
    llm.update_weights(given(&new)).unwrap();
    let after = generate(&mut llm);
    assert!(after == loaded, "the bits of one GPU that was loaded with them");
    assert!(before != after, "another model");
}

#[test]
#[ignore = "needs two GPUs"]
fn what_ranks_can_not_compute_is_refused_with_its_reason() {
    if !are_there(2) {
        return;
    }
    for (name, said) in [
        ("qwen3-moe", "share is no multiple of 64"),
        ("qwen2-yarn", "3 query heads"),
        ("tiny-untied", "320 columns"),
        ("qwen3-fp8", "its weights are fp8"),
    ] {
        let error = on_gpu(family(name)).tensor_parallel(2).build().err().unwrap().to_string();
        assert!(error.contains(said), "{name}: {error}");
    }
    let error = on_gpu(family("tiny-tied")).tensor_parallel(2).devices([0, 70]).build().err().unwrap();
    assert!(matches!(error, Error::Gpu(_)) && error.to_string().contains("GPU 70"), "{error}");
}

type Rank = Local<Faulty<Cuda>, Decoder<Faulty<Cuda>>>;

/// Lets a rank's operation behind `well` others become what `fault` says, while requests run; what is said of it, and when.
fn found(faulty: u32, well: u64, fault: Fault, graph_rows: u32) -> (String, Duration) {
    const PATIENCE: Duration = Duration::from_secs(3);
    let checkpoint = checkpoint(&fixture("tiny-tied"));
    let links = Link::group(&[0, 1], KernelSet::Auto, PATIENCE).unwrap();
    let (abort, renew) = (links[0].aborter(), links[0].renewer());
    let builder = |link: Link| {
        let (rank, checkpoint) = (link.rank(), checkpoint.clone());
        move || {
            let cuda = Cuda::of_rank(link).map_err(|error| LoadError::Device(FaultyError::Device(error)))?;
            let mut device = Faulty::new(cuda);
            let model = Decoder::load_part(&mut device, &checkpoint, rank)?;
            Ok::<_, LoadError<FaultyError<CudaError>>>(Local::new(device, model))
        }
    };
    let executor =
        Ranks::<Rank>::start(links.into_iter().map(builder).collect(), PATIENCE, abort, renew).unwrap();
    let (running, sequence, pages) = (4, 128, 32);
    let limits =
        Limits { running, queued: 8, sequence, prefill_tokens: 32, page_size: 16, pages, graph_rows };
    let scheduler = Settings {
        policy: Policy::Throughput,
        prefix_cache: true,
        order: Order::Given,
        speculation: Speculation::Never,
        vocab: executor.model().vocab,
    };
    let options = EngineOptions { limits, fit: None, scheduler, eos: Vec::new(), overlap: true };
    let mut engine = Engine::of(executor, options).unwrap();
    let arm = move |rank: &mut Rank| {
        if rank.backend().device.rank().index == faulty {
            rank.backend().arm(well, fault);
        }
        Ok(())
    };
    engine.executor().each(arm).unwrap();
    for prompt in [&[1, 2, 3][..], &[5; 40], &[7, 8]] {
        engine.submit(Request::new(prompt, greedy(60))).unwrap();
    }
    let started = Instant::now();
    let error = loop {
        assert!(
            !engine.is_idle(),
            "nothing was found of {fault:?} on rank {faulty}, after {well} operations"
        );
        if let Err(error) = engine.step(&mut |_| ()) {
            break error.to_string();
        }
    };
    drop(engine);
    (error, started.elapsed())
}

#[test]
#[ignore = "needs two GPUs"]
fn a_rank_that_fails_panics_or_hangs_ends_all_in_bounded_time_with_its_name() {
    if !are_there(2) {
        return;
    }
    for (faulty, well, fault, graph_rows) in [
        (0, 3, Fault::Fails, 0),
        (1, 12, Fault::Fails, 4),
        (1, 40, Fault::Panics, 0),
        (0, 77, Fault::Fails, 4),
    ] {
        let (said, took) = found(faulty, well, fault, graph_rows);
        let named = said.contains(&format!("rank {faulty}")) && said.contains("on purpose");
        assert!(named, "rank {faulty}, {fault:?} after {well}: {said}");
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
    // Who waits by NCCL's kernels gives up later than this test's ranks hang.
    let are_carried = std::env::var_os("MINISGL_PEER_ACCESS").is_some_and(|value| value == "0");
    for (faulty, well) in [(1, 9), (0, 30)].into_iter().filter(|_| !are_carried) {
        let (said, took) = found(faulty, well, Fault::Hangs(Duration::from_secs(5)), 0);
        assert!(said.contains(&format!("rank {faulty} did not")), "{said}");
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
}
