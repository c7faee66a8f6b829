//! What a reader hears: tokens in order, then the end.

use super::*;

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
fn nothing_is_taken_of_a_session_that_nobody_reads() {
    let (front, control) = front(Control::default());
    let (mut submitter, events) = front.handle().session(SessionOptions::default());
    drop(events);
    assert!(submitter.room() > 0);
    assert!(matches!(submitter.submit(0, request(0, 1)), Err(Error::Unread)));
    assert_eq!(control.admitted.lock().unwrap().len(), 0);
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

    let (front, _) = front(slow());
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
fn whoever_has_taken_the_end_of_a_request_finds_it_open_no_more() {
    use std::task::{Context, Poll, Waker};

    let (front, _) = front(Control::default());
    let handle = front.handle();
    for _ in 0..50 {
        let (mut submitter, mut events) = handle.session(SessionOptions::default());
        // So many that the thread which ends the request has work left to let go of it.
        let mut asked = request(3, 1);
        asked.rules.stop_token_ids = vec![7; 1 << 20];
        submitter.submit(0, asked).unwrap();
        // A reader that was asleep is woken a little later: this one looks again and again.
        let end = loop {
            match events.poll_next(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => thread::yield_now(),
                Poll::Ready(end) => break end,
            }
        };
        assert!(matches!(end, Some(Ok(SessionEvent::Finished { .. }))));
        assert_eq!(handle.open_requests(), 0);
    }
}

/// A task that looks how many requests are open when it is woken.
struct Looker(EngineHandle, std::sync::Mutex<Vec<usize>>);

impl std::task::Wake for Looker {
    fn wake(self: Arc<Self>) {
        self.1.lock().unwrap().push(self.0.open_requests());
    }
}

#[test]
fn whoever_is_told_that_a_request_got_lost_finds_it_open_no_more() {
    use std::task::{Context, Poll};

    let (front, control) = front(Control { fails_at: Some(0), ..Control::default() });
    let (mut submitter, mut events) = front.handle().session(SessionOptions::default());
    let before_steps = control.held.lock().unwrap();
    submitter.submit(0, request(3, 1)).unwrap();
    let looker = Arc::new(Looker(front.handle().clone(), Default::default()));
    assert!(events.poll_next(&mut Context::from_waker(&looker.clone().into())).is_pending());
    drop(before_steps);
    while looker.1.lock().unwrap().is_empty() {
        thread::yield_now();
    }
    let told = events.poll_next(&mut Context::from_waker(std::task::Waker::noop()));
    assert!(matches!(told, Poll::Ready(Some(Err(Error::Step { .. })))));
    assert_eq!(*looker.1.lock().unwrap(), [0]);
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
