//! What `generate --resume` promises: after any end of a run, each line of the input comes to one good result.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use common::generate::{
    by_line, command, command_on, command_within, generate, is_good, lines, read, request, requests, stderr,
    succeed, write,
};
use common::{Scratch, fixture};
use serde_json::json;

#[test]
fn a_result_belongs_to_its_line_not_to_its_id() {
    let scratch = Scratch::new();
    let same =
        |tokens: u32| json!({"id": "same", "prompt_token_ids": [tokens], "max_tokens": 3}).to_string() + "\n";
    scratch.write("in.jsonl", same(1) + &same(2));
    succeed(&scratch, &[]);
    let out = scratch.join("out.jsonl");
    let whole = by_line(&out);
    assert_eq!(whole.len(), 2);
    assert!(whole.values().all(is_good));

    // The second holder of the id ended, the first was killed.
    let second = lines(&out).iter().find(|result| result["line"] == 2).unwrap().to_string() + "\n";
    fs::write(&out, second).unwrap();
    let output = succeed(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("1 finished, 0 failed, 1 skipped"), "{}", stderr(&output));
    assert_eq!(by_line(&out), whole);
}

#[test]
fn of_two_results_of_a_line_the_later_one_stays() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(3, 2));
    succeed(&scratch, &[]);
    let out = scratch.join("out.jsonl");
    // As where two outputs are put together.
    let mut later = by_line(&out)[&2].clone();
    later["text"] = json!("later");
    fs::write(&out, read(&out) + &later.to_string() + "\n").unwrap();
    let output = succeed(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("0 finished, 0 failed, 3 skipped"), "{}", stderr(&output));
    assert_eq!(lines(&out).len(), 3);
    assert_eq!(by_line(&out)[&2], later);
}

#[test]
fn lines_that_failed_run_again_and_their_new_results_take_the_place_of_the_errors() {
    let scratch = Scratch::new();
    let request = |i: usize| {
        json!({"id": i, "prompt_token_ids": vec![1; 4 + 8 * i], "max_tokens": 2}).to_string() + "\n"
    };
    scratch.write("in.jsonl", (0..20).map(request).collect::<String>());
    let out = scratch.join("out.jsonl");
    let within = |sequence: u32, flags: &[&str]| {
        let mut command = command_within(&scratch, sequence);
        command
            .arg("--input")
            .arg(scratch.join("in.jsonl"))
            .arg("--output")
            .arg(&out)
            .args(flags)
            .output()
            .unwrap()
    };
    let short = within(48, &[]);
    assert_eq!(short.status.code(), Some(1), "{}", stderr(&short));
    let failed = by_line(&out).values().filter(|result| !is_good(result)).count();
    assert!(failed > 10, "{failed}");

    // As long as a line fails, the status says so.
    let still_short = within(64, &["--resume"]);
    assert_eq!(still_short.status.code(), Some(1));
    assert_eq!(by_line(&out).len(), 20);

    let more = succeed(&scratch, &["--resume"]);
    assert!(!stderr(&more).contains("20 skipped"), "{}", stderr(&more));
    let results = by_line(&out);
    assert_eq!(results.len(), 20);
    assert!(results.values().all(is_good));
}

