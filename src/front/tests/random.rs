//! Clients that do as numbers say.

use super::*;

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
        // What was left behind by a reader that went is aborted: nothing runs, and all places are free. The engine may fail until
        // then, for it draws what that reader left until it hears of it.
        let is_idle = front.handle().call(true, |runner| runner.is_idle()).unwrap();
        if front.handle().check_running().is_err() {
            continue;
        }
        assert!(is_idle);
        assert_eq!(control.running.load(Ordering::Relaxed), 0);
        if fails_at.is_some() {
            continue; // It may do so yet.
        }
        let streams: Vec<_> = (0..8).map(|i| front.handle().try_submit(request(i, 2)).unwrap()).collect();
        assert!(streams.into_iter().all(|stream| stream.last().is_some_and(|end| end.is_ok())));
    }
}
