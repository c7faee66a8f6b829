//! Requests that are given up.

use super::*;

#[test]
fn samples_are_aborted_together_wherever_they_are() {
    let (front, _) = front(slow());
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
fn an_abort_ends_what_runs_and_what_waits_and_nothing_else() {
    let (front, control) = front(Control::default());
    let (mut submitter, mut events) =
        front.handle().session(SessionOptions { tokens: true, ..Default::default() });
    let before_steps = control.held.lock().unwrap();
    // Four run and one waits.
    submitter.submit_all((0..5).map(|i| (i, request(i as u32, if i == 3 { 20 } else { 90_000 })))).unwrap();
    while control.running.load(Ordering::Relaxed) < 4 {
        thread::yield_now();
    }
    assert!(!events.abort(77), "there is no such request");
    for tag in [4, 0, 1, 2] {
        assert!(events.abort(tag));
    }
    drop((submitter, before_steps));
    let mut ends = ends(events);
    ends.sort_by_key(|(tag, _)| *tag);
    let reasons: Vec<_> = ends.iter().map(|(_, completion)| completion.finish_reason).collect();
    let aborted = FinishReason::Abort;
    assert_eq!(reasons, [aborted, aborted, aborted, FinishReason::Length, aborted]);
    assert_eq!(ends[3].1.token_ids, drawn(3, 20));
    assert!(ends[4].1.token_ids.is_empty());
}

#[test]
fn an_abort_is_of_its_own_session_alone_whatever_tags_others_have() {
    let (front, control) = front(slow());
    let [(mut one, mut events), (mut other, mut others)] =
        [(); 2].map(|()| front.handle().session(SessionOptions::default()));
    for (submitter, first) in [(&mut one, 1), (&mut other, 2)] {
        submitter.submit(7, request(first, 90_000)).unwrap();
    }
    while control.running.load(Ordering::Relaxed) < 2 {
        thread::yield_now();
    }
    assert!(events.abort(7));
    assert!(matches!(events.next(), Some(Ok(SessionEvent::Finished { tag: 7, .. }))));
    assert_eq!(control.running.load(Ordering::Relaxed), 1);
    assert!(others.abort(7));
}

#[test]
fn what_waits_need_not_wait_to_be_aborted() {
    let (front, control) = front(slow());
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
