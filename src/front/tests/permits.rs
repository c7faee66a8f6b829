//! How many requests are open, and whose turn it is.

use minisgl_core::request::SubmitError;

use super::*;

#[test]
fn a_session_takes_no_more_than_its_capacity_and_others_go_on() {
    let (front, control) = front(Control::default());
    let handle = front.handle();
    let (mut slow, unread) =
        handle.session(SessionOptions { capacity: Some(2), ..SessionOptions::default() });
    assert_eq!(slow.room(), 2);
    assert_eq!(handle.session(SessionOptions { capacity: Some(0), ..Default::default() }).0.room(), 1);
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
fn of_requests_submitted_together_those_beyond_the_capacity_follow_as_ends_are_taken() {
    let (front, _) = front(Control::default());
    let options = SessionOptions { capacity: Some(2), ..SessionOptions::default() };
    let (mut submitter, mut events) = front.handle().session(options);
    let all = thread::spawn(move || submitter.submit_all((0..7).map(|i| (i, request(i as u32, 2)))));
    let mut ended = Vec::new();
    while let Ok(Next::Event(event)) = events.next_timeout(Duration::from_secs(60)) {
        if let SessionEvent::Finished { tag, .. } = event {
            ended.push(tag);
        }
    }
    assert_eq!(ended, [0, 1, 2, 3, 4, 5, 6]);
    all.join().unwrap().unwrap();
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
fn sessions_take_turns() {
    let (front, control) = front(slow());
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
