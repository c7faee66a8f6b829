//! A device that is a [`Formula`], on a clock of its own: what a policy gives on real ones, without one.
//!
//! ```text
//!   device    │ step n ──────────│ step n + 1 ─────────────│ step n + 2 ──
//!   host                      ^ step n + 1 is scheduled
//!             └─── as early as can be, or late (policy `latency`) ───┘
//! ```
//!
//! Steps run back to back; one is scheduled while the one before runs, with the requests that have come until then.

use std::collections::HashMap;

use minisgl_core::batch::Batch;
use minisgl_core::config::Limits;
use minisgl_core::formula::Formula;
use minisgl_core::late_launch::LateLaunch;
use minisgl_core::policy::Policy;
use minisgl_core::request::{Event, Request, Ticket};
use minisgl_core::sampling::SamplingParams;
use minisgl_core::scheduler::{Scheduler, Settings};

/// A request.
#[derive(Clone, Debug)]
pub struct Asked {
    pub at_ms: f64,
    pub prompt: Vec<u32>,
    pub output: u32,
}

/// What was seen of it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// From when it was asked for to its first token, in ms.
    pub first_ms: f64,
    /// Between its tokens.
    pub gaps_ms: Vec<f64>,
}

/// What was seen of all.
pub struct Run {
    pub requests: Vec<Seen>,
    pub end_ms: f64,
    /// Milliseconds, decode rows and tokens of prompts of every step.
    pub steps: Vec<(f64, u32, u32)>,
}

impl Run {
    /// The gap that so many of a hundred do not exceed.
    pub fn gap_ms(&self, percent: f64) -> f64 {
        percentile(self.requests.iter().flat_map(|seen| seen.gaps_ms.iter().copied()), percent)
    }

    /// Likewise of times to the first token.
    pub fn first_ms(&self, percent: f64) -> f64 {
        percentile(self.requests.iter().map(|seen| seen.first_ms), percent)
    }
}

fn percentile(values: impl Iterator<Item = f64>, percent: f64) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let rank = (values.len() as f64 * percent / 100.0).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

/// Runs requests, which come in the order of their times, to their ends. As many as run at once and `queued` more are in the
/// scheduler; the others wait before it. The host takes `launch_ms` to launch a step.
pub fn run(device: &Formula, launch_ms: f64, limits: &Limits, settings: Settings, asked: &[Asked]) -> Run {
    let mut scheduler =
        Scheduler::new(*limits, settings, device.costs, &[], None).expect("the host has memory");
    let mut seen = vec![Seen::default(); asked.len()];
    let (mut last_ms, mut of_ticket) = (vec![0.0; asked.len()], HashMap::<Ticket, usize>::new());
    let (mut batch, mut in_flight): (Batch, Option<(Batch, f64, f64)>) = (Batch::new(limits), None);
    let mut spare = vec![Batch::new(limits), Batch::new(limits)];
    let (mut steps, mut next, mut open, mut free_ms) = (Vec::new(), 0, 0, 0.0f64);
    let tokens = vec![1; limits.running as usize];
    let mut late = (settings.policy == Policy::Latency).then(|| LateLaunch::new(device.costs));
    loop {
        let now = match (&in_flight, asked.get(next)) {
            (Some((batch, start, _)), _) => {
                *start + late.as_ref().map_or(0.0, |late| f64::from(late.after_ms(batch.shape())))
            }
            (None, Some(first)) if scheduler.is_idle() => first.at_ms.max(free_ms),
            (None, _) => free_ms,
        };
        while let Some(request) = asked.get(next)
            && request.at_ms <= now
            && open < limits.running as usize
            && scheduler.waiting() < limits.queued as usize
        {
            let params =
                SamplingParams { max_tokens: request.output, ignore_eos: true, ..SamplingParams::default() };
            let submitted = scheduler.submit(Request::new(&request.prompt, params)).expect("it can run");
            of_ticket.insert(submitted.ticket, next);
            (next, open) = (next + 1, open + 1);
        }
        let waiting = asked[next..].iter().take_while(|request| request.at_ms <= now).count();
        scheduler.set_backlog(waiting as u32);
        let launched = scheduler.schedule(&mut batch).then(|| {
            let (start, ms) = (free_ms.max(now + launch_ms), device.step_ms(&batch));
            if let Some(late) = late.as_mut().filter(|_| in_flight.is_some()) {
                late.has_idled((start - free_ms) as f32);
            }
            steps.push((ms, batch.shape().decode_rows, batch.shape().prefill_tokens()));
            free_ms = start + ms;
            let next = spare.pop().expect("two steps are on their way at most");
            (std::mem::replace(&mut batch, next), start, start + ms)
        });
        let done = std::mem::replace(&mut in_flight, launched);
        let Some((of_step, start, end)) = done else {
            match in_flight.is_none() && next == asked.len() && scheduler.is_idle() {
                true => return Run { requests: seen, end_ms: free_ms, steps },
                false => continue,
            }
        };
        scheduler.complete(&of_step, &tokens, &[], &mut |event| match event {
            Event::PromptLogprobs { .. } | Event::Embedding { .. } => {}
            Event::Token { ticket, .. } => {
                let i = of_ticket[&ticket];
                match last_ms[i] {
                    0.0 => seen[i].first_ms = end - asked[i].at_ms,
                    last => seen[i].gaps_ms.push(end - last),
                }
                last_ms[i] = end;
            }
            Event::Finished { .. } => open -= 1,
        });
        scheduler.has_run(of_step.shape(), (end - start) as f32);
        if let Some(late) = &mut late {
            late.has_run(of_step.shape(), (end - start) as f32);
        }
        spare.push(of_step);
    }
}
