//! Requests through the library: what comes of them, alone and among others, good and bad.

mod common;

use std::collections::HashMap;

use common::logits::{Logits, checkpoint};
use common::{Golden, Scratch, builder, fixture, greedy, greedy_request, in_time, small};
use minisgl::{
    Completion, Error, FinishReason, Flow, GenerateRequest, Llm, Order, RequestError, RequestEvent,
    SamplingError, SamplingParams, SessionEvent, SessionOptions, StreamEvent, SubmitError,
};
use minisgl_cpu::Cpu;

fn llm() -> Llm {
    builder("tiny-tied").build().unwrap()
}

/// The error of a request that must be rejected, while another one beside it goes on.
fn rejection(llm: &mut Llm, request: GenerateRequest) -> RequestError {
    let completions = llm.generate(&[request, greedy_request(&[5, 6], 3)]).unwrap();
    assert_eq!(completions[0].finish_reason, FinishReason::Rejected);
    assert!(completions[0].token_ids.is_empty());
    assert_eq!(completions[1].finish_reason, FinishReason::Length);
    assert_eq!(completions[1].token_ids.len(), 3);
    completions[0].error.clone().unwrap()
}

fn refusal(sampling: SamplingParams) -> RequestError {
    rejection(&mut llm(), GenerateRequest::tokens([1]).sampling(sampling))
}

fn bad_sampling(error: SamplingError) -> RequestError {
    SubmitError::from(error).into()
}

#[test]
fn an_empty_prompt_is_rejected() {
    let error = rejection(&mut llm(), GenerateRequest::tokens([]));
    assert_eq!(error, SubmitError::EmptyPrompt.into());
}

#[test]
fn a_token_outside_the_vocabulary_is_rejected_and_named() {
    let error = rejection(&mut llm(), GenerateRequest::tokens([3, 1024]));
    assert_eq!(error, SubmitError::TokenOutsideVocabulary { id: 1024, position: 1, vocab: 1024 }.into());
    let error = rejection(&mut llm(), GenerateRequest::tokens([u32::MAX]));
    assert!(error.to_string().contains("4294967295"), "{error}");
}

#[test]
fn a_prompt_longer_than_the_limit_is_rejected_with_the_limit() {
    let mut llm = builder("tiny-tied").max_seq_len(Some(64)).build().unwrap();
    let error = rejection(&mut llm, greedy_request(&[7; 64], 1));
    assert_eq!(error, SubmitError::PromptTooLong { tokens: 64, limit: 63 }.into());
    let fits = llm.generate(&[greedy_request(&[7; 63], 1)]).unwrap();
    assert_eq!(fits[0].finish_reason, FinishReason::Length);
}

#[test]
fn sampling_parameters_out_of_range_are_rejected() {
    let base = SamplingParams::default();
    for temperature in [-0.5, f32::NAN, f32::INFINITY] {
        let error = refusal(SamplingParams { temperature, ..base }).to_string();
        assert!(error.starts_with(&format!("temperature is {temperature}")), "{error}");
    }
    for top_p in [0.0, -1.0, 1.5] {
        let error = refusal(SamplingParams { top_p, ..base });
        assert_eq!(error, bad_sampling(SamplingError::TopP(top_p)));
    }
    let error = refusal(SamplingParams { top_p: f32::NAN, ..base });
    assert!(error.to_string().starts_with("top_p is NaN"), "{error}");
    let error = refusal(SamplingParams { min_p: 1.1, ..base });
    assert_eq!(error, bad_sampling(SamplingError::MinP(1.1)));
    assert_eq!(refusal(SamplingParams { max_tokens: 0, ..base }), bad_sampling(SamplingError::MaxTokens));
    let error = refusal(SamplingParams { logprobs: Some(21), ..base });
    assert_eq!(error, bad_sampling(SamplingError::Logprobs(21)));
}

