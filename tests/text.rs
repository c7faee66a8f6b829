//! Text in and out: tokenizer, chat template, stop texts.

mod common;

use std::fs;

use common::{Scratch, builder, greedy, small};
use minisgl::{
    ChatPrompt, Error, FinishReason, Flow, GenerateRequest, Llm, Message, Prompt, RequestError, StreamEvent,
    Text,
};
use serde_json::{Value, json};

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

/// The text side of a checkpoint's folder that holds these files.
fn text_of(files: &[(&str, Value)]) -> Text {
    let scratch = Scratch::with_text();
    for (name, content) in files {
        scratch.write(name, content.as_str().map_or_else(|| content.to_string(), str::to_owned));
    }
    Text::open(scratch.path()).unwrap()
}

/// tokenizer.json of the fixture, changed.
fn tokenizer(change: impl FnOnce(&mut Value)) -> Value {
    let mut file =
        serde_json::from_str(&fs::read_to_string("tests/fixtures/text/tokenizer.json").unwrap()).unwrap();
    change(&mut file);
    file
}

fn ids(text: &Text, prompt: &str) -> Vec<u32> {
    text.encode(Prompt::Text(prompt.to_owned())).unwrap()
}

#[test]
fn truncation_and_padding_left_in_the_tokenizer_are_not_obeyed() {
    let long = "Once upon a time, a page holds tokens. ".repeat(20);
    let plain = text_of(&[]);
    let sections = [
        (
            "truncation",
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
        ),
        ("truncation", json!({"direction": "Left", "max_length": 0, "strategy": "OnlyFirst", "stride": 0})),
        ("truncation", json!("nonsense")),
        (
            "padding",
            json!({"strategy": {"Fixed": 999}, "direction": "Left", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
        ),
        (
            "padding",
            json!({"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 64, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
        ),
    ];
    for (name, section) in sections {
        let text = text_of(&[("tokenizer.json", tokenizer(|file| file[name] = section.clone()))]);
        for prompt in ["", "Hi", &long] {
            assert_eq!(ids(&text, prompt), ids(&plain, prompt), "{name}: {section}");
        }
        let chat = || Prompt::Chat(ChatPrompt::new([Message::new("user", "Hi")]));
        assert_eq!(text.encode(chat()), plain.encode(chat()));
    }
}

fn added(content: &str, special: bool) -> Value {
    json!({"content": content, "lstrip": false, "rstrip": false, "normalized": false, "single_word": false, "special": special})
}

#[test]
fn tokens_that_only_the_configuration_lists_have_the_ids_that_it_gives() {
    let decoder = |tokens: Value| ("tokenizer_config.json", json!({"added_tokens_decoder": tokens}));
    let text = text_of(&[decoder(json!({"634": added("<|note|>", true), "635": added("<said>", false)}))]);
    assert_eq!(ids(&text, "<|note|>"), [634]);
    assert_eq!(ids(&text, "<said><|note|>"), [635, 634]);
    assert_eq!(text.decode(&[635, 634, 42]).unwrap(), "<said>H", "one of them is special");
    assert_eq!(text.token_bytes(634).unwrap(), b"<|note|>");

    let text = text_of(&[decoder(json!({"700": added("<|far|>", true), "2": added("<|im_end|>", true)}))]);
    assert_eq!(ids(&text, "a<|far|>"), [ids(&text, "a"), vec![700]].concat(), "ids between are nobody's");
    assert_eq!(text.decode(&[640, 42]).unwrap(), "H");
    assert_eq!(text.token_bytes(701), None);

    let text = text_of(&[("added_tokens.json", json!({"<|x|>": 634, "<|y|>": 635}))]);
    assert_eq!(ids(&text, "<|y|><|x|>"), [635, 634], "as older checkpoints list them");

    let text = text_of(&[decoder(json!({"0": added("<|endoftext|>", false)}))]);
    assert_eq!(ids(&text, "<|endoftext|>"), [0], "one that both list stays what it is");
}

#[test]
fn a_word_that_the_configuration_names_as_special_is_one_token_and_no_text() {
    let plain = text_of(&[]);
    let name = ids(&plain, "page")
        .into_iter()
        .map(|id| plain.decode(&[id]).unwrap())
        .max_by_key(String::len)
        .unwrap();
    let id = ids(&plain, &name)[0];
    let text = text_of(&[("tokenizer_config.json", json!({"eos_token": {"content": name}}))]);
    assert_eq!(text.eos(), Some(id));
    assert_eq!(text.decode(&[42, id]).unwrap(), "H");
    assert_eq!(plain.decode(&[42, id]).unwrap(), format!("H{name}"));
}

#[test]
fn the_end_token_is_that_of_the_tokenizers_configuration() {
    let config = |value: Value| ("tokenizer_config.json", value);
    let map = |value: Value| ("special_tokens_map.json", value);
    assert_eq!(text_of(&[]).eos(), None);
    assert_eq!(text_of(&[config(json!({"eos_token": "<|im_end|>"}))]).eos(), Some(2));
    assert_eq!(text_of(&[config(json!({"eos_token": null}))]).eos(), None);
    assert_eq!(text_of(&[map(json!({"eos_token": {"content": "<|im_end|>"}}))]).eos(), Some(2));
    let both = [config(json!({"eos_token": "<|im_end|>"})), map(json!({"eos_token": "<|endoftext|>"}))];
    assert_eq!(text_of(&both).eos(), Some(0), "as transformers reads the two");
    let listed = config(json!({"eos_token": "<|im_end|>", "added_tokens_decoder": {}}));
    assert_eq!(text_of(&[listed, map(json!({"eos_token": "<|endoftext|>"}))]).eos(), Some(2));
    let text = text_of(&[config(json!({"eos_token": "</s>"}))]);
    assert_eq!(text.eos(), None);
    assert!(text.warnings()[0].contains("</s>"), "{:?}", text.warnings());
}

#[test]
fn what_is_put_before_a_text_is_what_the_post_processor_says() {
    let processor = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    });
    let config = json!({"add_bos_token": false, "bos_token": "<|im_end|>"});
    let file = tokenizer(|file| file["post_processor"] = processor);
    let text = text_of(&[("tokenizer.json", file), ("tokenizer_config.json", config)]);
    assert_eq!(ids(&text, "Hi")[..2], [1, 42]);
    let chat = text.encode(Prompt::Chat(ChatPrompt::new([Message::new("user", "Hi")]))).unwrap();
    assert_ne!(chat[1], 1, "a template writes its special tokens itself");
    let config = json!({"add_bos_token": true, "add_eos_token": true, "bos_token": "<|im_start|>"});
    assert_eq!(ids(&text_of(&[("tokenizer_config.json", config)]), "Hi")[0], 42, "and only it");
}

#[test]
fn a_text_begins_with_the_token_that_llamas_class_is_asked_for() {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    let other = json!({
        "type": "TemplateProcessing", "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}},
        "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    });
    let text = |class: &str, begins: bool, processor: &Value| {
        let config = json!({"tokenizer_class": class, "add_bos_token": begins, "bos_token": {"content": "<|im_start|>"}});
        let file = tokenizer(|file| file["post_processor"] = processor.clone());
        text_of(&[("tokenizer.json", file), ("tokenizer_config.json", config)])
    };
    for class in ["LlamaTokenizer", "LlamaTokenizerFast"] {
        for processor in [&byte_level, &Value::Null] {
            assert_eq!(ids(&text(class, true, processor), "Hi")[..2], [1, 42], "{class}");
            assert_eq!(ids(&text(class, false, processor), "Hi")[0], 42, "{class}");
        }
        assert_eq!(ids(&text(class, true, &other), "Hi")[..2], [2, 42], "what the file says is left");
    }
    assert_eq!(ids(&text("Qwen2Tokenizer", true, &byte_level), "Hi")[0], 42);
    let begun = text("LlamaTokenizerFast", true, &byte_level);
    let chat = begun.encode(Prompt::Chat(ChatPrompt::new([Message::new("user", "Hi")]))).unwrap();
    assert_eq!(
        chat.iter().filter(|id| **id == 1).count(),
        2,
        "a template writes its special tokens itself: {chat:?}"
    );
}

#[test]
fn a_template_that_does_not_compile_fails_only_requests_with_messages() {
    let scratch = Scratch::with_text();
    for broken in ["{% if %}", "{{ x", "{% unknown %}", "{{ a | nofilter( }}"] {
        scratch.write("chat_template.jinja", broken);
        let mut llm = small(scratch.path()).build().unwrap();
        let warning = llm.info().warnings[0].clone();
        assert!(warning.contains("chat_template.jinja") && warning.contains("does not compile"), "{warning}");
        assert!(llm.info().to_string().contains(&warning), "{}", llm.info());
        let requests = [
            GenerateRequest::chat([Message::new("user", "Hi")]),
            GenerateRequest::text("Hi").sampling(greedy(2)),
            GenerateRequest::tokens([5]).sampling(greedy(2)),
        ];
        let completions = llm.generate(&requests).unwrap();
        let error = completions[0].error.clone().unwrap();
        assert!(matches!(error, RequestError::BrokenChatTemplate(_)), "{error}");
        assert!(error.to_string().contains("chat_template.jinja"), "{error}");
        assert!(completions[1..].iter().all(|completion| completion.token_ids.len() == 2));
    }
}

fn rendered(text: &Text, prompt: &ChatPrompt) -> String {
    text.render(prompt).unwrap()
}

#[test]
fn a_template_is_chosen_by_name_and_files_go_before_the_configuration() {
    let hi = || ChatPrompt::new([Message::new("user", "Hi")]);
    let with_tools = || ChatPrompt { tools: Some(vec![json!({"type": "function"})]), ..hi() };
    let named = json!({"chat_template": [
        {"name": "tool_use", "template": "T{{ tools | length }}"}, {"name": "default", "template": "D"}]});
    let scratch = Scratch::new();
    let open = || Text::open(scratch.path()).unwrap();
    assert_eq!(open().render(&hi()), Err(RequestError::NoChatTemplate));
    scratch.write("chat_template.json", json!({"chat_template": "P"}).to_string());
    assert_eq!(rendered(&open(), &with_tools()), "P");
    scratch.write("tokenizer_config.json", named.to_string());
    assert_eq!(
        (rendered(&open(), &hi()), rendered(&open(), &with_tools())),
        ("D".to_owned(), "T1".to_owned())
    );
    scratch.write("tokenizer_config.json", json!({"chat_template": {"default": "O"}}).to_string());
    assert_eq!(rendered(&open(), &with_tools()), "O");
    scratch.write(
        "tokenizer_config.json",
        json!({"chat_template": [{"name": "rag", "template": "R"}]}).to_string(),
    );
    let error = open().render(&hi()).unwrap_err().to_string();
    assert!(error.contains("rag") && error.contains("default"), "{error}");
    scratch.write("tokenizer_config.json", json!({"chat_template": 7}).to_string());
    assert!(open().warnings()[0].contains("chat_template"), "{:?}", open().warnings());
    scratch.write("chat_template.jinja", "F");
    assert_eq!(rendered(&open(), &hi()), "F");
    fs::create_dir(scratch.join("additional_chat_templates")).unwrap();
    scratch.write("additional_chat_templates/tool_use.jinja", "A");
    scratch.write("additional_chat_templates/notes.txt", "{% if %}");
    assert_eq!(
        (rendered(&open(), &hi()), rendered(&open(), &with_tools())),
        ("F".to_owned(), "A".to_owned())
    );
}

/// The text side of a checkpoint with a template.
fn templated(template: &str) -> Text {
    text_of(&[("chat_template.jinja", template.into())])
}

fn chat(messages: Value) -> ChatPrompt {
    ChatPrompt::new(serde_json::from_value::<Vec<Message>>(messages).unwrap())
}

const CHATML: &str = "{% for m in messages %}<{{ m.role }}>{{ m['content'] + '|' }}\n{% endfor %}";

#[test]
fn text_parts_reach_every_template_in_the_form_that_it_takes() {
    let prompt = chat(json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "c"},
    ]));
    assert_eq!(rendered(&templated(CHATML), &prompt), "<user>a\nb|\n<user>c|\n");
    let printing = "{% for m in messages %}{{ m.content }};{% endfor %}";
    assert_eq!(rendered(&templated(printing), &prompt), "a\nb;c;");
    let taking = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}[{{ p.text }}]\
                  {% endfor %}{% endif %};{% endfor %}";
    assert_eq!(rendered(&templated(taking), &prompt), "[a][b];c;");
    let only = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %};{% endfor %}";
    assert_eq!(rendered(&templated(only), &prompt), "[a][b];[c];");
}

