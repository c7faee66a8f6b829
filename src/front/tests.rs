//! The front's promises, over a simulated engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use minisgl_core::request::SubmitError;

use super::message::{Call, Message};
use super::*;
use crate::request::{Completion, FinishReason, GenerateRequest, Prompt, RequestError, SamplingParams};
use crate::simulated::{Control, request, start as front, start_with};

fn drawn(first: u32, count: u32) -> Vec<u32> {
    (first..first + count).collect()
}

/// Tags and completions of a session, in order, until it is over.
fn ends(events: Events) -> Vec<(u64, Completion)> {
    let finished = |event| match event {
        Ok(SessionEvent::Finished { tag, completion, .. }) => Some((tag, *completion)),
        Ok(_) => None,
        Err(error) => panic!("{error}"),
    };
    events.filter_map(finished).collect()
}

#[test]
fn a_request_of_its_own_streams_its_tokens_in_order_and_then_its_end() {
    let (front, _) = front(Control::default());
    let mut tokens = Vec::new();
    let mut end = None;
    for event in front.handle().submit(request(100, 9)).unwrap() {
        assert!(end.is_none(), "an event behind the end");
        match event.unwrap() {
            RequestEvent::Token { token, .. } => tokens.push(token),
            RequestEvent::Finished { completion, .. } => end = Some(completion),
        }
    }
    let end = end.unwrap();
    assert_eq!((tokens, end.finish_reason), (drawn(100, 9), FinishReason::Length));
    assert_eq!((end.token_ids, end.prompt_tokens, end.cached_tokens), (drawn(100, 9), 1, 7));
}

#[test]
fn requests_submitted_together_are_in_the_first_step_together() {
    let (front, control) = front(Control::default());
    let (mut submitter, mut events) =
        front.handle().session(SessionOptions { steps: true, ..SessionOptions::default() });
    submitter.submit_all((0..4).map(|i| (i, request(i as u32, 3)))).unwrap();
    drop(submitter);
    let steps = events.by_ref().filter_map(|event| match event.unwrap() {
        SessionEvent::Step(step) => Some(step),
        _ => None,
    });
    let steps: Vec<_> = steps.collect();
    let told: Vec<_> = steps.iter().map(|step| (step.shape.rows(), step.output_tokens)).collect();
    assert_eq!(told, [(4, 4); 3], "every step, the last one included");
    assert!(steps.windows(2).all(|two| two[0].host_start + two[0].host_time <= two[1].host_start));
    assert_eq!(control.steps.load(Ordering::Relaxed), 3);
}

#[test]
fn a_session_hears_of_no_step_in_which_it_has_no_request() {
    let (front, _) = front(Control::default());
    let (mut submitter, mut events) =
        front.handle().session(SessionOptions { steps: true, ..SessionOptions::default() });
    let mut steps_until_an_end = || {
        let steps = events.by_ref().take_while(|event| !matches!(event, Ok(SessionEvent::Finished { .. })));
        steps.filter(|event| matches!(event, Ok(SessionEvent::Step(_)))).count()
    };
    submitter.submit(0, request(0, 3)).unwrap();
    assert_eq!(steps_until_an_end(), 3);
    assert!(front.handle().submit(request(100, 5)).unwrap().last().unwrap().is_ok());
    submitter.submit(1, request(0, 1)).unwrap();
    assert_eq!(steps_until_an_end(), 1);
}

#[test]
fn nothing_is_taken_of_a_session_that_nobody_reads() {
    let (front, control) = front(Control::default());
    let (mut submitter, events) = front.handle().session(SessionOptions::default());
    drop(events);
    assert!(submitter.room() > 0);
    assert!(matches!(submitter.submit(0, request(0, 1)), Err(Error::Unread)));
    assert_eq!(control.admitted.lock().unwrap().len(), 0);
}

