//! Progress as it is shown: a bar, or a line a period, with the rate and the time left that the last looks give.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, HumanBytes, HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Progress, Unit};

/// The rate of tokens shown is that of the last so many seconds.
const RATE_WINDOW: Duration = Duration::from_secs(10);
/// The time left is reckoned by the pace of the last minute: work that goes on skips what was done before in no time.
const PACE_WINDOW: Duration = Duration::from_secs(60);

/// Gives the progress of now; called on the thread that writes.
pub type Source = Box<dyn Fn() -> Progress + Send>;

/// Where a bar is drawn.
pub type MakeTarget = Box<dyn Fn() -> ProgressDrawTarget + Send>;

/// Progress that is shown.
pub struct View {
    source: Source,
    /// Where there is a terminal.
    pub bar: Option<ProgressBar>,
    /// The looks of the last minute, the oldest first; never empty.
    looks: VecDeque<Look>,
}

/// Counts at a moment.
#[derive(Clone, Copy)]
struct Look {
    at: Instant,
    output_tokens: u64,
    done: u64,
}

impl View {
    pub fn new(source: Source, bar: Option<&MakeTarget>) -> Self {
        let first = source();
        let bar = bar.map(|target| ProgressBar::with_draw_target(first.total, target()));
        let look = Look { at: Instant::now(), output_tokens: first.output_tokens, done: first.done };
        View { source, bar, looks: VecDeque::from([look]) }
    }

    /// When progress was looked at last.
    pub fn seen(&self) -> Option<Instant> {
        self.looks.back().map(|look| look.at)
    }

    /// Looks again: draws the bar, or returns the line to be written.
    pub fn tick(&mut self) -> Option<String> {
        let now = Instant::now();
        let progress = (self.source)();
        while self.looks.len() > 1 && now - self.looks[1].at >= PACE_WINDOW {
            self.looks.pop_front();
        }
        self.looks.push_back(Look { at: now, output_tokens: progress.output_tokens, done: progress.done });
        let text = describe(&progress, self.rate(), self.left(&progress));
        let Some(bar) = &self.bar else { return Some(text + "\n") };
        let template = if progress.total.is_some() { "{bar:20} {wide_msg}" } else { "{spinner} {wide_msg}" };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_position(progress.done);
        bar.set_message(text);
        bar.tick();
        None
    }

    /// Tokens a second, lately.
    fn rate(&self) -> f64 {
        let Some(last) = self.looks.back() else { return 0.0 };
        let before = self.looks.iter().rev().find(|look| last.at - look.at >= RATE_WINDOW);
        let Some(before) = before.or(self.looks.front()) else { return 0.0 };
        let tokens = last.output_tokens.saturating_sub(before.output_tokens);
        tokens as f64 / (last.at - before.at).as_secs_f64().max(1e-3)
    }

    /// The time left, where it is known.
    fn left(&self, progress: &Progress) -> Option<Duration> {
        let (first, last) = (self.looks.front()?, self.looks.back()?);
        left(progress, first.done, last.at - first.at)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The time left at the pace from `before` to what is done now, where it is known.
fn left(progress: &Progress, before: u64, elapsed: Duration) -> Option<Duration> {
    let done = progress.done.checked_sub(before).filter(|done| *done > 0)?;
    let rest = progress.total?.saturating_sub(progress.done);
    Duration::try_from_secs_f64((elapsed.as_secs_f64() * rest as f64 / done as f64).ceil()).ok()
}

fn describe(progress: &Progress, rate: f64, left: Option<Duration>) -> String {
    let mut parts = Vec::new();
    parts.push(match (progress.total, progress.unit) {
        (Some(total), unit) => {
            let share = 100.0 * progress.done as f64 / total.max(1) as f64;
            match unit {
                Unit::Bytes => format!("{share:.1}% of {}", HumanBytes(total)),
                Unit::Tokens => format!("{share:.1}% of {} tokens", HumanCount(total)),
            }
        }
        (None, Unit::Bytes) => format!("{} done", HumanBytes(progress.done)),
        (None, Unit::Tokens) => format!("{} tokens done", HumanCount(progress.done)),
    });
    parts.push(format!("{} requests", HumanCount(progress.finished)));
    if progress.failed > 0 {
        parts.push(format!("{} failed", HumanCount(progress.failed)));
    }
    parts.push(format!("{} tok/s", HumanCount(rate.round() as u64)));
    parts.push(format!("{} running", progress.running));
    parts.push(format!("{} waiting", progress.waiting));
    if progress.pages > 0 {
        let share = 100.0 * f64::from(progress.pages_used) / f64::from(progress.pages);
        parts.push(format!("KV {share:.0}%"));
    }
    parts.extend(left.map(|left| format!("{} left", FormattedDuration(left))));
    match progress.label.as_str() {
        "" => parts.join(", "),
        label => format!("{label}: {}", parts.join(", ")),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn half_done() -> Progress {
        Progress {
            done: 512,
            total: Some(1024),
            finished: 1200,
            output_tokens: 5000,
            running: 256,
            waiting: 7,
            pages_used: 3,
            pages: 4,
            ..Progress::default()
        }
    }

    #[test]
    fn what_is_known_is_said_and_nothing_else() {
        let text = describe(&half_done(), 5210.4, Some(Duration::from_secs(130)));
        let all =
            "50.0% of 1.00 KiB, 1,200 requests, 5,210 tok/s, 256 running, 7 waiting, KV 75%, 00:02:10 left";
        assert_eq!(text, all);
        let unknown = Progress { total: None, failed: 3, pages: 0, label: "run 2".to_owned(), ..half_done() };
        let text = describe(&unknown, 0.0, None);
        assert_eq!(text, "run 2: 512 B done, 1,200 requests, 3 failed, 0 tok/s, 256 running, 7 waiting");
        let tokens = Progress { unit: Unit::Tokens, ..half_done() };
        assert!(describe(&tokens, 0.0, None).starts_with("50.0% of 1,024 tokens, "));
    }

    #[test]
    fn the_time_left_does_not_count_what_an_earlier_run_did() {
        let minute = Duration::from_secs(60);
        assert_eq!(left(&half_done(), 0, minute), Some(minute));
        assert_eq!(left(&half_done(), 256, minute), Some(2 * minute));
        assert_eq!(left(&half_done(), 512, minute), None, "nothing done yet, so no pace");
        assert_eq!(left(&Progress { total: None, ..half_done() }, 0, minute), None);
        let over = Progress { done: 2000, ..half_done() };
        assert_eq!(left(&over, 0, minute), Some(Duration::ZERO), "an input that grew smaller");
    }
}
