//! Fields that say how is drawn: in every format alike, or refused by name.

use minisgl::{Prompt, PromptLogprobs, SamplingParams, TokenRules};

use super::{defaults, error, in_all_formats, parse, sampling};

#[test]
fn what_a_line_leaves_out_is_as_the_defaults_say_and_its_seed_is_its_own() {
    let expected = SamplingParams { seed: 103, max_tokens: 16, ..SamplingParams::default() };
    assert_eq!(sampling(r#""user": "me""#), expected);
    for fields in [
        r#""max_tokens": null, "temperature": null, "top_k": null, "top_p": null, "min_p": null, "seed": null"#,
        r#""ignore_eos": null, "logprobs": null, "top_logprobs": null, "stop": null, "max_completion_tokens": null"#,
        r#""top_k": -1, "seed": -1"#,
    ] {
        assert_eq!(sampling(fields), expected, "{fields}");
    }
}

#[test]
fn numbers_are_taken_as_people_and_their_tools_write_them() {
    let taken =
        sampling(r#""max_tokens": 2.0, "top_k": 5.0, "seed": 7.0, "temperature": 1, "top_p": 1, "min_p": 0"#);
    let expected =
        SamplingParams { temperature: 1.0, top_k: 5, seed: 7, max_tokens: 2, ..defaults().sampling };
    assert_eq!(taken, expected);
    assert_eq!(sampling(r#""max_tokens": 1.6e1"#).max_tokens, 16);
    assert_eq!(sampling(r#""top_k": 0"#).top_k, 0);
    assert_eq!(sampling(r#""top_k": -1.0"#).top_k, 0);
    assert_eq!(sampling(r#""seed": 18446744073709551615"#).seed, u64::MAX);
    assert_eq!(sampling(r#""seed": -2"#).seed, u64::MAX - 1);
    // More than a sequence holds is as many as it holds.
    assert_eq!(sampling(r#""max_tokens": 9999999999999"#).max_tokens, u32::MAX);
    let tokens = parse(r#"{"id": 1, "prompt_token_ids": [1.0, 2, 3e0]}"#).unwrap().request.prompt;
    assert_eq!(tokens, Prompt::Tokens(vec![1, 2, 3]));
}

#[test]
fn numbers_that_mean_nothing_are_refused_by_name() {
    for (fields, says) in [
        (r#""max_tokens": 0"#, "max_tokens is 0; it must be a whole number from 1 on"),
        (r#""max_tokens": -1"#, "max_tokens is -1;"),
        (r#""max_tokens": 2.5"#, "max_tokens is 2.5; it must be a whole number"),
        (r#""max_tokens": "16""#, "max_tokens is \"16\"; it must be a whole number"),
        (r#""max_tokens": true"#, "max_tokens is true;"),
        (r#""max_tokens": 1e400"#, "max_tokens can't be read: number out of range"),
        (r#""max_completion_tokens": 0"#, "max_completion_tokens is 0;"),
        (r#""top_k": -2"#, "top_k is -2; it must be a whole number from 1 on, or 0 or -1"),
        (
            r#""seed": 18446744073709551616"#,
            "seed is 18446744073709551616; it must be a whole number of 64 bits",
        ),
        (r#""seed": 1.5"#, "seed is 1.5;"),
        (r#""seed": 1e300"#, "seed is 1e300;"),
        (r#""temperature": "hot""#, "temperature is \"hot\"; it must be a number"),
        (r#""temperature": 1e999"#, "temperature can't be read: number out of range"),
        (r#""top_p": [0.9]"#, "top_p is [0.9]; it must be a number"),
        (r#""ignore_eos": "yes""#, "ignore_eos is \"yes\"; it must be true or false"),
        (r#""stop": 5"#, "stop is 5; it must be a text or a list of texts"),
        (r#""stop": ["a", null]"#, "stop is [\"a\", null];"),
        (r#""include_stop_str_in_output": 1"#, "include_stop_str_in_output is 1; it must be true or false"),
        (r#""stop_token_ids": [-1]"#, "stop_token_ids is [-1]; it must be a list of token ids"),
        (r#""allowed_token_ids": [0.5]"#, "allowed_token_ids is [0.5]; it must be a list of token ids"),
        (r#""allowed_token_ids": 7"#, "allowed_token_ids is 7; it must be a list of token ids"),
        (r#""bad_words": "a""#, "bad_words is \"a\"; it must be a list of texts"),
        (
            r#""logit_bias": {"a": 1}"#,
            "logit_bias is {\"a\": 1}; it must be an object with a number for each",
        ),
        (r#""logit_bias": {"5": null}"#, "logit_bias is {\"5\": null};"),
        (r#""logit_bias": [1]"#, "logit_bias is [1];"),
        (r#""min_tokens": -1"#, "min_tokens is -1; it must be a whole number from 0 on"),
        (r#""presence_penalty": "high""#, "presence_penalty is \"high\"; it must be a number"),
    ] {
        let error = error(fields);
        assert!(error.to_string().starts_with(says), "{fields}: {error}");
        assert!(error.field().is_some_and(|field| fields.starts_with(&format!("\"{field}\""))), "{fields}");
    }
}

#[test]
fn penalties_biases_and_what_ends_an_output_are_read_in_every_format() {
    let penalized = sampling(
        r#""repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -1, "min_tokens": 3"#,
    );
    let expected = SamplingParams {
        repetition_penalty: 1.1,
        presence_penalty: 0.5,
        frequency_penalty: -1.0,
        min_tokens: 3,
        ..sampling(r#""user": "me""#)
    };
    assert_eq!(penalized, expected);
    let fields = r#""logit_bias": {"50256": -100, "7": 2.5}, "stop_token_ids": [5, 6.0], "bad_words": ["a", " b"],
        "allowed_token_ids": [9, 7.0], "stop": "x", "include_stop_str_in_output": true"#;
    for line in in_all_formats(&fields.replace('\n', "")) {
        let request = parse(&line).expect(&line).request;
        let rules = TokenRules {
            logit_bias: vec![(50256, -100.0), (7, 2.5)],
            stop_token_ids: vec![5, 6],
            bad_words: vec!["a".to_owned(), " b".to_owned()],
            allowed_token_ids: Some([9, 7].into()),
        };
        assert_eq!((request.rules, request.include_stop), (rules, true), "{line}");
    }
    for nothing in ["null", "{}"] {
        let line = format!(r#"{{"id": 1, "prompt": "a", "logit_bias": {nothing}, "bad_words": null}}"#);
        assert_eq!(parse(line).unwrap().request.rules, TokenRules::default());
    }
}

#[test]
fn max_tokens_has_two_names_that_may_not_disagree() {
    assert_eq!(sampling(r#""max_completion_tokens": 5"#).max_tokens, 5);
    assert_eq!(sampling(r#""max_completion_tokens": 5, "max_tokens": 5"#).max_tokens, 5);
    let error = error(r#""max_completion_tokens": 5, "max_tokens": 6"#).to_string();
    assert_eq!(error, "max_tokens is 6 and max_completion_tokens says otherwise; give one of them");
}

#[test]
fn logprobs_are_asked_for_by_a_count_or_by_openais_pair() {
    for (fields, asked) in [
        (r#""logprobs": 3"#, Some(3)),
        (r#""logprobs": 0"#, Some(0)),
        (r#""logprobs": 20.0"#, Some(20)),
        (r#""logprobs": true"#, Some(0)),
        (r#""logprobs": true, "top_logprobs": 2"#, Some(2)),
        (r#""logprobs": 2, "top_logprobs": 2"#, Some(2)),
        (r#""logprobs": false"#, None),
        (r#""logprobs": false, "top_logprobs": 0"#, None),
        (r#""top_logprobs": 0"#, None),
    ] {
        assert_eq!(sampling(fields).logprobs, asked, "{fields}");
    }
    for (fields, says) in [
        (r#""logprobs": 21"#, "logprobs is 21; it must be true, false, or a whole number up to 20"),
        (r#""logprobs": -1"#, "logprobs is -1;"),
        (r#""logprobs": "all""#, "logprobs is \"all\";"),
        (r#""logprobs": true, "top_logprobs": 21"#, "top_logprobs is 21; it must be a whole number up to 20"),
        (r#""top_logprobs": 2"#, "the request has no logprobs; top_logprobs needs it to be true"),
        (r#""logprobs": false, "top_logprobs": 2"#, "logprobs is false and top_logprobs says otherwise"),
        (r#""logprobs": 3, "top_logprobs": 2"#, "logprobs is 3 and top_logprobs says otherwise"),
    ] {
        let error = error(fields).to_string();
        assert!(error.starts_with(says), "{fields}: {error}");
    }
}

#[test]
fn a_prompts_log_probabilities_may_be_asked_for_alone() {
    let asked = |top| Some(PromptLogprobs { from: 0, top });
    assert_eq!(sampling(r#""prompt_logprobs": 5"#).prompt_logprobs, asked(5));
    let alone = sampling(r#""prompt_logprobs": 0, "max_tokens": 0"#);
    assert_eq!((alone.prompt_logprobs, alone.max_tokens), (asked(0), 0));
    assert_eq!(sampling(r#""prompt_logprobs": null"#).prompt_logprobs, None);
    for wrong in ["21", "-1", "true", "1.5"] {
        let error = error(&format!(r#""prompt_logprobs": {wrong}"#)).to_string();
        assert_eq!(error, format!("prompt_logprobs is {wrong}; it must be a whole number up to 20"));
    }
}

#[test]
fn stop_is_null_a_text_or_several() {
    for (fields, stop) in [
        (r#""stop": null"#, vec![]),
        (r#""stop": []"#, vec![]),
        (r#""stop": "END""#, vec!["END"]),
        (r#""stop": ["END", "\n"]"#, vec!["END", "\n"]),
    ] {
        for line in in_all_formats(fields) {
            assert_eq!(parse(&line).unwrap().request.stop, stop, "{line}");
        }
    }
}

#[test]
fn fields_at_the_value_that_asks_for_nothing_are_taken() {
    let expected = sampling(r#""user": "me""#);
    for fields in [
        r#""n": 1, "best_of": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0, "repetition_penalty": 1.0"#,
        r#""min_tokens": 0, "stop_token_ids": [], "skip_special_tokens": true, "stream": false, "logit_bias": {}"#,
        r#""response_format": {"type": "text"}, "echo": false, "suffix": "", "length_penalty": 1, "bad_words": []"#,
        r#""spaces_between_special_tokens": true, "include_stop_str_in_output": false, "use_beam_search": false"#,
        r#""n": null, "guided_json": null, "allowed_token_ids": null, "audio": null, "reasoning_effort": null"#,
        r#""metadata": {"a": "b"}, "store": true, "service_tier": "flex", "safety_identifier": "x", "priority": 5"#,
        r#""modalities": ["text"], "tool_choice": "none", "parallel_tool_calls": true, "stream_options": null"#,
        r#""model": "Qwen/Qwen3-0.6B""#,
        r#""model": "Qwen3-0.6B""#,
        r#""model": null"#,
    ] {
        assert_eq!(sampling(fields), expected, "{fields}");
    }
}

#[test]
fn fields_that_ask_for_what_is_not_done_are_refused_by_name_with_what_to_do() {
    for (fields, says) in [
        (r#""n": 129"#, "n is 129; at most 128 outputs of a prompt are given"),
        (r#""n": 0"#, "n is 0; it must be a whole number from 1 to 128"),
        (r#""n": "1""#, "n is \"1\"; it must be a whole number from 1 to 128"),
        (r#""best_of": 3"#, "best_of is 3; all outputs are given, so it must be as n"),
        (r#""length_penalty": 0.5"#, "length_penalty is 0.5; it may only be 1"),
        (r#""stream": true"#, "stream is true; it may only be false"),
        (r#""echo": true"#, "echo is true;"),
        (r#""guided_regex": "a+""#, "guided_regex is \"a+\"; its place is structured_outputs; leave it out"),
        (
            r#""logits_processors": ["f"]"#,
            "logits_processors is [\"f\"]; it may only be []: requests bring no code",
        ),
        (
            r#""enable_thinking": false"#,
            "enable_thinking is false; its place is chat_template_kwargs; leave it out",
        ),
        (
            r#""tool_choice": "sometimes""#,
            "tool_choice is \"sometimes\"; it may be \"auto\", \"none\", \"required\"",
        ),
        (r#""max_token": 5"#, "there is no field \"max_token\"; did you mean max_tokens?"),
        (r#""temprature": 5"#, "there is no field \"temprature\"; did you mean temperature?"),
        (
            r#""frequencyPenalty": 0"#,
            "there is no field \"frequencyPenalty\"; did you mean frequency_penalty?",
        ),
        (r#""colour": 5"#, "there is no field \"colour\"; remove or correct it"),
        (r#""max_token": null"#, "there is no field \"max_token\""),
        (
            r#""model": "gpt-4o""#,
            "model is \"gpt-4o\", but \"Qwen/Qwen3-0.6B\" is loaded; correct it or leave it out",
        ),
        (r#""model": 4"#, "model is 4; it must be a text"),
        (r#""max_tokens": 5, "max_tokens": 5"#, "max_tokens is given twice; keep one"),
    ] {
        let error = error(fields);
        assert!(error.to_string().starts_with(says), "{fields}: {error}");
        assert!(error.field().is_some_and(|field| fields.starts_with(&format!("\"{field}\""))), "{fields}");
    }
}
