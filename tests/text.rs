//! Text in and out: tokenizer, chat template, stop texts.

mod common;

use common::{Scratch, builder, greedy, small};
use minisgl::{
    ChatPrompt, Error, FinishReason, Flow, GenerateRequest, Llm, Message, RequestError, StreamEvent,
};

/// A model with a tokenizer; the folder must outlive its opening only.
fn llm() -> Llm {
    small(Scratch::with_text().path()).build().unwrap()
}

fn rejection(llm: &mut Llm, request: GenerateRequest) -> RequestError {
    llm.generate(&[request]).unwrap().remove(0).error.unwrap()
}

#[test]
fn text_without_a_tokenizer_is_rejected_and_tokens_still_run() {
    let mut llm = builder("tiny-tied").build().unwrap();
    let error = rejection(&mut llm, GenerateRequest::text("Once"));
    assert_eq!(error, RequestError::NoTokenizer { what: "a text prompt" });
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    let error = rejection(&mut llm, GenerateRequest::tokens([1]).stop("x"));
    assert_eq!(error, RequestError::NoTokenizer { what: "a stop text" });
    let error = rejection(&mut llm, GenerateRequest::chat([Message::new("user", "Hi")]));
    assert_eq!(error, RequestError::NoChatTemplate);
    let completion = llm.generate(&[GenerateRequest::tokens([1])]).unwrap().remove(0);
    assert_eq!((completion.text, completion.error), (None, None));
}

#[test]
fn a_text_prompt_is_its_tokens() {
    let mut llm = llm();
    let text = "Once upon a time, größer 🙂 日本語";
    let ids = llm.encode(text).unwrap();
    assert_eq!(llm.decode(&ids).unwrap(), text);
    let from_text = GenerateRequest::text(text).sampling(greedy(12));
    let from_ids = GenerateRequest::tokens(ids.clone()).sampling(greedy(12));
    let completions = llm.generate(&[from_text, from_ids]).unwrap();
    assert_eq!(completions[0].token_ids, completions[1].token_ids);
    assert_eq!(completions[0].prompt_tokens as usize, ids.len());
    assert_eq!(completions[0].text, llm.decode(&completions[0].token_ids));
}

#[test]
fn streamed_pieces_make_the_whole_text() {
    let mut llm = llm();
    let requests: Vec<_> =
        (0..30).map(|i| GenerateRequest::tokens([i * 20, 7]).sampling(common::greedy(40))).collect();
    let expected = llm.generate(&requests).unwrap();
    let mut pieces = vec![String::new(); requests.len()];
    llm.generate_stream(requests, |event| {
        match event {
            StreamEvent::Token { index, text, .. } => pieces[index] += text,
            StreamEvent::Finished { index, text, completion } => {
                pieces[index] += text;
                assert_eq!(completion.text.unwrap(), pieces[index]);
            }
            StreamEvent::Step(_) => {}
        }
        Flow::Continue
    })
    .unwrap();
    for (pieces, expected) in pieces.iter().zip(&expected) {
        assert_eq!(pieces, expected.text.as_ref().unwrap());
    }
}

#[test]
fn a_stop_text_ends_the_output_and_is_cut_off() {
    let mut llm = llm();
    let prompt = "A page holds";
    let request = || GenerateRequest::text(prompt).sampling(greedy(40));
    let whole = llm.generate(&[request()]).unwrap().remove(0);
    let text = whole.text.unwrap();
    let characters: Vec<char> = text.chars().collect();
    let stop: String = characters[characters.len() / 2..][..3].iter().collect();
    let before = &text[..text.find(&stop).unwrap()];

    let completion = llm.generate(&[request().stop("never said").stop(&stop)]).unwrap().remove(0);
    assert_eq!(completion.finish_reason, FinishReason::Stop);
    assert_eq!(completion.text.unwrap(), before);
    assert!(completion.token_ids.len() < whole.token_ids.len());
    assert_eq!(completion.token_ids, whole.token_ids[..completion.token_ids.len()]);

    let mut streamed = String::new();
    llm.generate_stream([request().stop(&stop)], |event| {
        if let StreamEvent::Token { text, .. } | StreamEvent::Finished { text, .. } = event {
            streamed += text;
            assert!(before.starts_with(&streamed), "{streamed:?} goes beyond {before:?}");
        }
        Flow::Continue
    })
    .unwrap();
    assert_eq!(streamed, before);

    let error = rejection(&mut llm, request().stop(""));
    assert_eq!(error, RequestError::EmptyStop);
}

