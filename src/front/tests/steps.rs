//! Which requests are in a step, and who is told of it.

use super::*;

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
fn a_request_that_comes_while_a_step_is_in_flight_is_in_the_next_one() {
    let launch_after = Duration::from_secs(2);
    // Of a request that comes when the next step has begun nothing is to be learned: then another one is tried.
    let steps = (0..10).find_map(|_| {
        let (front, control) = front(Control { launch_after, ..Control::default() });
        let steps = || control.steps.load(Ordering::Relaxed);
        let mut first = front.handle().submit(request(100, 2)).unwrap();
        assert!(matches!(first.next(), Some(Ok(RequestEvent::Token { token: 100, .. }))));
        let second = front.handle().submit(request(200, 1)).unwrap();
        let is_in_time = steps() == 1;
        assert!(second.last().unwrap().is_ok() && first.last().unwrap().is_ok());
        is_in_time.then(steps)
    });
    assert_eq!(steps, Some(2));
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
fn an_idle_engine_sleeps() {
    let (front, control) = front(Control::default());
    assert!(front.handle().submit(request(1, 3)).unwrap().last().unwrap().is_ok());
    // A call is answered between two rounds of the thread's loop; after the last round nothing is asked any more.
    front.handle().call(true, |_| ()).unwrap();
    let polls = || control.polls.load(Ordering::Relaxed);
    let before = polls();
    thread::sleep(Duration::from_millis(100));
    let rounds = polls() - before;
    assert!(rounds < 10, "it goes round with nothing to do, {rounds} times");
}