#[test]
fn what_developers_say_is_the_systems_where_the_template_does_not_know_them() {
    let prompt = chat(json!([
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "u"},
        {"role": "developer", "content": "e"},
    ]));
    assert_eq!(rendered(&templated(CHATML), &prompt), "<developer>d|\n<user>u|\n<developer>e|\n");
    let roles = "{% for m in messages %}{% if m.role in ['system', 'user'] %}<{{ m.role }}>{{ m.content }}";
    let dropping = format!("{roles}{{% endif %}}{{% endfor %}}");
    let refusing = format!("{roles}{{% else %}}{{{{ raise_exception(m.role) }}}}{{% endif %}}{{% endfor %}}");
    for template in [dropping, refusing] {
        assert_eq!(rendered(&templated(&template), &prompt), "<system>d<user>u<system>e");
    }
    let lists =
        "{% for m in messages %}{% for p in m.content %}<{{ m.role }}>{{ p.text }}{% endfor %}{% endfor %}";
    assert_eq!(rendered(&templated(lists), &prompt), "<developer>d<user>u<developer>e");
}

#[test]
fn a_part_that_is_no_text_is_refused_by_its_type() {
    for kind in ["image_url", "image", "input_audio", "video", "file"] {
        let prompt = chat(json!([
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "data:"}}]},
        ]));
        let error = templated(CHATML).render(&prompt).unwrap_err().to_string();
        assert!(error.contains("messages[1].content[1]") && error.contains(kind), "{error}");
    }
}

