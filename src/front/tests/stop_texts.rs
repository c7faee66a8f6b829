//! Outputs that a text ends.

use super::*;

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