#[test]
fn a_request_that_comes_while_a_step_is_in_flight_is_in_the_next_one() {
    let launch_after = Duration::from_secs(2);
    let (front, control) = front(Control { launch_after, ..Control::default() });
    let mut first = front.handle().submit(request(100, 2)).unwrap();
    assert!(matches!(first.next(), Some(Ok(RequestEvent::Token { token: 100, .. }))));
    let second = front.handle().submit(request(200, 1)).unwrap();
    assert!(second.last().unwrap().is_ok() && first.last().unwrap().is_ok());
    assert_eq!(control.steps.load(Ordering::Relaxed), 2);
}

#[test]
fn whoever_asks_is_answered_before_a_step_that_is_launched_late_and_closing_does_not_wait_for_it() {
    let launch_after = Duration::from_secs(3600);
    let (front, _) = front(Control { launch_after, ..Control::default() });
    let mut stream = front.handle().submit(request(100, 2)).unwrap();
    assert!(stream.next().is_some());
    assert_eq!(front.handle().stats().unwrap().decode_steps, 1);
    drop(front);
    assert!(matches!(stream.last(), Some(Err(Error::Closed))));
}

#[test]
fn a_session_takes_no_more_than_its_capacity_and_others_go_on() {
    let (front, control) = front(Control::default());
    let handle = front.handle();
    let (mut slow, unread) =
        handle.session(SessionOptions { capacity: Some(2), ..SessionOptions::default() });
    assert_eq!(slow.room(), 2);
    slow.submit_all([(1, request(1, 2)), (2, request(2, 2))]).unwrap();
    assert_eq!(slow.room(), 0);
    // It is full for as long as nobody reads, although its requests have ended.
    for i in 0..20 {
        let mut last = handle.submit(request(100 + i, 2)).unwrap();
        assert!(matches!(last.nth(2), Some(Ok(RequestEvent::Finished { .. }))));
    }
    assert_eq!(slow.room(), 0);
    let blocked = thread::spawn(move || slow.submit(3, request(3, 2)));
    let finished: Vec<u64> = ends(unread).into_iter().map(|(tag, _)| tag).collect();
    blocked.join().unwrap().unwrap();
    assert_eq!(finished, [1, 2, 3]);
    assert_eq!(control.admitted.lock().unwrap().len(), 23);
}

#[test]
fn a_full_engine_gives_a_request_back_that_does_not_wait() {
    let (front, _) = front(Control::default());
    let handle = front.handle();
    let mut streams: Vec<_> = (0..8).map(|i| handle.try_submit(request(i, 2)).unwrap()).collect();
    let Err(TrySubmitError::Full(back)) = handle.try_submit(request(55, 2)) else { panic!("it is full") };
    assert_eq!(*back, request(55, 2));
    assert!(matches!(streams[0].nth(2), Some(Ok(RequestEvent::Finished { .. }))));
    assert!(handle.try_submit(*back).is_ok(), "an end was taken");
}

#[test]
fn samples_of_a_request_share_its_permit_and_each_has_an_end() {
    let (front, control) = front(Control::default());
    let options = SessionOptions { capacity: Some(1), starts: true, ..SessionOptions::default() };
    let (mut submitter, events) = front.handle().session(options);
    submitter.submit(5, request(100, 3).samples(4)).unwrap();
    assert_eq!(submitter.room(), 0);
    // More than the engine has places for, none at all, and more than anybody could count.
    let waiting = thread::spawn(move || {
        submitter.submit(6, request(200, 3).samples(9)).unwrap();
        submitter.submit(7, request(300, 3).samples(0)).unwrap();
        submitter.submit(8, request(400, 3).samples(u32::MAX)).unwrap();
        submitter.submit(9, request(500, 1)).unwrap();
    });
    let ended: Vec<_> = ends(events)
        .into_iter()
        .map(|(tag, end)| (tag, end.sample, end.token_ids.len(), end.error))
        .collect();
    waiting.join().unwrap();
    let whole = |sample| (5, sample, 3, None);
    assert_eq!(ended[..4], [whole(0), whole(1), whole(2), whole(3)]);
    let too_many = SubmitError::TooManySamples { samples: 9, limit: 4 };
    let refused = |sample| (6, sample, 0, Some(too_many.into()));
    assert_eq!(ended[4..13], (0..9).map(refused).collect::<Vec<_>>());
    let odd = |tag, samples| (tag, 0, 0, Some(RequestError::Samples { samples }));
    assert_eq!(ended[13..], [odd(7, 0), odd(8, u32::MAX), (9, 0, 1, None)]);
    assert_eq!(*control.admitted.lock().unwrap(), [100, 100, 100, 100, 500]);
    assert_eq!(control.steps.load(Ordering::Relaxed), 3 + 1, "samples run in the same steps");
}