#[test]
fn conversations_with_tool_calls_reach_every_template_in_the_form_that_it_takes() {
    let conversation = |arguments: Value| {
        let call = json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}});
        chat(json!([
            {"role": "user", "content": "w?"},
            {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "hm"},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "7"},
        ]))
    };
    let (text, object) = (json!("{\"a\": \"é\"}"), json!({"a": "é"}));
    assert_eq!(
        rendered(&templated(CHATML), &conversation(text.clone())),
        "<user>w?|\n<assistant>|\n<tool>7|\n"
    );
    let calls = |print: &str| {
        let each = format!("{{% for c in m.tool_calls %}}{{{{ {print} }}}}{{% endfor %}}");
        templated(&format!(
            "{{% for m in messages %}}{each}{{% if m.content is none %}}null{{% endif %}}{{% endfor %}}"
        ))
    };
    let as_json = calls("c.function.arguments | tojson");
    let as_text = calls("c.function.arguments + ''");
    let either =
        calls("c.function.arguments if c.function.arguments is string else c.function.arguments | tojson");
    for given in [&text, &object] {
        assert_eq!(rendered(&as_json, &conversation(given.clone())), "{\"a\": \"é\"}null");
        assert_eq!(rendered(&either, &conversation(given.clone())), "{\"a\": \"é\"}null");
    }
    assert_eq!(rendered(&as_text, &conversation(text)), "{\"a\": \"é\"}null");
    let all = "{% for m in messages %}{{ m.name }}{{ m.tool_call_id }}{{ m.reasoning_content }}{{ m.unknown }}{% endfor %}";
    assert_eq!(rendered(&templated(all), &conversation(object)), "hmfc1");
}

