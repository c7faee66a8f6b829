//! Random requests to measure an engine with: prompts of token ids, and how many tokens to draw for each.
//!
//! ```text
//!            request 0          request 1                      request n-1
//!   pcg      len ids… output    len ids… output     …          len ids… output
//!   minisgl  len ids…           len ids…            …          len ids…          output output … output
//! ```
//!
//! The picture is the order in which numbers are drawn. Lengths and ids are uniform over closed ranges.
//!
//! Invariant: the lengths depend on the seed, the number of requests and the two ranges alone, never on the
//! vocabulary, so that every model does the same work. An id outside a small vocabulary is taken modulo its size.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use rand_core::{Rng as _, SeedableRng as _};
use rand_mt::Mt;
use rand_pcg::Pcg64Mcg;

/// The largest id drawn, where the vocabulary has it.
const ID_MAX: u32 = 10_000;

/// Where the random numbers come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// A permuted congruential generator, seeded by `rand_core`'s expansion of the seed.
    #[default]
    Pcg,
    /// What CPython's `random` gives after `random.seed(seed)`: the workload of mini-sglang's offline benchmark,
    /// number for number, on which published figures rest.
    Minisgl,
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pcg" => Ok(Source::Pcg),
            "minisgl" => Ok(Source::Minisgl),
            _ => Err(format!("{text} is no workload; use pcg or minisgl")),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Source::Pcg => "pcg",
            Source::Minisgl => "minisgl",
        })
    }
}

/// A closed range of lengths, written `100..1024`, or `64` for one length alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lengths(RangeInclusive<u32>);

impl Lengths {
    /// Of prompts and of outputs alike in mini-sglang's benchmark.
    pub const BENCHMARK: Lengths = Lengths(100..=1024);

    /// Lengths from `first` to `last`, both included.
    ///
    /// # Errors
    /// `first` is 0 or above `last`.
    pub fn new(first: u32, last: u32) -> Result<Self, String> {
        match first {
            0 => Err(format!("{first}..{last} begins at 0; the shortest length is 1")),
            _ if first > last => Err(format!("{first}..{last} is empty; write the shorter length first")),
            _ => Ok(Lengths(first..=last)),
        }
    }

    /// Lengths from 1 to `last`, or 1 alone where that is less.
    pub fn up_to(last: u32) -> Self {
        Lengths(1..=last.max(1))
    }

    /// The mean of all.
    pub fn mean(&self) -> u32 {
        self.0.start() + (self.0.end() - self.0.start()) / 2
    }

    /// The longest one.
    pub fn longest(&self) -> u32 {
        *self.0.end()
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once("..").unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => Lengths::new(first, last),
            _ => Err(format!("{text} is no range of lengths; write 100..1024, or 64 for one length alone")),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.0.start(), self.0.end())
    }
}

/// What to draw.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Where the random numbers come from.
    pub source: Source,
    /// The same seed gives the same requests.
    pub seed: u64,
    /// How many requests.
    pub requests: usize,
    /// Prompt lengths.
    pub input: Lengths,
    /// Output lengths.
    pub output: Lengths,
}

/// One request of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Token ids, each below the vocabulary's size.
    pub prompt: Vec<u32>,
    /// Tokens to draw, end-of-sequence tokens ignored.
    pub output_tokens: u32,
}

impl Workload {
    /// Draws the requests for a model that tells `vocab` tokens apart.
    pub fn draw(&self, vocab: u32) -> Vec<Item> {
        match self.source {
            Source::Pcg => self.draw_pcg(vocab),
            Source::Minisgl => self.draw_minisgl(vocab),
        }
    }

    /// Bytes, about, that its requests and their outputs take.
    pub fn bytes(&self) -> u64 {
        const BESIDE: u64 = 512;
        let middle = |range: &RangeInclusive<u32>| (u64::from(*range.start()) + u64::from(*range.end())) / 2;
        (self.requests as u64).saturating_mul(4 * (middle(&self.input.0) + middle(&self.output.0)) + BESIDE)
    }

    fn draw_pcg(&self, vocab: u32) -> Vec<Item> {
        let mut generator = Pcg64Mcg::seed_from_u64(self.seed);
        let mut word = || generator.next_u32();
        let mut item = || {
            let prompt = self.prompt(vocab, &mut word);
            Item { prompt, output_tokens: between(&self.output.0, &mut word) }
        };
        (0..self.requests).map(|_| item()).collect()
    }

    fn draw_minisgl(&self, vocab: u32) -> Vec<Item> {
        let mut generator = Mt::new_with_key(python_key(self.seed));
        let mut word = || generator.next_u32();
        let prompts: Vec<_> = (0..self.requests).map(|_| self.prompt(vocab, &mut word)).collect();
        let item = |prompt| Item { prompt, output_tokens: between(&self.output.0, &mut word) };
        prompts.into_iter().map(item).collect()
    }