#[test]
fn resuming_again_and_again_leaves_one_error_line_for_each_bad_line() {
    let scratch = Scratch::new();
    let bad = [
        "no json",
        "[]",
        "{}",
        r#"{"id": 1}"#,
        r#"{"id": 2, "prompt_token_ids": []}"#,
        r#"{"id": 3, "promt": 1}"#,
    ];
    scratch.write("in.jsonl", request(0, 2) + &bad.join("\n"));
    let out = scratch.join("out.jsonl");
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    for _ in 0..3 {
        let output = generate(&scratch, &["--resume"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("0 finished, 6 failed, 1 skipped"), "{}", stderr(&output));
        assert_eq!(by_line(&out).len(), 7);
    }
}

#[test]
fn a_corrected_line_runs_and_lines_may_be_added() {
    let scratch = Scratch::new();
    scratch.write(
        "in.jsonl",
        request(0, 2) + "{\"id\": 1, \"prompt_token_ids\": [1], \"max_token\": 2}\n" + &request(2, 2),
    );
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    scratch.write("in.jsonl", request(0, 2) + &request(1, 2) + &request(2, 2) + &request(3, 2));
    let output = succeed(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("2 finished, 0 failed, 2 skipped"), "{}", stderr(&output));
    let results = by_line(&scratch.join("out.jsonl"));
    assert_eq!(results.len(), 4);
    assert!(results.values().all(is_good));
}

#[test]
fn batch_lines_are_resumed_as_native_ones_are() {
    let scratch = Scratch::with_text();
    let line = |id: u32, body: &str| {
        format!(
            "{{\"custom_id\": \"{id}\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {body}}}\n"
        )
    };
    let good = r#"{"prompt": "a", "max_tokens": 2}"#;
    scratch.write("in.jsonl", line(1, good) + &line(2, r#"{"prompt": "a", "n": 0}"#) + &line(1, good));
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    let still = generate(&scratch, &["--resume"]);
    assert!(stderr(&still).contains("0 finished, 1 failed, 2 skipped"), "{}", stderr(&still));
    assert_eq!(lines(&scratch.join("out.jsonl")).len(), 3);
    scratch.write("in.jsonl", line(1, good) + &line(2, good) + &line(1, good));
    succeed(&scratch, &["--resume"]);
    let results = lines(&scratch.join("out.jsonl"));
    assert!(results.len() == 3 && results.iter().all(|result| result["response"]["status_code"] == 200));
}

#[test]
fn line_ends_and_a_bom_do_not_make_another_input() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(3, 2));
    succeed(&scratch, &[]);
    scratch.write("in.jsonl", format!("\u{feff}{}", requests(3, 2).replace('\n', "\r\n")));
    let output = succeed(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("0 finished, 0 failed, 3 skipped"), "{}", stderr(&output));
}

#[test]
fn a_torn_line_is_cut_and_what_is_whole_stays_as_it_is() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(12, 6));
    let out = scratch.join("out.jsonl");
    succeed(&scratch, &[]);
    let whole = by_line(&out);

    let text = fs::read_to_string(&out).unwrap();
    let kept: usize = text.split_inclusive('\n').take(5).map(str::len).sum();
    fs::write(&out, &text[..kept + 9]).unwrap();
    let output = succeed(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("7 finished, 0 failed, 5 skipped"), "{}", stderr(&output));
    assert_eq!(fs::read_to_string(&out).unwrap()[..kept], text[..kept]);
    assert_eq!(by_line(&out), whole);

    let output = succeed(&scratch, &["--resume"]);
    assert!(stderr(&output).contains("0 finished, 0 failed, 12 skipped"), "{}", stderr(&output));
}

#[test]
fn a_compressed_output_cut_off_anywhere_is_completed() {
    for name in ["out.jsonl.gz", "out.jsonl.zst"] {
        let scratch = Scratch::new();
        let out = scratch.join(name);
        let resume = |count: u32| {
            scratch.write("in.jsonl", requests(count, 3));
            let output = command_on(&scratch, "in.jsonl", name).arg("--resume").output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
        };
        // Three members or more, of which the last is cut off, wherever that is.
        [3, 6, 9].into_iter().for_each(resume);
        let whole = by_line(&out);
        let bytes = fs::read(&out).unwrap();
        for cut in [0, 1, 9, bytes.len() / 2, bytes.len() * 3 / 4, bytes.len() - 1] {
            fs::write(&out, &bytes[..cut]).unwrap();
            resume(9);
            assert_eq!(by_line(&out), whole, "{name} cut at {cut}");
        }
    }
}

#[test]
fn an_output_that_somebody_compressed_anew_keeps_the_whole_lines_of_a_cut_off_member() {
    for name in ["out.jsonl.gz", "out.jsonl.zst"] {
        let scratch = Scratch::new();
        let out = scratch.join(name);
        scratch.write("in.jsonl", requests(300, 3));
        let run = |flags: &[&str]| command_on(&scratch, "in.jsonl", name).args(flags).output().unwrap();
        assert!(run(&[]).status.success());
        let whole = by_line(&out);
        write(&out, &read(&out));
        let bytes = fs::read(&out).unwrap();
        fs::write(&out, &bytes[..bytes.len() - 1]).unwrap();
        let output = run(&["--resume"]);
        assert!(output.status.success(), "{}", stderr(&output));
        let skipped = stderr(&output);
        let skipped: u64 =
            skipped.split(" skipped").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap();
        assert!(name.ends_with("zst") || skipped > 200, "{skipped}");
        assert_eq!(by_line(&out), whole);
    }
}

