//! Conversations in ShareGPT's form: `[{"conversations": [{"value": …}, {"value": …}, …]}, …]`.

use std::fmt;
use std::io::{self, BufRead, Read};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, SeqAccess, Visitor};

/// Does the file begin with a JSON array? Nothing is taken from it but white space and a byte order mark.
///
/// # Errors
/// It can't be read.
pub fn is_array(file: &mut impl BufRead) -> io::Result<bool> {
    loop {
        let Some(byte) = file.fill_buf()?.first() else { return Ok(false) };
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' | 0xEF | 0xBB | 0xBF => file.consume(1),
            byte => return Ok(*byte == b'['),
        }
    }
}

/// The first `most` conversations that have a prompt and an answer to it.
///
/// # Errors
/// What is no list of conversations, or a file that can't be read.
pub fn read(file: impl Read, most: usize) -> serde_json::Result<Vec<Exchange>> {
    let mut json = serde_json::Deserializer::from_reader(file);
    let exchanges = Conversations { most }.deserialize(&mut json)?;
    json.end()?;
    Ok(exchanges)
}

/// A prompt and the answer to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// The first turn.
    pub prompt: String,
    /// The second.
    pub answer: String,
}

/// The first `most` conversations of a JSON array that have an answer, the others skipped: the files are large, and none of
/// it is held but these.
struct Conversations {
    most: usize,
}

impl<'de> DeserializeSeed<'de> for Conversations {
    type Value = Vec<Exchange>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Exchange>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Conversations {
    type Value = Vec<Exchange>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of conversations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Exchange>, A::Error> {
        #[derive(Deserialize)]
        struct Conversation {
            conversations: Vec<Turn>,
        }
        #[derive(Deserialize)]
        struct Turn {
            value: String,
        }
        let mut exchanges = Vec::new();
        while exchanges.len() < self.most {
            let Some(Conversation { conversations }) = list.next_element()? else { return Ok(exchanges) };
            let mut turns = conversations.into_iter().map(|turn| turn.value);
            if let (Some(prompt), Some(answer)) = (turns.next(), turns.next())
                && !(prompt.is_empty() || answer.is_empty())
            {
                exchanges.push(Exchange { prompt, answer });
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(exchanges)
    }
}