#[test]
fn a_conversation_goes_on_within_its_final_message() {
    let said = |content: &str| {
        ChatPrompt::continuing([Message::new("user", "hi"), Message::new("assistant", content)])
    };
    let plain = templated(CHATML);
    for content in ["Well,", "Well, \n", " x", "", "END_OF", "hi", "{{ m }}"] {
        assert_eq!(rendered(&plain, &said(content)), format!("<user>hi|\n<assistant>{content}"));
    }
    let strips = templated(&CHATML.replace("m['content']", "m['content'].strip()"));
    assert_eq!(rendered(&strips, &said(" Well, \n")), "<user>hi|\n<assistant>Well,");
    let parts = chat(
        json!([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
    );
    let parts = ChatPrompt { add_generation_prompt: false, continue_final_message: true, ..parts };
    assert_eq!(rendered(&plain, &parts), "<assistant>a\nb");

    let refusal = |text: &Text, prompt: ChatPrompt| text.render(&prompt).unwrap_err().to_string();
    let both = ChatPrompt { add_generation_prompt: true, ..said("x") };
    assert!(refusal(&plain, both).contains("add_generation_prompt"));
    assert!(refusal(&plain, ChatPrompt::continuing([])).contains("no text to go on with"));
    let swallows = templated("{% for m in messages %}{{ m.role }}{% endfor %}");
    assert!(refusal(&swallows, said("x")).contains("does not print"));
}

#[test]
fn variables_of_a_request_reach_the_template_and_fields_of_their_own_do_not_pass_as_such() {
    let text = text_of(&[
        (
            "chat_template.jinja",
            "{{ a.b }}{{ enable_thinking }}{{ bos_token }}{{ documents | length }}{{ image_token }}".into(),
        ),
        (
            "tokenizer_config.json",
            json!({"bos_token": "<s>", "image_token": "<i>", "extra_special_tokens": {"foo_token": "<f>"}}),
        ),
    ]);
    let mut prompt = chat(json!([{"role": "user", "content": "x"}]));
    prompt.documents = Some(vec![json!({"title": "t"})]);
    prompt.kwargs = serde_json::from_value(json!({"a": {"b": [1, null]}, "enable_thinking": false})).unwrap();
    assert_eq!(rendered(&text, &prompt), "[1, None]False<s>1<i>");
    prompt.kwargs.insert("bos_token".to_owned(), json!("B"));
    assert_eq!(rendered(&text, &prompt), "[1, None]FalseB1<i>", "a variable goes before a special token");
    for name in ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message"] {
        let mut prompt = prompt.clone();
        prompt.kwargs.insert(name.to_owned(), json!(null));
        let error = text.render(&prompt).unwrap_err().to_string();
        assert!(error.contains(&format!("holds {name},")), "{error}");
    }
}

#[test]
fn the_clock_in_a_template_is_the_local_one() {
    let date = |format: &str| {
        let output =
            std::process::Command::new("date").env("LC_ALL", "C").arg(format!("+{format}")).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    };
    for format in ["%Y-%m-%d", "%d %b %Y", "%B %d, %Y", "%A %j %%", "%-d/%-m/%y", "%H"] {
        let text = templated(&format!("{{{{ strftime_now('{format}') }}}}"));
        let (before, is, after) = (date(format), rendered(&text, &ChatPrompt::new([])), date(format));
        assert!(is == before || is == after, "{format}: {is}, not {after}");
    }
    let error = templated("{{ strftime_now('%!') }}").render(&ChatPrompt::new([])).unwrap_err().to_string();
    assert!(error.contains("strftime_now"), "{error}");
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let files: [(&str, &[u8]); 8] = [
        ("tokenizer.json", b"{\"model\": 1}"),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"not json"),
        ("tokenizer_config.json", b"{\"added_tokens_decoder\": {\"x\": 1}}"),
        ("special_tokens_map.json", b"[]"),
        ("added_tokens.json", b"{\"a\": -1}"),
        ("chat_template.jinja", b"\xff\xfe"),
    ];
    for (name, content) in files {
        let scratch = Scratch::with_text();
        scratch.write(name, content);
        match small(scratch.path()).build() {
            Err(error @ Error::TokenizerFile { .. }) => assert!(error.to_string().contains(name), "{error}"),
            other => panic!("{name}: {:?}", other.err()),
        }
    }
}