#[test]
fn other_sampling_rounding_another_model_and_other_lines_are_refused_by_name() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(6, 2) + "bad\n");
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    let before = fs::read(scratch.join("out.jsonl")).unwrap();
    let refused = |flags: &[&str], what: &str| {
        let output = generate(&scratch, flags);
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        assert!(error.contains(what) && error.contains("--resume-anyway"), "{error}");
        assert_eq!(fs::read(scratch.join("out.jsonl")).unwrap(), before);
    };
    refused(&["--resume", "--temperature", "0.7"], "--temperature was 0, is 0.7");
    refused(&["--resume", "--top-k", "5", "--seed", "9"], "--top-k was 0, is 5; --seed was 0, is 9");
    refused(&["--resume", "--max-tokens", "7"], "--max-tokens was 128, is 7");
    refused(&["--resume", "--ignore-eos"], "--ignore-eos was false, is true");
    refused(&["--resume", "--kv-dtype", "fp8"], "--kv-dtype was auto, is fp8");
    refused(
        &["--resume", "--quantize", "fp8", "--plain-inputs"],
        "--quantize was not given, is fp8; --plain-inputs was false, is true",
    );

    scratch.copy("tiny-untied");
    refused(&["--resume"], "--model was ");
    fs::remove_file(scratch.join("config.json")).unwrap();

    let changed = requests(6, 2).replacen("\"id\":3", "\"id\":33", 1);
    scratch.write("in.jsonl", changed);
    refused(&["--resume"], "line 4 of the input is not the line that the result is of");
    scratch.write("in.jsonl", requests(4, 2));
    refused(&["--resume"], "line 5 of the input is not the line that the result is of, nor are 1 others");

    scratch.write("in.jsonl", requests(6, 2));
    fs::write(scratch.join("out.jsonl.run.json"), "{").unwrap();
    refused(&["--resume"], "out.jsonl.run.json can't be read");
    fs::remove_file(scratch.join("out.jsonl.run.json")).unwrap();
    refused(&["--resume"], "out.jsonl.run.json is missing");
}

#[test]
fn resuming_anyway_keeps_what_is_of_the_same_lines_and_runs_the_others() {
    let scratch = Scratch::new();
    let out = scratch.join("out.jsonl");
    scratch.write("in.jsonl", requests(6, 2));
    succeed(&scratch, &[]);
    let before = by_line(&out);
    scratch.write("in.jsonl", request(0, 2) + &request(77, 2) + &request(2, 2));
    let output = succeed(&scratch, &["--resume-anyway", "--top-k", "3"]);
    assert!(stderr(&output).contains("1 finished, 0 failed, 2 skipped"), "{}", stderr(&output));
    let after = by_line(&out);
    assert_eq!(after.len(), 3);
    assert_eq!((&after[&1], &after[&3]), (&before[&1], &before[&3]));
    assert_eq!(after[&2]["id"], 77);
    // From now on these are the output's settings.
    succeed(&scratch, &["--resume", "--top-k", "3"]);
}

#[test]
fn a_checkpoint_that_moved_is_the_same_model() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(2, 2));
    succeed(&scratch, &[]);
    let moved = Scratch::new();
    moved.copy("tiny-tied");
    let output = command(&moved)
        .arg("--input")
        .arg(scratch.join("in.jsonl"))
        .arg("--output")
        .arg(scratch.join("out.jsonl"))
        .arg("--resume")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(fixture("tiny-tied").exists() && stderr(&output).contains("2 skipped"), "{}", stderr(&output));
}

#[test]
fn an_input_that_is_read_once_is_checked_line_by_line() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(4, 2) + "bad\n");
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    let resume = |input: &str, flags: &[&str]| {
        let file = fs::File::open(scratch.write("piped.jsonl", input)).unwrap();
        let mut command = command(&scratch);
        command.arg("--input").arg("-").arg("--output").arg(scratch.join("out.jsonl"));
        command.args(flags).stdin(file).output().unwrap()
    };
    let other = resume(&(requests(2, 2) + &request(9, 2)), &["--resume"]);
    assert_eq!(other.status.code(), Some(1));
    assert!(stderr(&other).contains("line 3 of the input is not the one"), "{}", stderr(&other));
    let shorter = resume(&requests(2, 2), &["--resume"]);
    assert_eq!(shorter.status.code(), Some(1));
    assert!(stderr(&shorter).contains("line 4 of the input is not the one"), "{}", stderr(&shorter));
    let corrected = resume(&requests(5, 2), &["--resume"]);
    assert!(corrected.status.success(), "{}", stderr(&corrected));
    let results = by_line(&scratch.join("out.jsonl"));
    assert_eq!(results.len(), 5);
    assert!(results.values().all(is_good));
}

