//! The front's promises, over a simulated engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use minisgl_core::request::SubmitError;

use super::simulated::{Control, request, start as front};
use super::*;
use crate::request::{Completion, FinishReason, GenerateRequest, RequestError, SamplingParams};

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
        SessionEvent::Step(step) => Some(step.rows),
        _ => None,
    });
    assert_eq!(steps.collect::<Vec<_>>(), [4, 4, 4], "every step, the last one included");
    assert_eq!(control.steps.load(Ordering::Relaxed), 3);
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
fn sessions_take_turns() {
    let control = Control { step_time: Duration::from_millis(1), ..Control::default() };
    let (front, control) = front(control);
    let (mut bulk, bulk_events) =
        front.handle().session(SessionOptions { capacity: Some(1000), ..SessionOptions::default() });
    bulk.submit_all((0..400).map(|i| (i, request(i as u32, 4)))).unwrap();
    while control.running.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    let mut one = front.handle().submit(request(9999, 1)).unwrap();
    assert!(matches!(one.nth(1), Some(Ok(RequestEvent::Finished { .. }))));
    let before = control.admitted.lock().unwrap().iter().position(|first| *first == 9999).unwrap();
    assert!(before < 300, "it came after {before} of a session that was there before");
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
    let control = Control { step_time: Duration::from_millis(5), fails_at: Some(20), ..Control::default() };
    let (front, _) = front(control);
    let options = SessionOptions { capacity: Some(1), ..SessionOptions::default() };
    let (mut submitter, events) = front.handle().session(options);
    submitter.submit(0, request(0, 90_000)).unwrap();
    let waiting = thread::spawn(move || submitter.submit(1, request(0, 1)));
    drop(events);
    assert!(matches!(waiting.join().unwrap(), Err(Error::Unread)));

    let (mut submitter, _events) = front.handle().session(options);
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
    let (front, control) = front(Control { step_time: Duration::from_micros(200), ..Control::default() });
    let (mut submitter, events) = front.handle().session(SessionOptions::default());
    submitter.submit_all((0..8).map(|i| (i, request(i as u32, 50)))).unwrap();
    while control.running.load(Ordering::Relaxed) == 0 {
        thread::yield_now();
    }
    let admitted = control.clone();
    let before = front.handle().call(true, move |runner| {
        assert!(runner.is_idle());
        admitted.admitted.lock().unwrap().len()
    });
    assert_eq!(before.unwrap(), 4);
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
