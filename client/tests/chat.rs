//! `chat` as a user runs it: through pipes and in a terminal, with a model of its own and with a service.

mod support;

use std::cell::Cell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use minisgl::{BackendChoice, ChatPrompt, GenerateRequest, JsonObject, Llm, Message, Prompt, SamplingParams};
use minisgl_client::chat::settings::Settings;
use minisgl_client::chat::speaker::{Ending, Local, Said, Speaker};
use rexpect::session::{PtySession, spawn_command};
use serde_json::json;
use support::{AUTHORITY, Fake, Reply, Scratch};

/// Milliseconds that a terminal may take to show what it must.
const PATIENCE: u64 = 60_000;

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chat"));
    for variable in ["MAX_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P"] {
        command.env_remove(format!("MINISGL_SHELL_{variable}"));
    }
    command.env_remove("OPENAI_API_KEY").env("TERM", "xterm");
    command
}

/// With the tiny model of a folder.
fn with_model(scratch: &Scratch) -> Command {
    let mut command = command();
    command.arg("--model").arg(scratch.path());
    command.args(["--backend", "cpu", "--max-running", "2", "--max-seq-len", "256", "--num-pages", "64"]);
    command
}

fn with_service(fake: &Fake) -> Command {
    let mut command = command();
    command.args(["--url", &fake.url()]);
    command
}

/// Runs it on these lines.
fn talk(mut command: Command, lines: &str) -> Output {
    let mut chat =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // One that refuses its flags reads nothing.
    let _ = chat.stdin.take().unwrap().write_all(lines.as_bytes());
    chat.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn open(scratch: &Scratch) -> Llm {
    let llm = Llm::builder(scratch.path().display().to_string()).backend(BackendChoice::Cpu);
    llm.max_running(2).max_seq_len(Some(256)).num_pages(Some(64)).build().unwrap()
}

#[test]
fn a_service_behind_tls_is_talked_with_once_it_is_trusted() {
    let fake = Fake::start_tls(|_| Reply::texts(&["Hello", " there"]));
    let talk_trusting = |authority: &str| {
        let mut chat = with_service(&fake);
        chat.env("SSL_CERT_FILE", authority);
        talk(chat, "hi\n")
    };
    let output = talk_trusting(AUTHORITY);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout).trim(), "Hello there");
    // Among Mozilla's authorities it is not.
    let output = talk_trusting("");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("certificate"), "{}", text(&output.stderr));
    assert_eq!(fake.asked().len(), 1);
}

#[test]
fn a_model_of_its_own_answers_as_the_library_does() {
    let scratch = Scratch::with_model();
    let mut lines = with_model(&scratch);
    lines.args(["--temperature", "0", "--max-tokens", "9", "--system", "Be brief."]);
    let output = talk(lines, "Hello\nWhy?\n/reset\nHello\n");
    assert!(output.status.success(), "{}", text(&output.stderr));

    let sampling = SamplingParams { max_tokens: 9, ..SamplingParams::default() };
    let mut llm = open(&scratch);
    let mut answer = |messages: &[Message]| {
        let request = GenerateRequest::new(Prompt::Chat(ChatPrompt::new(messages))).sampling(sampling);
        llm.generate(&[request]).unwrap()[0].text.clone().unwrap()
    };
    let begun = [Message::new("system", "Be brief."), Message::new("user", "Hello")];
    let first = answer(&begun);
    let more = [&begun[..], &[Message::new("assistant", &*first), Message::new("user", "Why?")]].concat();
    let second = answer(&more);
    assert_eq!(text(&output.stdout), format!("{first}\n{second}\n{first}\n"));
    assert!(text(&output.stderr).contains("/set max_tokens allows for more"), "{}", text(&output.stderr));
}