#[test]
fn samples_are_aborted_together_wherever_they_are() {
    let (front, _) = front(Control::default());
    let (mut submitter, mut events) = front.handle().session(SessionOptions::default());
    // The second group finds no place beside the first.
    submitter.submit_all((0..2).map(|tag| (tag, request(10, 90_000).samples(3)))).unwrap();
    submitter.submit(2, request(20, 3)).unwrap();
    drop(submitter);
    assert!(events.abort(1) && events.abort(0));
    let mut ended: Vec<_> =
        ends(events).into_iter().map(|(tag, end)| (tag, end.sample, end.finish_reason)).collect();
    ended.sort_unstable();
    let of_group = |tag| (0..3).map(move |sample| (tag, sample, FinishReason::Abort));
    let expected: Vec<_> = of_group(0).chain(of_group(1)).chain([(2, 0, FinishReason::Length)]).collect();
    assert_eq!(ended, expected);
}

#[test]
fn sessions_take_turns() {
    let (front, control) = front(Control { step_time: Duration::from_micros(100), ..Control::default() });
    let options = SessionOptions { capacity: Some(1000), ..SessionOptions::default() };
    let (mut bulk, mut bulk_events) = front.handle().session(options);
    // The first four run until they are aborted, and so long the others wait.
    bulk.submit_all((0..400).map(|i| (i, request(i as u32, if i < 4 { 90_000 } else { 4 })))).unwrap();
    while control.running.load(Ordering::Relaxed) < 4 {
        thread::yield_now();
    }
    let one = front.handle().submit(request(9999, 1)).unwrap();
    assert!((0..4).all(|tag| bulk_events.abort(tag)));
    assert!(one.last().unwrap().is_ok());
    let before = control.admitted.lock().unwrap().iter().position(|first| *first == 9999).unwrap();
    assert!(before <= 4 + 1, "it came after {before} of a session that was there before");
    drop(bulk);
    assert_eq!(ends(bulk_events).len(), 400);
}

#[test]
fn a_dropped_stream_gives_its_place_back() {
    let (front, control) = front(Control::default());
    let mut stream = front.handle().submit(request(0, 99_999)).unwrap();
    assert!(stream.next().is_some());
    drop(stream);
    while control.running.load(Ordering::Relaxed) > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(matches!(
        front.handle().submit(request(1, 1)).unwrap().nth(1),
        Some(Ok(RequestEvent::Finished { .. }))
    ));
}

#[test]
fn an_abort_ends_what_runs_and_what_waits_and_nothing_else() {
    let control = Control { step_time: Duration::from_millis(1), ..Control::default() };
    let (front, control) = front(control);
    let (mut submitter, mut events) =
        front.handle().session(SessionOptions { tokens: true, ..Default::default() });
    // Four run and one waits.
    submitter.submit_all((0..5).map(|i| (i, request(i as u32, if i == 3 { 20 } else { 90_000 })))).unwrap();
    while control.running.load(Ordering::Relaxed) < 4 {
        thread::yield_now();
    }
    assert!(!events.abort(77), "there is no such request");
    for tag in [4, 0, 1, 2] {
        assert!(events.abort(tag));
    }
    drop(submitter);
    let mut ends = ends(events);
    ends.sort_by_key(|(tag, _)| *tag);
    let reasons: Vec<_> = ends.iter().map(|(_, completion)| completion.finish_reason).collect();
    let aborted = FinishReason::Abort;
    assert_eq!(reasons, [aborted, aborted, aborted, FinishReason::Length, aborted]);
    assert_eq!(ends[3].1.token_ids, drawn(3, 20));
    assert!(ends[4].1.token_ids.is_empty());
}

