//! A job over a simulated engine: what fails, panics or is stopped at a given step.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use super::*;
use crate::SamplingParams;
use crate::lines::{self, Defaults};
use crate::openai::ModelName;
use crate::simulated::{Control, start};

/// A directory with an input of `lines` requests, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(lines: u32) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("minisgl-bulk-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        let line =
            |i: u32| format!("{{\"id\": {i}, \"prompt_token_ids\": [{i}], \"max_tokens\": {}}}\n", 1 + i % 5);
        fs::write(folder.join("in.jsonl"), (0..lines).map(line).collect::<String>()).unwrap();
        Folder(folder)
    }

    fn open(&self, output: &str) -> Bulk {
        let job = Job {
            input: self.0.join("in.jsonl").into(),
            output: self.0.join(output).into(),
            existing: Existing::Resume,
            defaults: Defaults { sampling: SamplingParams::default(), model: ModelName::new("simulated") },
            model: "simulated".to_owned(),
            checkpoint: None,
            rounding: Rounding::default(),
            max_line_bytes: 1000,
            tokens: false,
        };
        Bulk::open(job).unwrap()
    }

    /// The lines of good results; no line is torn.
    fn good(&self, output: &str) -> Vec<u64> {
        let text = decompressed(&self.0.join(output));
        assert!(text.is_empty() || text.ends_with('\n'));
        let outcomes = text.lines().map(|line| lines::read_result(line.as_bytes()).unwrap());
        let mut good: Vec<u64> = outcomes.filter(|o| o.good).map(|o| o.origin.unwrap().line).collect();
        good.sort_unstable();
        good
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn decompressed(path: &Path) -> String {
    use std::io::Read;
    let bytes = fs::read(path).unwrap();
    let mut text = String::new();
    match path.extension().is_some_and(|extension| extension == "gz") {
        true if bytes.is_empty() => Ok(0),
        true => flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_string(&mut text),
        false => bytes.as_slice().read_to_string(&mut text),
    }
    .unwrap();
    text
}

#[test]
fn how_long_requests_are_is_told_by_the_first_lines() {
    let folder = Folder::new(100);
    let bytes: usize =
        fs::read_to_string(folder.0.join("in.jsonl")).unwrap().lines().take(64).map(str::len).sum();
    let drawn = SamplingParams::default().max_tokens;
    assert_eq!(folder.open("out.jsonl").usual_tokens(), Some((bytes / 64 / 4) as u32 + drawn));
    assert_eq!(Folder::new(0).open("out.jsonl").usual_tokens(), None);
}

#[test]
fn what_ended_before_an_engine_failed_or_panicked_is_kept_and_another_engine_does_the_rest() {
    for output in ["out.jsonl", "out.jsonl.gz"] {
        for step in [0, 3, 10] {
            for control in [
                Control { fails_at: Some(step), ..Control::default() },
                Control { panics_at: Some(step), ..Control::default() },
            ] {
                let folder = Folder::new(40);
                let (front, _) = start(control);
                let error = folder.open(output).run_on(front.handle()).unwrap_err();
                assert!(matches!(error, BulkError::Engine(_)), "{error}");
                assert!(error.to_string().contains("--resume"), "{error}");
                let kept = folder.good(output).len() as u64;
                assert!(kept < 40 && (step < 5 || kept > 0), "{kept}");

                let (front, _) = start(Control::default());
                let tally = folder.open(output).run_on(front.handle()).unwrap();
                assert_eq!((tally.skipped, tally.finished, tally.failed), (kept, 40 - kept, 0));
                assert_eq!(folder.good(output), (1..=40).collect::<Vec<u64>>());
            }
        }
    }
}

#[test]
fn a_job_that_is_stopped_has_written_what_it_counted_and_knows_what_is_left() {
    for output in ["out.jsonl", "out.jsonl.gz"] {
        let folder = Folder::new(400);
        // The last one does not end while the job runs.
        let endless = "{\"id\": 400, \"prompt_token_ids\": [7], \"max_tokens\": 90000}\n";
        let mut input = fs::File::options().append(true).open(folder.0.join("in.jsonl")).unwrap();
        input.write_all(endless.as_bytes()).unwrap();
        let (front, _) = start(Control { step_time: Duration::from_millis(1), ..Control::default() });
        let bulk = folder.open(output);
        let job = bulk.handle();
        assert!(job.resumable());
        let (left, ended) = thread::scope(|scope| {
            let run = scope.spawn(|| bulk.run_on(front.handle()));
            while job.tally().finished < 40 {
                thread::sleep(Duration::from_millis(1));
            }
            (job.stop().unwrap(), run.join().unwrap())
        });
        assert!(matches!(ended, Err(BulkError::Stopped)));
        let good = folder.good(output).len() as u64;
        assert!((40..=400).contains(&good), "{good}");
        assert_eq!((job.tally().finished, left), (good, Left::Exactly(401 - good)));
        // Nothing is written behind it, and another job may go on though this one's handle is there.
        drop(folder.open(output));
        assert_eq!(job.stop().unwrap(), left);
        assert_eq!(folder.good(output).len() as u64, good);
    }
}

#[test]
fn a_job_stopped_before_it_runs_changes_nothing() {
    let folder = Folder::new(3);
    let (front, _) = start(Control::default());
    let bulk = folder.open("out.jsonl");
    assert_eq!(bulk.handle().stop().unwrap(), Left::Exactly(3));
    assert!(matches!(bulk.run_on(front.handle()), Err(BulkError::Stopped)));
    assert_eq!(fs::read(folder.0.join("out.jsonl")).unwrap(), b"");
    assert!(!folder.0.join("out.jsonl.run.json").exists());
    drop(folder.open("out.jsonl"));
}