#[test]
fn a_models_answer_is_stopped_when_that_is_wanted_and_the_next_one_comes() {
    let scratch = Scratch::with_model();
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::default() };
    let mut speaker = Local::new(open(&scratch), sampling, JsonObject::new()).unwrap();
    let mut settings = Settings { max_tokens: Some(200), ..Settings::default() };
    let messages = [Message::new("user", "Hello")];
    let heard = Cell::new(0);
    let mut count = |said: Said<'_>| {
        heard.set(heard.get() + usize::from(said != Said::Text("")));
        Ok(())
    };
    let ending = speaker.answer(&messages, &settings, &|| heard.get() >= 3, &mut count).unwrap();
    assert_eq!((ending, heard.get()), (Ending::Stopped, 3));
    settings.max_tokens = Some(4);
    let ending = speaker.answer(&messages, &settings, &|| false, &mut count).unwrap();
    assert_eq!(ending, Ending::Length);
}

#[test]
fn a_service_gets_the_conversation_and_what_was_said_about_drawing_tokens() {
    let fake = Fake::start(|_| Reply::texts(&["Hel", "lo."]));
    let mut lines = with_service(&fake);
    lines.args([
        "--top-p",
        "0.5",
        "--api-key",
        "k",
        "--chat-template-kwargs",
        r#"{"enable_thinking": false}"#,
    ]);
    lines.env("MINISGL_SHELL_MAX_TOKENS", "77").env("MINISGL_SHELL_TOP_P", "0.9");
    let output =
        talk(lines, "Hi\n/set temperature 0.7\n/system Be brief.\n/nonsense\nAnd?\n/quit\nnever said\n");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "Hello.\nHello.\n");
    assert!(text(&output.stderr).contains("/nonsense is no command"), "{}", text(&output.stderr));
    let asked = fake.asked();
    assert_eq!(asked.len(), 2);
    assert_eq!((asked[0].key.as_deref(), asked[0].path.as_str()), (Some("Bearer k"), "/v1/chat/completions"));
    let first = json!({
        "model": "fake", "messages": [{"role": "user", "content": "Hi"}], "stream": true, "max_tokens": 77, "top_p": 0.5,
        "chat_template_kwargs": {"enable_thinking": false},
    });
    assert_eq!(asked[0].body, first);
    let messages = json!([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"},
    ]);
    assert_eq!(asked[1].body["messages"], messages);
    assert!((asked[1].body["temperature"].as_f64().unwrap() - 0.7).abs() < 1e-6);
}

#[test]
fn a_services_failure_is_told_and_the_conversation_goes_on() {
    let fake = Fake::start(|asked| match asked.number {
        0 => Reply::Json(429, json!({"error": {"message": "the queue is full"}})),
        1 => Reply::Bytes(b"HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": []}\n\n".to_vec()),
        2 => Reply::Json(401, json!({"error": {"message": "no key"}})),
        _ => Reply::texts(&["Hello."]),
    });
    let output = talk(with_service(&fake), "a\nb\nc\nd\n");
    assert_eq!(output.status.code(), Some(1), "an answer failed");
    assert!(text(&output.stdout).ends_with("Hello.\n"));
    for told in ["answers 429: the queue is full", "without [DONE]", "set OPENAI_API_KEY"] {
        assert!(text(&output.stderr).contains(told), "{told}: {}", text(&output.stderr));
    }
    assert_eq!(fake.asked()[3].body["messages"], json!([{"role": "user", "content": "d"}]));
}

#[test]
fn what_cannot_be_is_refused_at_the_start_with_what_to_do() {
    let (mute, fake) = (Scratch::with_model(), Fake::start(|_| Reply::texts(&["Hello."])));
    std::fs::remove_file(mute.join("chat_template.jinja")).unwrap();
    let flags = |flags: &[&str]| {
        let mut command = command();
        command.args(flags);
        command
    };
    let mut bad_env = with_service(&fake);
    bad_env.env("MINISGL_SHELL_TEMPERATURE", "warm");
    for (command, complaint) in [
        (command(), "give --model for a model here, or --url for a service"),
        (flags(&["--url", "nowhere"]), "give one like http://127.0.0.1:1919"),
        (flags(&["--url", "http://127.0.0.1:1"]), "check --url, and that the service runs"),
        (flags(&["--url", &fake.url(), "--top-p", "7"]), "top_p is 7"),
        (flags(&["--url", &fake.url(), "--chat-template-kwargs", "x"]), "no JSON object"),
        (bad_env, "the variable MINISGL_SHELL_TEMPERATURE: temperature can't be warm"),
        (with_model(&mute), "chat messages need a chat template"),
    ] {
        let output = talk(command, "Hi\n");
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stderr).contains(complaint), "{complaint}: {}", text(&output.stderr));
    }
    assert!(fake.asked().is_empty());
}