#[test]
fn a_file_of_something_else_is_left_alone() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", request(0, 2));
    let out = scratch.join("out.jsonl");
    succeed(&scratch, &[]);
    let good = read(&out);
    let of_old = "{\"id\":1,\"token_ids\":[1],\"text\":null}\n";
    for (content, line) in [
        ("my notes\n".to_owned(), 1),
        ("my notes".to_owned(), 1),
        (format!("{good}my notes\n"), 2),
        (format!("{good}my notes"), 2),
        (format!("{good}{of_old}"), 2),
        (format!("{good}\n{good}"), 2),
    ] {
        fs::write(&out, &content).unwrap();
        for flag in ["--resume", "--resume-anyway"] {
            let output = generate(&scratch, &[flag]);
            assert_eq!(output.status.code(), Some(1), "{content}");
            let error = stderr(&output);
            assert!(error.contains(&format!("line {line} of")) && error.contains("--overwrite"), "{error}");
            assert_eq!(fs::read_to_string(&out).unwrap(), content);
        }
    }
}

#[test]
fn a_copy_that_a_kill_left_half_written_is_thrown_away() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(3, 2) + "bad\n");
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    let whole = by_line(&scratch.join("out.jsonl"));
    let left = scratch.write("out.jsonl.run.partial", "{\"id\":0,\"line\":1,\"finger");
    assert_eq!(generate(&scratch, &["--resume"]).status.code(), Some(1));
    assert_eq!(by_line(&scratch.join("out.jsonl")), whole);
    assert!(!left.exists());
}

#[test]
fn an_output_that_is_missing_or_empty_is_begun() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(2, 2));
    succeed(&scratch, &["--resume"]);
    fs::write(scratch.join("out.jsonl"), "").unwrap();
    // Whatever made the results that are gone.
    succeed(&scratch, &["--resume", "--top-k", "3"]);
    assert_eq!(by_line(&scratch.join("out.jsonl")).len(), 2);
}

#[test]
fn replacing_an_output_keeps_its_mode_and_the_link_that_leads_to_it() {
    let scratch = Scratch::new();
    scratch.write("in.jsonl", requests(2, 2) + "bad\n");
    let real = scratch.write("real.jsonl", "");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
    symlink("real.jsonl", scratch.join("out.jsonl")).unwrap();
    assert_eq!(generate(&scratch, &[]).status.code(), Some(1));
    assert_eq!(generate(&scratch, &["--resume"]).status.code(), Some(1));
    assert!(fs::symlink_metadata(scratch.join("out.jsonl")).unwrap().is_symlink());
    assert_eq!(fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
    assert_eq!(by_line(&real).len(), 3);
    assert!(!scratch.join("real.jsonl.run.partial").exists());
}

#[test]
fn a_full_disk_leaves_whole_lines_and_status_1_and_resuming_completes() {
    for name in ["out.jsonl", "out.jsonl.gz"] {
        let scratch = Scratch::new();
        scratch.write("in.jsonl", requests(200, 40));
        // A limit on the size of files stands for a disk that is full; it is met in the middle of a line.
        let limited = command_on(&scratch, "in.jsonl", name);
        let mut shell = std::process::Command::new("bash");
        shell
            .args(["-c", "ulimit -f 5; exec \"$0\" \"$@\""])
            .arg(limited.get_program())
            .args(limited.get_args());
        let output = shell.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        let error = stderr(&output);
        assert!(error.contains(name) && error.contains("--resume"), "{error}");
        let out = scratch.join(name);
        let kept = by_line(&out);
        assert!(kept.len() < 200 && kept.values().all(is_good));

        let output = command_on(&scratch, "in.jsonl", name).arg("--resume").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(by_line(&out).len(), 200);
    }
}
