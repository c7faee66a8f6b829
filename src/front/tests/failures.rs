//! Engines that fail, panic or are closed, and requests that are refused.

use std::panic::{AssertUnwindSafe, catch_unwind};

use minisgl_core::request::SubmitError;

use super::*;

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
    post(&front, 0, false, |_| panic!("a bug between two steps"));
    assert!(matches!(answer.recv_timeout(Duration::from_secs(60)), Ok(Err(Error::Failed))));
    assert!(unread.into_iter().all(|stream| stream.last().is_some_and(|end| end.is_ok())));
}

#[test]
fn whoever_waits_behind_ends_that_nobody_takes_is_told_when_the_engine_is_closed() {
    let (front, _) = front(Control::default());
    let handle = front.handle().clone();
    let unread: Vec<_> = (0..8).map(|i| handle.submit(request(i, 1)).unwrap()).collect();
    while handle.open_requests() > 0 {
        thread::yield_now();
    }
    let (reply, answer) = channel();
    let waiting = handle.clone();
    thread::spawn(move || reply.send(waiting.submit(request(9, 1)).map(drop)));
    drop(front);
    assert!(matches!(answer.recv_timeout(Duration::from_secs(60)), Ok(Err(Error::Closed))));
    assert!(matches!(handle.try_submit(request(9, 1)), Err(TrySubmitError::Stopped(Error::Closed))));
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
    let (sound, _) = front(slow());
    let (mut submitter, events) = sound.handle().session(options);
    submitter.submit(0, request(0, 90_000)).unwrap();
    let waiting = thread::spawn(move || submitter.submit(1, request(0, 1)));
    drop(events);
    assert!(matches!(waiting.join().unwrap(), Err(Error::Unread)));

    let (failing, _) = front(Control { fails_at: Some(50), ..slow() });
    let (mut submitter, _events) = failing.handle().session(options);
    submitter.submit(0, request(0, 90_000)).unwrap();
    assert!(matches!(submitter.submit(1, request(0, 1)), Err(Error::Failed)));
}

#[test]
fn closing_tells_every_reader_and_later_callers() {
    let (front, _) = front(slow());
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
fn a_call_that_needs_an_idle_engine_waits_for_what_runs_and_goes_before_what_waits() {
    let (front, control) = front(slow());
    let (mut submitter, mut events) = front.handle().session(SessionOptions::default());
    submitter.submit_all((0..8).map(|i| (i, request(i as u32, if i < 4 { 90_000 } else { 4 })))).unwrap();
    while control.running.load(Ordering::Relaxed) < 4 {
        thread::yield_now();
    }
    let (reply, answer) = channel();
    post(&front, 0, true, move |runner| {
        assert!(runner.is_idle());
        reply.send(control.admitted.lock().unwrap().len()).unwrap();
    });
    assert!((0..4).all(|tag| events.abort(tag)));
    assert_eq!(answer.recv().unwrap(), 4);
    drop(submitter);
    assert_eq!(ends(events).len(), 8);
}

#[test]
fn a_call_that_needs_an_idle_engine_is_answered_by_one_that_has_failed() {
    let (front, _) = front(Control { fails_at: Some(20), ..slow() });
    let stream = front.handle().submit(request(0, 90_000)).unwrap();
    let (reply, answer) = channel();
    post(&front, 0, true, move |_| reply.send(()).unwrap());
    assert_eq!(answer.recv_timeout(Duration::from_secs(60)), Ok(()));
    drop(stream);
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