#[test]
fn a_conversation_is_rendered_as_the_checkpoints_template_says() {
    let llm = llm();
    let messages = [
        Message::new("system", "Be brief."),
        Message::new("user", "/think 1 < 2 & \"so\"?"),
        Message::new("assistant", "<think>\nEasy.\n</think>\n\nYes."),
        Message::new("user", "Why?"),
    ];
    let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nthink 1 < 2 & \"so\"?<|im_end|>\n\
                    <|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(llm.render_chat(&ChatPrompt::new(messages)).unwrap(), expected);
}

#[test]
fn chat_goes_through_the_template_and_special_tokens_are_single_tokens() {
    let mut llm = llm();
    let messages = vec![Message::new("user", "How are you?")];
    let rendered = llm.render_chat(&ChatPrompt::new(messages.clone())).unwrap();
    let ids = llm.encode(&rendered).unwrap();
    assert_eq!(ids[0], 1, "<|im_start|> is one token");
    let chat = GenerateRequest::chat(messages).sampling(greedy(5));
    let tokens = GenerateRequest::tokens(ids).sampling(greedy(5));
    let completions = llm.generate(&[chat, tokens]).unwrap();
    assert_eq!(completions[0].token_ids, completions[1].token_ids);
    assert_eq!(completions[0].prompt_tokens, completions[1].prompt_tokens);
}

#[test]
fn what_the_template_raises_rejects_the_request() {
    let mut llm = llm();
    let error = rejection(
        &mut llm,
        GenerateRequest::chat([Message::new("narrator", "x"), Message::new("user", "y")]),
    );
    assert_eq!(error, RequestError::ChatTemplate("the role narrator is unknown".to_owned()));
    let error = rejection(&mut llm, GenerateRequest::chat([]));
    assert!(error.to_string().contains("no user message"), "{error}");
}

/// Renders one user message by a template given in tokenizer_config.json.
fn render(template: &str, content: &str) -> String {
    let scratch = Scratch::new();
    scratch.copy("tiny-tied");
    let config = serde_json::json!({
        "bos_token": "<s>", "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "tool_use", "template": "wrong"}, {"name": "default", "template": template}],
    });
    scratch.write("tokenizer_config.json", config.to_string());
    let prompt = ChatPrompt::new([Message::new("user", content)]);
    small(scratch.path()).build().unwrap().render_chat(&prompt).unwrap()
}

#[test]
fn templates_have_pythons_methods_and_json() {
    let content = "messages[0].content";
    let cases = [
        ("{{ bos_token }}{{ MSG }}{{ eos_token }}", "a", "<s>a</s>"),
        ("{{ MSG.strip() }}|{{ MSG.lstrip() }}|{{ MSG.rstrip() }}", " a ", "a|a | a"),
        ("{{ MSG.strip('xy') }}|{{ MSG.lstrip('x') }}|{{ MSG.rstrip('x') }}", "xyaxyx", "a|yaxyx|xyaxy"),
        ("{{ MSG.split('-') | tojson }}", "a-b--c", r#"["a", "b", "", "c"]"#),
        ("{{ MSG.split('-', 1) | tojson }}", "a-b-c", r#"["a", "b-c"]"#),
        ("{{ MSG.split() | tojson }}", "  a  b ", r#"["a", "b"]"#),
        (
            "{{ MSG.startswith('ab') }}{{ MSG.endswith(('x', 'c')) }}{{ MSG.startswith('b') }}",
            "abc",
            "TrueTrueFalse",
        ),
        (
            "{{ MSG.upper() }}{{ MSG.lower() }}{{ MSG.replace('b', '') }}{{ MSG.find('C') }}",
            "abC",
            "ABCabcaC2",
        ),
        ("{{ messages[0].get('name', 'none') }}{{ messages[0].get('role') }}", "", "noneuser"),
        ("{{ {'a': MSG, 'b': [1, none, true]} | tojson }}", "<é>", r#"{"a": "<é>", "b": [1, null, true]}"#),
        ("{% for key, value in {'k': MSG}.items() %}{{ key }}={{ value }}{% endfor %}", "v", "k=v"),
    ];
    for (template, message, expected) in cases {
        assert_eq!(render(&template.replace("MSG", content), message), expected, "{template}");
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let files = [
        ("tokenizer.json", "{\"model\": 1}"),
        ("tokenizer_config.json", "not json"),
        ("chat_template.jinja", "{% if %}"),
    ];
    for (name, content) in files {
        let scratch = Scratch::with_text();
        scratch.write(name, content);
        match small(scratch.path()).build() {
            Err(error @ Error::TokenizerFile { .. }) => {
                assert!(error.to_string().contains(name), "{error}");
            }
            other => panic!("{name}: {:?}", other.err()),
        }
    }
}
