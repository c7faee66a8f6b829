//! What a line of the user means.
//!
//! ```text
//!   Why is the sky blue?      said to the model
//!   /set temperature 0.7      a command
//!   //etc is a folder         said: "/etc is a folder"
//! ```

use std::path::PathBuf;

/// What `/help` says.
pub const HELP: &str = "\
/reset              forget the conversation, but not the system message
/system TEXT        say to the model what it is from now on; without TEXT nothing more
/set NAME VALUE     temperature, top_k, top_p, min_p, max_tokens or seed; VALUE `default` takes it back
/set                show them
/save FILE          write the conversation to a file, as the messages of a request
/help               show this
/quit               end, as does Ctrl-D
Ctrl-C stops an answer. A line that begins with // is said with one slash less.";

/// A line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// An empty one.
    Nothing,
    /// Said to the model.
    Say(String),
    /// Forget what was said.
    Reset,
    /// Another system message, or none.
    System(Option<String>),
    /// Write the conversation down.
    Save(PathBuf),
    /// Show how tokens are drawn.
    Settings,
    /// Change how tokens are drawn.
    Set {
        /// Which setting.
        name: String,
        /// As it was written.
        value: String,
    },
    /// Show the commands.
    Help,
    /// End.
    Quit,
}

/// Understands a line.
///
/// # Errors
/// A command that is none, with what to write instead.
pub fn parse(line: &str) -> Result<Line, String> {
    let line = line.trim();
    let Some(command) = line.strip_prefix('/') else {
        return Ok(if line.is_empty() { Line::Nothing } else { Line::Say(line.to_owned()) });
    };
    if command.starts_with('/') {
        return Ok(Line::Say(command.to_owned()));
    }
    let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let rest = rest.trim();
    let alone = |line| match rest {
        "" => Ok(line),
        _ => Err(format!("/{name} stands alone; write // to say a line that begins with a slash")),
    };
    match name {
        "reset" => alone(Line::Reset),
        "help" => alone(Line::Help),
        "quit" | "exit" => alone(Line::Quit),
        "system" => Ok(Line::System((!rest.is_empty()).then(|| rest.to_owned()))),
        "save" if rest.is_empty() => Err("/save needs a file's name: /save chat.json".to_owned()),
        "save" => Ok(Line::Save(PathBuf::from(rest))),
        "set" if rest.is_empty() => Ok(Line::Settings),
        "set" => match rest.split_whitespace().collect::<Vec<_>>()[..] {
            [name, value] => Ok(Line::Set { name: name.to_owned(), value: value.to_owned() }),
            _ => Err("/set needs a name and a value: /set temperature 0.7".to_owned()),
        },
        _ => Err(format!(
            "/{name} is no command; /help shows them, and // begins a line that is to be said with a slash"
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_commands_when_they_begin_with_one_slash() {
        let say = |text: &str| Line::Say(text.to_owned());
        let set = |name: &str, value: &str| Line::Set { name: name.to_owned(), value: value.to_owned() };
        for (line, expected) in [
            ("  ", Line::Nothing),
            (" Hello, /world ", say("Hello, /world")),
            ("//etc is a folder", say("/etc is a folder")),
            ("/reset", Line::Reset),
            ("/exit", Line::Quit),
            ("/quit ", Line::Quit),
            ("/help", Line::Help),
            ("/system You are  a pirate.", Line::System(Some("You are  a pirate.".to_owned()))),
            ("/system", Line::System(None)),
            ("/save my chat.json", Line::Save("my chat.json".into())),
            ("/set", Line::Settings),
            ("/set temperature 0.7", set("temperature", "0.7")),
            ("/set\ttop_k  5", set("top_k", "5")),
        ] {
            assert_eq!(parse(line), Ok(expected), "{line}");
        }
    }

    #[test]
    fn what_is_no_command_is_refused_with_what_to_write() {
        for (line, complaint) in [
            ("/rest", "/rest is no command; /help"),
            ("/", "/ is no command"),
            ("/reset now", "stands alone"),
            ("/save", "/save chat.json"),
            ("/set temperature", "/set temperature 0.7"),
            ("/set a b c", "/set temperature 0.7"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(complaint), "{line}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_line_without_a_slash_is_said_as_it_is(line in "[^/\\s]\\PC{0,40}") {
            prop_assert_eq!(parse(&line), Ok(Line::Say(line.trim().to_owned())));
        }

        #[test]
        fn no_line_is_too_bad_to_be_understood_or_refused(line in "/?\\PC{0,40}") {
            let _ = parse(&line);
        }
    }
}
