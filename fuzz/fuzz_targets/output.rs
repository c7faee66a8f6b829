//! A model's output, cut into what it thinks, says and calls: the same however it comes in pieces, and of a plain one all is said.
//! The first byte chooses the format and the pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minisgl::ToolFormat;
use minisgl::openai::{OutputFormat, OutputParser, OutputPart};

fn format(choice: u8) -> OutputFormat {
    let tools = [None, Some(ToolFormat::Qwen3), Some(ToolFormat::Llama3)][usize::from(choice % 3)];
    let reasoning = [None, Some(false), Some(true)][usize::from(choice / 3 % 3)];
    OutputFormat { tools, reasoning }
}

/// The parts of an output that comes in so many characters at a time, text behind text as one.
fn parts(text: &str, format: OutputFormat, characters: usize) -> Vec<OutputPart> {
    let (mut parser, mut out) = (OutputParser::new(format), Vec::new());
    let characters_of: Vec<char> = text.chars().collect();
    for piece in characters_of.chunks(characters) {
        parser.push(&piece.iter().collect::<String>(), &mut out);
    }
    parser.finish(&mut out);
    let mut joined: Vec<OutputPart> = Vec::new();
    for part in out {
        match (joined.last_mut(), part) {
            (Some(OutputPart::Text(before)), OutputPart::Text(more)) => before.push_str(&more),
            (Some(OutputPart::Reasoning(before)), OutputPart::Reasoning(more)) => before.push_str(&more),
            (_, part) => joined.push(part),
        }
    }
    joined
}

fuzz_target!(|input: &[u8]| {
    let Some((choice, text)) = input.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let format = format(*choice);
    let whole = parts(text, format, usize::MAX);
    assert_eq!(whole, parts(text, format, 1 + usize::from(choice / 9)));
    if format.is_plain() && !text.is_empty() {
        assert_eq!(whole, [OutputPart::Text(text.to_owned())]);
    }
});