#[test]
fn max_tokens_beyond_the_sequence_limit_is_lowered_and_said() {
    let mut llm = builder("tiny-tied").max_seq_len(Some(40)).build().unwrap();
    let completion = &llm.generate(&[greedy_request(&[9; 10], 1000)]).unwrap()[0];
    assert_eq!((completion.max_tokens, completion.token_ids.len()), (30, 30));
    assert_eq!(completion.finish_reason, FinishReason::Length);
    let warning = completion.warning.as_ref().unwrap();
    assert!(warning.contains("1000 to 30") && warning.contains("--max-seq-len"), "{warning}");
    assert_eq!(llm.generate(&[greedy_request(&[9; 10], 30)]).unwrap()[0].warning, None);
}

#[test]
fn an_end_of_sequence_token_ends_a_request_unless_it_is_ignored() {
    let golden = Golden::open("tiny-tied");
    let example = &golden.examples[1];
    let at = 2;
    assert!(!example.greedy[..at].contains(&example.greedy[at]));
    let scratch = Scratch::new();
    scratch.copy("tiny-tied");
    let eos = format!(r#"{{"eos_token_id": [1023, {}]}}"#, example.greedy[at]);
    scratch.write("generation_config.json", eos);
    let mut llm = small(scratch.path()).build().unwrap();

    let ends = GenerateRequest::tokens(example.prompt.clone())
        .sampling(SamplingParams { ignore_eos: false, ..greedy(24) });
    let ignores = greedy_request(&example.prompt, 24);
    let completions = llm.generate(&[ends, ignores]).unwrap();
    assert_eq!(completions[0].finish_reason, FinishReason::Eos);
    assert_eq!(completions[0].token_ids, example.greedy[..=at]);
    assert_eq!(completions[1].finish_reason, FinishReason::Length);
    assert_eq!(completions[1].token_ids, example.greedy);
}

/// Prompts and sampling of all kinds, more than the engine queues.
fn mixed_requests(n: u32) -> Vec<GenerateRequest> {
    let request = |i: u32| {
        let prompt: Vec<u32> = (0..1 + i * 7 % 40).map(|j| (i * 131 + j * 17) % 1024).collect();
        let sampling = SamplingParams {
            temperature: [0.0, 0.7, 1.3][i as usize % 3],
            top_k: [0, 20][i as usize % 2],
            top_p: [1.0, 0.9][i as usize / 2 % 2],
            seed: u64::from(i) << 33,
            logprobs: i.is_multiple_of(4).then_some(i % 3),
            ..greedy(1 + i % 13)
        };
        GenerateRequest::tokens(prompt).sampling(sampling)
    };
    (0..n).map(request).collect()
}

#[test]
fn a_request_gives_the_same_tokens_alone_and_among_others() {
    let requests = mixed_requests(40);
    let mut llm = builder("tiny-untied").order(Order::LongestOutputFirst).build().unwrap();
    let requests: Vec<_> = requests
        .into_iter()
        .map(|mut request| {
            if let minisgl::Prompt::Tokens(ids) = &mut request.prompt {
                ids.iter_mut().for_each(|id| *id %= 768);
            }
            request
        })
        .collect();
    let together = llm.generate(&requests).unwrap();
    for (request, completion) in requests.iter().zip(&together) {
        let alone = llm.generate(std::slice::from_ref(request)).unwrap().remove(0);
        assert_eq!(alone.token_ids, completion.token_ids);
        assert_eq!(completion.token_ids.len() as u32, request.sampling.max_tokens);
    }
    assert_eq!(llm.stats().finished, 80);
    llm.check();
}

#[test]
fn the_stream_pulls_as_there_is_room_and_gives_what_generate_gives() {
    let requests = mixed_requests(60);
    let mut llm = builder("tiny-tied").max_running(4).max_queued(4).prefix_cache(false).build().unwrap();
    let expected = llm.generate(&requests).unwrap();
    let (pulled, finished) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let mut tokens: HashMap<usize, Vec<u32>> = HashMap::new();
    let mut completions: Vec<Option<Completion>> = vec![None; requests.len()];
    let mut steps = 0;
    llm.reset_stats();
    let source = requests.iter().cloned().inspect(|_| {
        pulled.set(pulled.get() + 1);
        assert!(pulled.get() - finished.get() <= 4 + 4, "a request was pulled with no room for it");
    });
    llm.generate_stream(source, |event| {
        match event {
            StreamEvent::Token { index, token, .. } => tokens.entry(index).or_default().push(token),
            StreamEvent::Finished { index, completion, .. } => {
                assert_eq!(tokens[&index], completion.token_ids);
                assert!(completions[index].replace(completion).is_none(), "{index} finished twice");
                finished.set(finished.get() + 1);
            }
            StreamEvent::Step(timing) => {
                assert!(timing.shape.rows() > 0 && timing.gpu_ms >= 0.0 && timing.start_ms >= 0.0);
                steps += 1;
            }
        }
        Flow::Continue
    })
    .unwrap();
    assert_eq!(completions.into_iter().map(Option::unwrap).collect::<Vec<_>>(), expected);
    assert_eq!(steps, llm.stats().steps(), "every step was told");
}

#[test]
fn logprobs_come_with_each_token_and_the_greedy_one_is_the_most_probable() {
    let sampling = SamplingParams { logprobs: Some(5), ..greedy(6) };
    let completion = &llm().generate(&[GenerateRequest::tokens([1, 2, 3]).sampling(sampling)]).unwrap()[0];
    let logprobs = completion.logprobs.as_ref().unwrap();
    assert_eq!(logprobs.len(), 6);
    for (token, entry) in completion.token_ids.iter().zip(logprobs) {
        assert_eq!(entry.top.len(), 5);
        assert_eq!(entry.top[0], (*token, entry.logprob));
        assert!(entry.top.is_sorted_by(|a, b| a.1 >= b.1));
        assert!(entry.top.iter().map(|(_, logprob)| logprob.exp()).sum::<f32>() <= 1.0 + 1e-5);
    }
}

#[test]
fn logprobs_are_the_log_softmax_of_the_logits() {
    let prompt = [40, 50, 60];
    let sampling = SamplingParams { logprobs: Some(0), ..greedy(1) };
    let completion = llm().generate(&[GenerateRequest::tokens(prompt).sampling(sampling)]).unwrap().remove(0);
    let mut model = Logits::new(Cpu::new(), &checkpoint(&fixture("tiny-tied")), 512, true);
    let logits = model.of(&prompt).pop().unwrap();
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let expected = f64::from(logits[completion.token_ids[0] as usize]) - sum.ln();
    let entry = &completion.logprobs.unwrap()[0];
    assert!((f64::from(entry.logprob) - expected).abs() < 1e-4, "{} instead of {expected}", entry.logprob);
    assert!(entry.top.is_empty());
}

#[test]
fn a_request_is_aborted_by_its_event_and_the_others_go_on() {
    let requests = [greedy_request(&[1], 20), greedy_request(&[2], 20), greedy_request(&[3], 20)];
    let mut llm = llm();
    let expected = llm.generate(&requests).unwrap();
    let mut ends = HashMap::new();
    llm.generate_stream(requests.iter().cloned(), |event| match event {
        StreamEvent::Token { index: 1, .. } => Flow::AbortRequest,
        StreamEvent::Finished { index, completion, .. } => {
            ends.insert(index, completion);
            Flow::Continue
        }
        _ => Flow::Continue,
    })
    .unwrap();
    assert_eq!(ends[&1].finish_reason, FinishReason::Abort);
    assert_eq!(ends[&1].token_ids, expected[1].token_ids[..1]);
    for i in [0, 2] {
        assert_eq!(ends[&i].token_ids, expected[i].token_ids);
    }
    llm.check();
}

#[test]
fn whatever_event_says_so_aborting_all_ends_the_run_and_leaves_the_model_usable() {
    let mut llm = builder("tiny-tied").max_running(2).max_queued(2).build().unwrap();
    let says: [fn(&StreamEvent<'_>) -> bool; 3] = [
        |event| matches!(event, StreamEvent::Token { .. }),
        |event| matches!(event, StreamEvent::Step(_)),
        |event| matches!(event, StreamEvent::Finished { .. }),
    ];
    for (kind, says) in says.into_iter().enumerate() {
        let (mut said, mut ended, mut whole) = (false, 0, 0);
        llm.generate_stream((0..200).map(|i| greedy_request(&[i], 20)), |event| {
            if let StreamEvent::Finished { completion, .. } = &event {
                ended += 1;
                whole += u32::from(completion.finish_reason != FinishReason::Abort);
            }
            match !said && says(&event) {
                true => {
                    said = true;
                    Flow::AbortAll
                }
                false => Flow::Continue,
            }
        })
        .unwrap();
        assert!(said && (1..100).contains(&ended), "{ended} ended");
        // The one that said so had its end.
        assert_eq!(whole, u32::from(kind == 2));
        llm.check();
        assert_eq!(llm.generate(&[greedy_request(&[1], 4)]).unwrap()[0].token_ids.len(), 4);
    }
}

#[test]
fn requests_from_several_threads_give_what_they_give_alone_and_dropped_ones_give_their_pages_back() {
    let mut llm = builder("tiny-tied").max_running(4).max_queued(4).build().unwrap();
    let requests = mixed_requests(24);
    let expected = llm.generate(&requests).unwrap();
    std::thread::scope(|scope| {
        for (requests, expected) in requests.chunks(6).zip(expected.chunks(6)) {
            let handle = llm.handle();
            scope.spawn(move || {
                for (request, expected) in requests.iter().zip(expected) {
                    let mut dropped = handle.submit(greedy_request(&[7; 200], 300)).unwrap();
                    assert!(matches!(dropped.next(), Some(Ok(RequestEvent::Token { .. }))));
                    drop(dropped);
                    let mut tokens = Vec::new();
                    for event in handle.submit(request.clone()).unwrap() {
                        match event.unwrap() {
                            RequestEvent::Token { token, .. } => tokens.push(token),
                            RequestEvent::Finished { completion, .. } => {
                                assert_eq!(completion.token_ids, expected.token_ids);
                            }
                        }
                    }
                    assert_eq!(tokens, expected.token_ids);
                }
            });
        }
    });
    llm.check();
    assert_eq!(llm.generate(&requests[..1]).unwrap()[0].token_ids, expected[0].token_ids);
}

#[test]
fn a_session_takes_and_aborts_requests_at_any_time_and_may_be_dropped() {
    let mut llm = llm();
    let options = SessionOptions { tokens: true, ..SessionOptions::default() };
    let (mut submitter, mut events) = in_time(|| {
        let (mut submitter, mut events) = llm.handle().session(options);
        submitter.submit(1, greedy_request(&[1], 500)).unwrap();
        for _ in 0..5 {
            assert!(matches!(events.next(), Some(Ok(SessionEvent::Token { tag: 1, .. }))));
        }
        submitter.submit(2, greedy_request(&[2], 2)).unwrap();
        assert!(events.abort(1));
        let mut ends = HashMap::new();
        while ends.len() < 2 {
            if let SessionEvent::Finished { tag, completion, .. } = events.next().unwrap().unwrap() {
                ends.insert(tag, completion.finish_reason);
            }
        }
        assert_eq!(ends[&2], FinishReason::Length);
        assert!(!events.abort(1));
        (ends[&1] == FinishReason::Abort).then_some((submitter, events))
    });
    submitter.submit(3, greedy_request(&[3], 500)).unwrap();
    assert!(events.next().is_some());
    drop(events);
    assert!(matches!(submitter.submit(4, greedy_request(&[3], 500)), Err(Error::Unread)));
    llm.check();
    assert_eq!(llm.generate(&[greedy_request(&[1], 4)]).unwrap()[0].token_ids.len(), 4);
}

#[test]
fn a_second_request_finds_the_first_ones_prefix_until_the_cache_is_cleared() {
    let mut llm = builder("tiny-tied").page_size(16).build().unwrap();
    let request = [greedy_request(&[11; 50], 2)];
    let mut cached = || llm.generate(&request).unwrap()[0].cached_tokens;
    assert_eq!([cached(), cached()], [0, 48]);
    llm.clear_prefix_cache();
    assert_eq!(llm.generate(&request).unwrap()[0].cached_tokens, 0);
    let mut llm = builder("tiny-tied").prefix_cache(false).build().unwrap();
    let mut cached = || llm.generate(&request).unwrap()[0].cached_tokens;
    assert_eq!([cached(), cached()], [0, 0]);
}

#[test]
fn a_model_that_is_not_there_is_named_with_the_presets() {
    let error = Llm::builder("no/such/model").build().err().unwrap().to_string();
    assert!(error.contains("no/such/model") && error.contains("qwen3-0.6b"), "{error}");
    let scratch = Scratch::new();
    let error = small(scratch.path()).build().err().unwrap().to_string();
    assert!(error.contains("config.json"), "{error}");
}

#[test]
fn settings_that_make_no_engine_are_errors_that_name_them() {
    let error = |builder: minisgl::LlmBuilder| builder.build().err().unwrap().to_string();
    let base = || builder("tiny-tied");
    assert!(error(base().page_size(24)).contains("page size 24"));
    assert!(error(base().max_running(0)).contains("max running requests is 0"));
    assert!(error(base().max_prefill_tokens(0)).contains("max prefill tokens is 0"));
    assert!(error(base().num_pages(Some(0))).contains("number of pages is 0"));
    assert!(error(base().max_seq_len(Some(256)).num_pages(Some(15))).contains("--num-pages 16"));
    assert!(error(base().max_seq_len(Some(5000))).contains("--max-seq-len"));
    assert!(error(base().memory_ratio(0.0)).contains("--memory-ratio is 0"));
    assert!(error(base().memory_ratio(f64::NAN)).contains("--memory-ratio is NaN"));
}

#[test]
fn pages_are_counted_by_need_on_the_cpu() {
    let llm = builder("tiny-tied").max_running(3).num_pages(None).page_size(32).build().unwrap();
    let info = llm.info();
    assert_eq!(info.limits.pages, 3 * 512 / 32);
    // Two layers, keys and values, two heads of 128 f32 elements.
    assert_eq!(info.kv_bytes(), (3 * 512 / 32 + 1) * 32 * 2 * 2 * 2 * 128 * 4);
    assert_eq!(info.backend, "cpu");
    assert_eq!(info.model, fixture("tiny-tied").display().to_string());
    assert!(info.to_string().contains("48 pages of 32 tokens"), "{info}");
}

#[test]
fn an_order_is_that_of_all_that_wait_wherever_they_do() {
    let ends = |order| {
        let mut llm = builder("tiny-tied").max_running(1).order(order).build().unwrap();
        let request = |i: u32| GenerateRequest::tokens([i]).sampling(greedy([3, 9, 1, 7, 5][i as usize]));
        let mut ends = Vec::new();
        let outcome = llm.generate_stream((0..5).map(request), |event| {
            if let StreamEvent::Finished { index, .. } = event {
                ends.push(index);
            }
            Flow::Continue
        });
        outcome.unwrap();
        ends
    };
    assert_eq!(ends(Order::Given), [0, 1, 2, 3, 4]);
    assert_eq!(ends(Order::LongestOutputFirst), [1, 3, 4, 0, 2]);
}