#[test]
fn what_waits_need_not_wait_to_be_aborted() {
    let control = Control { step_time: Duration::from_millis(1), ..Control::default() };
    let (front, control) = front(control);
    let (mut submitter, mut events) = front.handle().session(SessionOptions::default());
    submitter.submit_all((0..5).map(|i| (i, request(i as u32, 90_000)))).unwrap();
    while control.running.load(Ordering::Relaxed) < 4 {
        thread::yield_now();
    }
    assert!(events.abort(4));
    match events.next_timeout(Duration::from_secs(60)) {
        Ok(Next::Event(SessionEvent::Finished { tag: 4, completion, .. })) => {
            assert_eq!(completion.finish_reason, FinishReason::Abort);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn whoever_waits_behind_ends_that_nobody_takes_is_told_when_the_engine_fails() {
    let (front, _) = front(Control::default());
    let handle = front.handle();
    let unread: Vec<_> = (0..8).map(|i| handle.submit(request(i, 1)).unwrap()).collect();
    while handle.open_requests() > 0 {
        thread::yield_now();
    }
    let (reply, answer) = channel();
    let waiting = handle.clone();
    thread::spawn(move || reply.send(waiting.submit(request(9, 1)).map(drop)));
    let work = Box::new(|_: &mut dyn Runner| panic!("a bug between two steps"));
    handle.shared().send(0, Message::Call(Call { when_idle: false, work }));
    assert!(matches!(answer.recv_timeout(Duration::from_secs(60)), Ok(Err(Error::Failed))));
    assert!(unread.into_iter().all(|stream| stream.last().is_some_and(|end| end.is_ok())));
}

#[test]
fn a_failed_step_is_an_error_for_every_open_request_after_all_that_had_ended() {
    let (front, _) = front(Control { fails_at: Some(3), ..Control::default() });
    let handle = front.handle();
    let (mut submitter, mut events) = handle.session(SessionOptions::default());
    let lengths = [2, 9, 3, 9, 9, 9];
    submitter.submit_all((0..).zip(lengths.map(|len| request(0, len)))).unwrap();
    let mut finished = Vec::new();
    let error = loop {
        match events.next().unwrap() {
            Ok(SessionEvent::Finished { tag, .. }) => finished.push(tag),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(finished, [0, 2]);
    assert!(matches!(&error, Error::Step { cause, .. } if cause.to_string() == "the kernel `down` failed"));
    assert!(events.next().is_none());
    assert!(matches!(submitter.submit(9, request(0, 1)), Err(Error::Failed)));
    assert!(matches!(handle.submit(request(0, 1)), Err(Error::Failed)));
    assert!(matches!(handle.try_submit(request(0, 1)), Err(TrySubmitError::Stopped(Error::Failed))));
    assert_eq!(handle.call(false, |runner| runner.stats()).unwrap().decode_steps, 4, "it still answers");
}

#[test]
fn a_panic_of_the_engine_is_an_error_that_says_so() {
    let (front, _) = front(Control { panics_at: Some(2), ..Control::default() });
    let mut stream = front.handle().submit(request(0, 9)).unwrap();
    let error = stream.find_map(Result::err).unwrap();
    assert!(error.to_string().contains("the engine panicked: a bug in step 2"), "{error}");
    assert!(stream.next().is_none());
    assert!(matches!(front.handle().submit(request(0, 1)), Err(Error::Failed)));
}

#[test]
fn a_submitter_that_waits_is_told_when_the_engine_fails_and_when_the_reader_goes() {
    let options = SessionOptions { capacity: Some(1), ..SessionOptions::default() };
    let (sound, _) = front(Control { step_time: Duration::from_millis(1), ..Control::default() });
    let (mut submitter, events) = sound.handle().session(options);
    submitter.submit(0, request(0, 90_000)).unwrap();
    let waiting = thread::spawn(move || submitter.submit(1, request(0, 1)));
    drop(events);
    assert!(matches!(waiting.join().unwrap(), Err(Error::Unread)));

    let control = Control { step_time: Duration::from_millis(1), fails_at: Some(50), ..Control::default() };
    let (failing, _) = front(control);
    let (mut submitter, _events) = failing.handle().session(options);
    submitter.submit(0, request(0, 90_000)).unwrap();
    assert!(matches!(submitter.submit(1, request(0, 1)), Err(Error::Failed)));
}

#[test]
fn closing_tells_every_reader_and_later_callers() {
    let control = Control { step_time: Duration::from_millis(1), ..Control::default() };
    let (front, _) = front(control);
    let handle = front.handle().clone();
    let (mut submitter, mut events) = handle.session(SessionOptions::default());
    submitter.submit_all((0..6).map(|i| (i, request(0, 90_000)))).unwrap();
    let reader = thread::spawn(move || events.next());
    drop(front);
    assert!(matches!(reader.join().unwrap(), Some(Err(Error::Closed))));
    assert!(matches!(handle.submit(request(0, 1)), Err(Error::Closed)));
    assert!(matches!(submitter.submit(9, request(0, 1)), Err(Error::Closed)));
    assert!(matches!(handle.call(false, |runner| runner.stats()), Err(Error::Closed)));
}

#[test]
fn a_call_that_needs_an_idle_engine_waits_for_what_runs_and_goes_before_what_waits() {
    let (front, control) = front(Control { step_time: Duration::from_micros(100), ..Control::default() });
    let (mut submitter, mut events) = front.handle().session(SessionOptions::default());
    submitter.submit_all((0..8).map(|i| (i, request(i as u32, if i < 4 { 90_000 } else { 4 })))).unwrap();
    while control.running.load(Ordering::Relaxed) < 4 {
        thread::yield_now();
    }
    let (reply, answer) = channel();
    let work = move |runner: &mut dyn Runner| {
        assert!(runner.is_idle());
        reply.send(control.admitted.lock().unwrap().len()).unwrap();
    };
    let call = Call { when_idle: true, work: Box::new(work) };
    front.handle().shared().send(0, Message::Call(call));
    assert!((0..4).all(|tag| events.abort(tag)));
    assert_eq!(answer.recv().unwrap(), 4);
    drop(submitter);
    assert_eq!(ends(events).len(), 8);
}

#[test]
fn a_panic_in_a_call_is_its_callers_and_the_engine_goes_on() {
    let (front, _) = front(Control { panics_at: Some(1_000_000), ..Control::default() });
    let call = catch_unwind(AssertUnwindSafe(|| front.handle().call(false, |runner| runner.check())));
    assert!(call.is_err());
    assert!(matches!(
        front.handle().submit(request(1, 1)).unwrap().nth(1),
        Some(Ok(RequestEvent::Finished { .. }))
    ));
}

#[test]
fn a_refused_request_ends_with_the_reason_and_its_prompts_length() {
    let (front, _) = front(Control::default());
    let (mut submitter, events) = front.handle().session(SessionOptions::default());
    let bad =
        GenerateRequest::tokens([1, 2]).sampling(SamplingParams { top_p: 7.0, ..SamplingParams::default() });
    submitter
        .submit_all([(0, GenerateRequest::tokens([])), (1, bad), (2, GenerateRequest::text("a"))])
        .unwrap();
    drop(submitter);
    let mut ends = ends(events);
    ends.sort_by_key(|(tag, _)| *tag);
    assert!(ends.iter().all(|(_, completion)| completion.finish_reason == FinishReason::Rejected));
    assert_eq!(ends[0].1.error, Some(SubmitError::EmptyPrompt.into()));
    assert_eq!(ends[1].1.prompt_tokens, 2);
    assert!(ends[1].1.error.as_ref().unwrap().to_string().starts_with("top_p is 7"));
    assert_eq!(ends[2].1.error, Some(RequestError::NoTokenizer { what: "a text prompt" }));
}

fn text() -> Text {
    Text::open(Path::new("tests/fixtures/text")).unwrap()
}

/// A request that draws the tokens of a text, and then others.
fn saying(codec: &Text, said: &str, max_tokens: u32) -> GenerateRequest {
    let mut prompt = vec![5];
    prompt.extend(codec.encode(Prompt::Text(said.to_owned())).unwrap());
    GenerateRequest::tokens(prompt).sampling(SamplingParams { max_tokens, ..SamplingParams::default() })
}

#[test]
fn a_stop_text_ends_the_output_at_the_token_that_completes_it_however_far_the_engine_is() {
    let (codec, said) = (text(), "One day, a fox. Then");
    let until = codec.encode(Prompt::Text("One day, a fox.".to_owned())).unwrap();
    let (front, _) = start_with(Control::default(), Arc::new(text()), Order::Given).unwrap();
    for streams in [false, true] {
        let options =
            SessionOptions { tokens: streams, text: streams, capacity: Some(40), ..Default::default() };
        let (mut submitter, events) = front.handle().session(options);
        let request = |i: u64| (i, saying(&codec, said, 50_000).stop("nothing").stop("fox."));
        submitter.submit_all((0..40).map(request)).unwrap();
        drop(submitter);
        let mut pieces = vec![String::new(); 40];
        let mut tokens = vec![0; 40];
        for event in events {
            match event.unwrap() {
                SessionEvent::Token { tag, text, .. } => {
                    pieces[tag as usize] += &text;
                    tokens[tag as usize] += 1;
                }
                SessionEvent::Finished { tag, text, completion } => {
                    pieces[tag as usize] += &text;
                    assert_eq!(completion.finish_reason, FinishReason::Stop);
                    assert_eq!(completion.token_ids, until);
                    assert_eq!(completion.text.as_deref(), Some("One day, a "));
                    assert_eq!(completion.cached_tokens, 7);
                }
                SessionEvent::Started { .. } | SessionEvent::Step(_) => {}
            }
        }
        let told = if streams { ("One day, a ", until.len()) } else { ("", 0) };
        assert!(pieces.iter().zip(tokens).all(|(text, tokens)| (text.as_str(), tokens) == told));
    }
}

#[test]
fn a_stop_text_that_only_the_end_makes_certain_is_the_reason() {
    let codec = text();
    let crab = codec.encode(Prompt::Text("🦀".to_owned())).unwrap();
    let (front, _) = start_with(Control::default(), Arc::new(text()), Order::Given).unwrap();
    let prompt: Vec<u32> = [5].into_iter().chain(crab[..crab.len() - 1].iter().copied()).collect();
    let tokens = prompt.len() as u32 - 1;
    // Bytes that never become a character are one that says so, and only the end says never.
    let sampling = SamplingParams { max_tokens: tokens, ..SamplingParams::default() };
    let request = GenerateRequest::tokens(prompt).sampling(sampling).stop("\u{FFFD}");
    let Some(Ok(RequestEvent::Finished { completion, .. })) = front.handle().submit(request).unwrap().last()
    else {
        panic!("it ends")
    };
    assert_eq!(completion.finish_reason, FinishReason::Stop);
    assert_eq!((completion.text.as_deref(), completion.token_ids.len() as u32), (Some(""), tokens));
}

#[test]
fn pieces_of_text_make_each_requests_text_among_many() {
    let codec = text();
    let (front, _) = start_with(Control::default(), Arc::new(text()), Order::Given).unwrap();
    let options = SessionOptions { tokens: true, text: true, ..SessionOptions::default() };
    let (mut submitter, events) = front.handle().session(options);
    let texts: Vec<String> = (0..60).map(|i| format!("{i}: Größe 🦀 ist {i}, naïve 🙂🚀 漢字!")).collect();
    let all = texts.clone();
    let feeding = thread::spawn(move || {
        let codec = codec;
        for (tag, said) in (0..).zip(&all) {
            let tokens = codec.encode(Prompt::Text(said.clone())).unwrap().len() as u32;
            submitter.submit(tag, saying(&codec, said, tokens)).unwrap();
        }
    });
    let mut pieces = vec![String::new(); texts.len()];
    for event in events {
        match event.unwrap() {
            SessionEvent::Token { tag, text, .. } => pieces[tag as usize] += &text,
            SessionEvent::Finished { tag, text, completion } => {
                pieces[tag as usize] += &text;
                assert_eq!(completion.text.as_deref(), Some(pieces[tag as usize].as_str()));
            }
            SessionEvent::Started { .. } | SessionEvent::Step(_) => {}
        }
    }
    feeding.join().unwrap();
    assert_eq!(pieces, texts);
}

#[test]
fn an_idle_engine_sleeps() {
    let (front, control) = front(Control::default());
    assert!(front.handle().submit(request(1, 3)).unwrap().last().unwrap().is_ok());
    // A call is answered between two rounds of the thread's loop; after the last round nothing is asked any more.
    front.handle().call(true, |_| ()).unwrap();
    let polls = || control.polls.load(Ordering::Relaxed);
    let mut before = polls();
    loop {
        thread::sleep(Duration::from_millis(30));
        if std::mem::replace(&mut before, polls()) == polls() {
            break;
        }
    }
    thread::sleep(Duration::from_millis(100));
    assert_eq!(polls(), before, "it goes round with nothing to do");
}

/// Deterministic numbers below a bound.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

/// A client that submits, aborts, reads slowly and goes away as numbers say. What it hears must be what it asked for,
/// each request ending once. Gives whether the engine failed it.
fn random_client(handle: &EngineHandle, mut numbers: Numbers) -> bool {
    let options = SessionOptions {
        tokens: numbers.one_in(2),
        steps: numbers.one_in(2),
        starts: numbers.one_in(2),
        capacity: Some(1 + numbers.below(12) as usize),
        ..SessionOptions::default()
    };
    let (mut submitter, mut events) = handle.session(options);
    let (count, leaves) = (numbers.below(40), numbers.one_in(4));
    let lengths: Vec<u32> = (0..count).map(|_| 1 + numbers.below(30) as u32).collect();
    let asked = lengths.clone();
    let mut pauses = Numbers(numbers.below(1 << 30));
    let submitting = thread::spawn(move || {
        for (tag, length) in (0..).zip(asked) {
            if pauses.one_in(10) {
                thread::sleep(Duration::from_micros(300));
            }
            // One in nine can't run.
            let request =
                if tag % 9 == 8 { GenerateRequest::tokens([]) } else { request(tag as u32 * 1000, length) };
            if submitter.submit(tag, request).is_err() {
                return false;
            }
        }
        true
    });
    let mut tokens: Vec<Vec<u32>> = vec![Vec::new(); count as usize];
    let mut ends = vec![0; count as usize];
    let mut started = vec![false; count as usize];
    let mut failed = false;
    while let Some(event) = events.next() {
        if numbers.one_in(50) {
            thread::sleep(Duration::from_micros(200));
        }
        if numbers.one_in(20) && count > 0 {
            events.abort(numbers.below(count));
        }
        match event {
            Ok(SessionEvent::Token { tag, token, .. }) => {
                assert_eq!(started[tag as usize], options.starts, "a token comes behind the start");
                tokens[tag as usize].push(token);
            }
            Ok(SessionEvent::Finished { tag, completion, .. }) => {
                let (i, length) = (tag as usize, lengths[tag as usize]);
                ends[i] += 1;
                let drawn = drawn(tag as u32 * 1000, completion.token_ids.len() as u32);
                assert_eq!(completion.token_ids, drawn);
                assert!(!options.tokens || completion.token_ids == tokens[i]);
                match completion.finish_reason {
                    FinishReason::Length => assert_eq!(drawn.len() as u32, length),
                    FinishReason::Abort => assert!(drawn.len() as u32 <= length),
                    FinishReason::Rejected => assert_eq!(tag % 9, 8),
                    other => panic!("{other:?}"),
                }
            }
            Ok(SessionEvent::Started { tag, .. }) => {
                assert!(options.starts && !started[tag as usize] && ends[tag as usize] == 0);
                started[tag as usize] = true;
            }
            Ok(SessionEvent::Step(_)) => assert!(options.steps),
            Err(Error::Step { .. }) => {
                assert!(!failed);
                failed = true;
            }
            Err(error) => panic!("{error}"),
        }
        if leaves && numbers.one_in(30) {
            break;
        }
    }
    let over = events.next().is_none();
    drop(events);
    let submitted_all = submitting.join().unwrap();
    assert!(ends.iter().all(|ends| *ends <= 1), "{ends:?}");
    if over && submitted_all && !failed {
        assert!(ends.iter().all(|ends| *ends == 1), "a request without an end: {ends:?}");
    }
    failed
}

#[test]
fn random_clients_get_every_end_once_and_leave_nothing_behind() {
    for seed in 0..60 {
        let mut numbers = Numbers(seed);
        let order = if numbers.one_in(2) { Order::Given } else { Order::LongestOutputFirst };
        let fails_at = numbers.one_in(3).then(|| numbers.below(60));
        let (front, control) =
            start_with(Control { fails_at, ..Control::default() }, Arc::default(), order).unwrap();
        thread::scope(|scope| {
            for client in 0..4 {
                let handle = front.handle().clone();
                scope.spawn(move || {
                    for session in 0..3 {
                        let failed = random_client(&handle, Numbers(seed * 100 + client * 10 + session));
                        assert!(!failed || fails_at.is_some());
                    }
                });
            }
        });
        if front.handle().check_running().is_err() {
            continue;
        }
        // What was left behind by a reader that went is aborted: nothing runs, and all places are free.
        assert!(front.handle().call(true, |runner| runner.is_idle()).unwrap());
        assert_eq!(control.running.load(Ordering::Relaxed), 0);
        let streams: Vec<_> = (0..8).map(|i| front.handle().try_submit(request(i, 2)).unwrap()).collect();
        assert!(streams.into_iter().all(|stream| stream.last().is_some_and(|end| end.is_ok())));
    }
}

/// A task that counts how often it was woken.
struct Task(std::sync::atomic::AtomicU64);

impl std::task::Wake for Task {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn a_task_that_reads_is_woken_for_every_event_and_for_the_end() {
    use std::task::{Context, Poll};

    let (front, _) = front(Control { step_time: Duration::from_millis(1), ..Control::default() });
    let (mut submitter, mut events) =
        front.handle().session(SessionOptions { tokens: true, ..SessionOptions::default() });
    submitter.submit_all([(0, request(7, 20)), (1, request(70, 5))]).unwrap();
    drop(submitter);
    let task = Arc::new(Task(std::sync::atomic::AtomicU64::new(1)));
    let waker = task.clone().into();
    let (mut tokens, mut ended) = (Vec::new(), Vec::new());
    loop {
        match events.poll_next(&mut Context::from_waker(&waker)) {
            Poll::Ready(Some(Ok(SessionEvent::Token { tag: 0, token, .. }))) => tokens.push(token),
            Poll::Ready(Some(Ok(SessionEvent::Finished { tag, .. }))) => ended.push(tag),
            Poll::Ready(Some(event)) => drop(event.unwrap()),
            Poll::Ready(None) => break,
            Poll::Pending => {
                let before = task.0.swap(0, Ordering::SeqCst);
                assert!(before > 0, "nobody asked for this poll");
                while task.0.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
            }
        }
    }
    assert_eq!((tokens, ended), (drawn(7, 20), vec![1, 0]));
    assert_eq!(front.handle().open_requests(), 0);
}

#[test]
fn a_request_is_open_until_its_end_whether_anybody_reads_it_or_not() {
    let (front, control) = front(Control::default());
    let handle = front.handle();
    let before_steps = control.held.lock().unwrap();
    let unread = handle.submit(request(0, 3)).unwrap();
    let waits = handle.submit(request(0, 99_000)).unwrap();
    assert_eq!(handle.open_requests(), 2);
    drop(before_steps);
    while handle.open_requests() > 1 {
        thread::sleep(Duration::from_millis(1));
    }
    drop(waits);
    while handle.open_requests() > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(control.steps.load(Ordering::Relaxed) >= 3);
    assert!(matches!(unread.last(), Some(Ok(RequestEvent::Finished { .. }))));
}