#[test]
fn a_link_to_nothing_is_no_absent_file() {
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"]
    {
        let scratch = Scratch::with_text();
        let _ = fs::remove_file(scratch.join(name));
        std::os::unix::fs::symlink("../../blobs/gone", scratch.join(name)).unwrap();
        let error = Text::open(scratch.path()).err().unwrap().to_string();
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_text_is_refused_for_its_length_only_if_it_has_more_tokens_than_fit() {
    let text = text_of(&[]);
    let pieces = [
        "Once upon a time, a page holds tokens. ",
        "a",
        " ",
        "<|im_start|>",
        "e\u{301}",
        "漢字🦀",
        "x\n\n  y\t",
        "1 2",
    ];
    let mut refused = 0;
    for piece in pieces {
        let long = piece.repeat(120_000 / piece.len());
        let all = ids(&text, &long);
        for most in [0, 1, 1000, all.len() / 2, all.len() - 1, all.len(), all.len() + 1] {
            match text.encode_within(Prompt::Text(long.clone()), most) {
                Ok(ids) => assert_eq!(ids, all),
                Err(error) => {
                    assert_eq!(error, RequestError::TextTooLong { bytes: long.len(), limit: most });
                    assert!(all.len() > most, "{piece:?} has {} tokens", all.len());
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > pieces.len(), "{refused}");
}

#[test]
fn a_text_of_20_megabytes_is_refused_and_the_others_run() {
    let mut llm = llm();
    let long = "Once upon a time, a page holds tokens. ".repeat(500_000);
    let requests = [
        GenerateRequest::text(&long),
        GenerateRequest::chat([Message::new("user", &long)]),
        GenerateRequest::text("Hi").sampling(greedy(2)),
    ];
    let completions = llm.generate(&requests).unwrap();
    for completion in &completions[..2] {
        let error = completion.error.clone().unwrap();
        assert!(matches!(error, RequestError::TextTooLong { limit: 511, .. }), "{error}");
        assert!(error.to_string().contains("--max-seq-len"), "{error}");
    }
    assert_eq!(completions[2].token_ids.len(), 2);
}

#[test]
fn a_template_that_calls_itself_for_ever_is_refused() {
    for template in [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}",
        "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    ] {
        let error = templated(template).render(&ChatPrompt::new([Message::new("user", "Hi")])).unwrap_err();
        assert!(matches!(error, RequestError::ChatTemplate(_)), "{error}");
    }
}

#[test]
fn a_template_that_does_not_end_or_whose_text_has_no_end_is_refused() {
    let loops = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}";
    for template in [
        loops,
        "{% set ns = namespace(x='twice') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 'a'.replace('', 'b' * 1000000).replace('b', 'c' * 100000) }}",
        "{{ ','.join(['a' * 1000000] * 100000) }}",
        "{{ '{0:999999999999}'.format('a') }}",
        "{{ ('{0}' * 100000).format('a' * 1000000) }}",
        "{{ '%999999999999d'|format(3) }}",
        "{{ messages|tojson(indent=1000000000000) }}",
        "{{ (['a' * 1000000] * 100000)|tojson }}",
        "{{ ([[]] * 100000)|tojson(indent='a' * 1000000) }}",
        "{{ 'a'|indent(100000000000) }}",
        "{{ [1]|batch(3000000000, 'a')|list }}",
    ] {
        let error = templated(template).render(&ChatPrompt::new([Message::new("user", "Hi")])).unwrap_err();
        let is_named =
            matches!(&error, RequestError::BrokenChatTemplate(why) if why.contains("does not end"));
        assert!(is_named, "{template}: {error}");
    }
    // One that does so for some conversations fails these alone.
    let text = templated(&format!("{{% if messages[0].content == 'Hi' %}}{loops}{{% endif %}}said"));
    let error = text.render(&ChatPrompt::new([Message::new("user", "Hi")])).unwrap_err();
    assert!(matches!(&error, RequestError::ChatTemplate(why) if why.contains("steps")), "{error}");
    assert_eq!(text.render(&ChatPrompt::new([Message::new("user", "Ho")])).unwrap(), "said");
    // A long conversation is far from it.
    let said: Vec<_> = (0..2000).map(|_| Message::new("user", "what is said ".repeat(300))).collect();
    let template = "{% for m in messages %}{{ m.content.strip().replace('is', 'was').split('x')[-1] }}{{ m|tojson }}{% endfor %}";
    assert!(templated(template).render(&ChatPrompt::new(said)).is_ok());
}

#[test]
fn a_vocabulary_that_is_a_list_takes_further_tokens_at_its_end_alone() {
    let list = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": null, "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]},
    });
    let config = |id: &str| json!({"added_tokens_decoder": {id: added("<|x|>", true)}});
    let text = text_of(&[("tokenizer.json", list.clone()), ("tokenizer_config.json", config("3"))]);
    assert_eq!(ids(&text, "a<|x|>b"), [1, 3, 2]);
    let scratch = Scratch::new();
    scratch.write("tokenizer.json", list.to_string());
    scratch.write("tokenizer_config.json", config("9").to_string());
    let error = Text::open(scratch.path()).err().unwrap().to_string();
    assert!(error.contains("<|x|>") && error.contains('9') && error.contains("tokenizer.json"), "{error}");
}
