//! How well a model foretells a text: `e` to the mean of minus the log-probabilities of its tokens. For weighing what a format
//! of weights, or of keys and values, costs: `scripts/perplexity` makes a table.
//!
//! ```sh
//! cargo run --release --example perplexity -- --model DIR --text FILE --kv-dtype fp8
//! ```
//!
//! The text is cut into windows, each scored by itself; the first token of each is given.

use std::error::Error;
use std::fs;

use minisgl::progress::Stderr;
use minisgl::{SamplingParams, ScoreRequest, from_command_line};

minisgl::with_shared_flags! {
    /// Scores a text and prints its perplexity.
    struct Flags {
        /// checkpoint directory, or a model's name
        #[argh(option)]
        model: String,
        /// file with the text
        #[argh(option)]
        text: String,
        /// tokens of the text that are taken, from its beginning (default 20480)
        #[argh(option, default = "20480")]
        tokens: usize,
        /// tokens of a window (default 1024)
        #[argh(option, default = "1024")]
        window: usize,
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let flags: Flags = from_command_line();
    if flags.window < 2 || flags.sampling(SamplingParams::default()) != SamplingParams::default() {
        return Err(
            "a window has at least 2 tokens, and nothing is drawn: leave the flags of sampling out".into()
        );
    }
    let stderr = Stderr::open();
    let mut llm = flags.source(&flags.model, &stderr)?.builder().options(flags.engine_options()).build()?;
    stderr.say(llm.info().to_string());
    let mut tokens = llm.encode(&fs::read_to_string(&flags.text)?)?;
    tokens.truncate(flags.tokens);
    let windows: Vec<ScoreRequest> = tokens
        .chunks(flags.window)
        .filter_map(|window| {
            let (first, rest) = window.split_first()?;
            (!rest.is_empty()).then(|| ScoreRequest::tokens([*first], rest))
        })
        .collect();
    let (mut nats, mut scored) = (0.0, 0);
    for score in llm.score(&windows)? {
        if let Some(error) = score.error {
            return Err(error.into());
        }
        nats -= score.logprob();
        scored += score.token_ids.len();
    }
    if scored == 0 {
        return Err(format!("{} has too few tokens to score one", flags.text).into());
    }
    let mean = nats / scored as f64;
    stderr.finish();
    println!("{scored} tokens, {mean:.5} nats each, perplexity {:.4}", mean.exp());
    Ok(())
}