/// Starts a conversation in a terminal, up to its first prompt.
fn terminal(command: Command) -> PtySession {
    let mut terminal = spawn_command(command, Some(PATIENCE)).unwrap();
    terminal.exp_string("> ").unwrap();
    terminal
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let fake = Fake::start(|asked| match asked.number {
        0 => Reply::Hang(vec!["one ".to_owned(), "two ".to_owned()]),
        _ => Reply::texts(&["three"]),
    });
    let mut terminal = terminal(with_service(&fake));
    terminal.send_line("Count").unwrap();
    terminal.exp_string("two ").unwrap();
    terminal.send_control('c').unwrap();
    terminal.exp_string("(stopped)").unwrap();
    terminal.exp_string("> ").unwrap();
    terminal.send_line("Go on").unwrap();
    terminal.exp_string("three").unwrap();
    terminal.exp_string("> ").unwrap();
    // At the prompt it ends nothing either.
    terminal.send_control('c').unwrap();
    terminal.exp_string("Ctrl-D or /quit").unwrap();
    terminal.exp_string("> ").unwrap();
    terminal.send_control('d').unwrap();
    terminal.exp_eof().unwrap();
    assert_eq!(fake.asked()[1].body["messages"][1], json!({"role": "assistant", "content": "one two "}));
    // The service is left alone with the answer that nobody wants.
    let started = Instant::now();
    while fake.left() == 0 {
        assert!(started.elapsed() < Duration::from_millis(PATIENCE), "its reader is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_terminal_shows_the_answer_and_keeps_what_was_said_for_the_next_lines() {
    let scratch = Scratch::with_model();
    let mut chat = with_model(&scratch);
    chat.args(["--temperature", "0", "--max-tokens", "5"]);
    let mut terminal = terminal(chat);
    terminal.send_line("Hello").unwrap();
    terminal.exp_string("/set max_tokens allows for more").unwrap();
    terminal.exp_string("> ").unwrap();
    let saved = scratch.join("saved.json");
    terminal.send_line(&format!("/save {}", saved.display())).unwrap();
    terminal.exp_string("2 messages are in").unwrap();
    terminal.exp_string("> ").unwrap();
    // Arrows up: the line before that one.
    terminal.send("\x1b[A\x1b[A\r").unwrap();
    terminal.flush().unwrap();
    terminal.exp_string("/set max_tokens allows for more").unwrap();
    terminal.exp_string("> ").unwrap();
    terminal.send_line("/exit").unwrap();
    terminal.exp_eof().unwrap();
    let messages = &scratch.json("saved.json")["messages"];
    assert_eq!((&messages[0]["content"], &messages[1]["role"]), (&json!("Hello"), &json!("assistant")));
}

#[test]
fn between_answers_a_signal_ends_a_program_without_a_terminal() {
    let fake = Fake::start(|_| Reply::texts(&["Hello."]));
    let mut command = with_service(&fake);
    let mut chat =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut stdin = chat.stdin.take().unwrap();
    stdin.write_all(b"Hi\n").unwrap();
    let mut answer = String::new();
    BufReader::new(chat.stdout.take().unwrap()).read_line(&mut answer).unwrap();
    assert_eq!(answer, "Hello.\n");
    // Whatever moment between the answer and the wait for the next line it meets, it ends the program soon.
    let started = Instant::now();
    while chat.try_wait().unwrap().is_none() {
        let pid = chat.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        assert!(started.elapsed() < Duration::from_millis(PATIENCE), "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(chat.wait().unwrap().signal(), Some(2));
}
