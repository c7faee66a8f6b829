//! When the next step is launched where latency counts: shortly before the one in flight ends, so that whoever comes until then
//! is in it, and waits for one step and not for two.
//!
//! ```text
//!   device   │ step N ─────────────────────│ step N + 1 ────────
//!   host     │ requests come in …   │launch│
//!            │<──── expected ───────┼─lead>│
//! ```
//!
//! How long the step in flight takes is told by the last step of decode rows alone and by what steps cost. The lead is what
//! launching takes and what that is wrong by, and is found by trying: it grows when the device was found to have idled before a
//! step, and shrinks a little while it has not. So the device idles before a step in a hundred, for a little.

use crate::batch::StepShape;
use crate::costs::StepCosts;

/// The lead at first, at least, and at most: one that a slow host had made endless would never be short again.
const LEAD_MS: f32 = 0.3;
const LEAD_MIN_MS: f32 = 0.02;
const LEAD_MAX_MS: f32 = 10.0;
/// Between two steps that were launched in time the device idles for less.
const IDLE_MS: f32 = 0.008;
/// What the lead grows by, and shrinks by: as much in a hundred steps as it grows in one.
const GROWTH: f32 = 1.25;
const SHRINKAGE: f32 = 0.9978;

/// See the module.
#[derive(Clone, Debug)]
pub struct LateLaunch {
    costs: StepCosts,
    lead_ms: f32,
    /// The last step of decode rows alone: its rows, and how long it took.
    decode: Option<(u32, f32)>,
}

impl LateLaunch {
    /// For steps that cost so much.
    pub fn new(costs: StepCosts) -> Self {
        LateLaunch { costs, lead_ms: LEAD_MS, decode: None }
    }

    /// How long after the beginning of a step the next one is to be launched, in milliseconds; 0: at once.
    pub fn after_ms(&self, in_flight: StepShape) -> f32 {
        // Not a number where a device's clock says nonsense: then at once, too.
        (self.expected_ms(in_flight) - self.lead_ms).max(0.0)
    }

    /// How long a step takes, at least.
    fn expected_ms(&self, shape: StepShape) -> f32 {
        let StepCosts { decode, mixed, .. } = self.costs;
        let Some((rows, ms)) = self.decode else { return 0.0 };
        if shape.is_decode() {
            // More rows take longer, which the lead need not know.
            return ms * (decode.at(shape.decode_rows) / decode.at(rows)).min(1.0);
        }
        let share = shape.decode_rows as f32 / rows as f32;
        let attention_ms = (ms - decode.at(rows)).max(0.0) * share.min(1.0);
        mixed.at(shape.tokens) + attention_ms
    }

    /// A step has run, in so many milliseconds on the device.
    pub fn has_run(&mut self, shape: StepShape, ms: f32) {
        if shape.is_decode() {
            self.decode = Some((shape.decode_rows, ms));
        }
    }

    /// So long the device idled between two steps, the second of which was launched while the first was in flight.
    pub fn has_idled(&mut self, ms: f32) {
        let change = if ms > IDLE_MS { GROWTH } else { SHRINKAGE };
        self.lead_ms = (self.lead_ms * change).clamp(LEAD_MIN_MS, LEAD_MAX_MS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::costs::Line;

    const COSTS: StepCosts = StepCosts {
        decode: Line { fixed_ms: 0.5, token_ms: 0.01 },
        mixed: Line { fixed_ms: 1.0, token_ms: 0.002 },
        attention: Line { fixed_ms: 0.1, token_ms: 0.0 },
    };

    #[test]
    fn the_next_step_is_launched_before_the_one_in_flight_is_expected_to_end() {
        let mut late = LateLaunch::new(COSTS);
        let (few, many) = (StepShape::decode(10), StepShape::decode(100));
        assert_eq!(late.after_ms(many), 0.0, "nobody knows how long the first step takes");
        late.has_run(many, 4.0);
        assert_eq!(late.after_ms(many), 4.0 - LEAD_MS);
        assert!(late.after_ms(few) < 2.0, "fewer rows take less: {}", late.after_ms(few));
        assert_eq!(late.after_ms(StepShape::decode(200)), late.after_ms(many), "more may take no longer");
        // 2.5 ms of attention beside the products.
        let mixed = StepShape { prefill_rows: 1, tokens: 600, ..many };
        assert!((late.after_ms(mixed) - (2.2 + 2.5 - LEAD_MS)).abs() < 1e-3, "{}", late.after_ms(mixed));
        // More rows read no more than is known to be read.
        let more = StepShape { prefill_rows: 1, tokens: 600, ..StepShape::decode(200) };
        assert_eq!(late.after_ms(more), late.after_ms(mixed));
        late.has_run(many, f32::NAN);
        assert_eq!(late.after_ms(many), 0.0);
    }

    #[test]
    fn after_a_time_in_which_every_step_was_late_requests_are_let_come_in_again() {
        let mut late = LateLaunch::new(COSTS);
        let shape = StepShape::decode(100);
        late.has_run(shape, 4.0);
        (0..1000).for_each(|_| late.has_idled(1.0));
        assert_eq!(late.after_ms(shape), 0.0, "no lead is long enough");
        // As long as two steps on end lie apart.
        (0..4000).for_each(|_| late.has_idled(0.005));
        assert!(late.after_ms(shape) > 0.0);
    }

    #[test]
    fn the_lead_becomes_what_launching_takes() {
        let mut late = LateLaunch::new(COSTS);
        let shape = StepShape::decode(100);
        for takes_ms in [0.1, 1.0, 0.05] {
            let mut idle = 0;
            for step in 0..4000 {
                late.has_run(shape, 4.0);
                let idle_ms = (takes_ms - (4.0 - late.after_ms(shape))).max(0.0);
                idle += u32::from(step >= 2000 && idle_ms > IDLE_MS);
                late.has_idled(idle_ms);
            }
            let lead_ms = 4.0 - late.after_ms(shape);
            assert!((0.8..1.3).contains(&(lead_ms / takes_ms)), "{lead_ms} for {takes_ms}");
            assert!(idle <= 2000 / 100 + 1, "{idle} steps of 2000 began late");
        }
    }
}