    fn prompt(&self, vocab: u32, word: &mut impl FnMut() -> u32) -> Vec<u32> {
        let len = between(&self.input.0, word);
        (0..len).map(|_| between(&(0..=ID_MAX), word) % vocab).collect()
    }
}

/// A uniform integer of a range (of fewer than 2^32 values), as CPython's `randint` makes it of 32-bit words: as many
/// high bits as the count of values needs, drawn again while they lie beyond it.
fn between(range: &RangeInclusive<u32>, word: &mut impl FnMut() -> u32) -> u32 {
    let count = range.end() - range.start() + 1;
    loop {
        let drawn = word() >> count.leading_zeros();
        if drawn < count {
            return range.start() + drawn;
        }
    }
}

/// The key that CPython makes of an integer seed: its 32-bit words, the lowest first, none above the highest set bit.
fn python_key(seed: u64) -> impl Iterator<Item = u32> + Clone {
    let words = if seed >> 32 == 0 { 1 } else { 2 };
    [seed as u32, (seed >> 32) as u32].into_iter().take(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(source: Source, seed: u64, requests: usize) -> Workload {
        let lengths = Lengths::new(100, 1024).unwrap();
        Workload { source, seed, requests, input: lengths.clone(), output: lengths }
    }

    fn totals(items: &[Item]) -> (usize, u32) {
        (items.iter().map(|i| i.prompt.len()).sum(), items.iter().map(|i| i.output_tokens).sum())
    }

    /// Expected values from CPython 3.11:
    /// `random.seed(0); p = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)];
    /// o = [random.randint(100, 1024) for _ in range(256)]`.
    #[test]
    fn the_minisgl_workload_is_cpythons_number_for_number() {
        let items = workload(Source::Minisgl, 0, 256).draw(151_936);
        assert_eq!(totals(&items), (142_827, 133_966));
        assert_eq!(items[0].prompt[..8], [6311, 6890, 663, 4242, 8376, 7961, 6634, 4969]);
        assert_eq!(items[1].prompt[..4], [8864, 3296, 4860, 7238]);
        assert!(items[255].prompt.ends_with(&[1157, 6642, 9046, 1958]));
        let outputs: Vec<_> = items.iter().map(|item| item.output_tokens).collect();
        assert_eq!(outputs[..4], [845, 312, 607, 843]);
    }

    /// Expected values as above, with `random.seed(12345678901)`.
    #[test]
    fn a_seed_of_more_than_32_bits_is_cpythons_too() {
        let items = workload(Source::Minisgl, 12_345_678_901, 2).draw(151_936);
        assert_eq!([items[0].prompt.len(), items[1].prompt.len()], [710, 164]);
        assert_eq!(items[0].prompt[..3], [5373, 6288, 5802]);
        assert_eq!(items[1].prompt[..3], [3634, 1418, 322]);
    }

    #[test]
    fn lengths_do_not_depend_on_the_vocabulary_and_ids_stay_below_it() {
        for source in [Source::Pcg, Source::Minisgl] {
            let large = workload(source, 7, 20).draw(151_936);
            let small = workload(source, 7, 20).draw(97);
            for (large, small) in large.iter().zip(&small) {
                assert_eq!(large.prompt.len(), small.prompt.len());
                assert_eq!(large.output_tokens, small.output_tokens);
                assert!(large.prompt.iter().zip(&small.prompt).all(|(a, b)| a % 97 == *b));
            }
        }
    }

    #[test]
    fn a_seed_gives_the_same_requests_again_and_another_seed_gives_others() {
        for source in [Source::Pcg, Source::Minisgl] {
            assert_eq!(workload(source, 3, 5).draw(1000), workload(source, 3, 5).draw(1000));
            assert_ne!(workload(source, 3, 5).draw(1000), workload(source, 4, 5).draw(1000));
        }
    }

    #[test]
    fn every_length_of_the_range_is_drawn_about_equally_often() {
        let mut workload = workload(Source::Pcg, 0, 10_000);
        workload.input = Lengths::new(1, 1).unwrap();
        workload.output = Lengths::new(3, 7).unwrap();
        let mut counts = [0_u32; 8];
        for item in workload.draw(10) {
            counts[item.output_tokens as usize] += 1;
        }
        assert_eq!(counts[..3], [0, 0, 0]);
        // Binomial(10000, 1/5) has a standard deviation of 40.
        assert!(counts[3..].iter().all(|count| count.abs_diff(2000) < 200), "{counts:?}");
    }

    #[test]
    fn ranges_are_read_as_they_are_written_and_bad_ones_are_refused() {
        assert_eq!("100..1024".parse(), Lengths::new(100, 1024));
        assert_eq!("64".parse(), Lengths::new(64, 64));
        assert_eq!("5..9".parse::<Lengths>().unwrap().to_string(), "5..9");
        for (text, complaint) in [
            ("9..5", "is empty"),
            ("0..5", "begins at 0"),
            ("..", "is no range"),
            ("a..5", "is no range"),
            ("-1..5", "is no range"),
            ("", "is no range"),
        ] {
            let error = text.parse::<Lengths>().unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }
}
