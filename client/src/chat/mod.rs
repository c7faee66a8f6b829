//! A conversation in the terminal: lines in, answers out as they come.
//!
//! ```text
//!   line ── command::parse ──┬─ a command ──> settings, messages
//!                            └─ said ──> Speaker::answer ── parts ──> out
//! ```
//!
//! What is stopped stays in the conversation as far as it came; what fails is taken back, so that it can be said again.

pub mod command;
pub mod program;
pub mod settings;
pub mod speaker;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use minisgl::Message;
use serde_json::json;

use command::{HELP, Line, parse};
use settings::Settings;
use speaker::{Ending, Said, Speaker};

/// What begins and ends a thought on a terminal: dim.
const DIM: [&str; 2] = ["\x1b[2m", "\x1b[0m"];

/// A conversation.
pub struct Chat<'a> {
    speaker: &'a mut dyn Speaker,
    settings: Settings,
    system: Option<String>,
    messages: Vec<Message>,
    /// Files that it has written, and may write anew.
    saved: HashSet<PathBuf>,
    /// An answer failed.
    failed: bool,
}

/// What is to happen after a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The next line.
    GoOn,
    /// Nothing.
    End,
}

/// Where answers and words about them go.
pub struct Screen<'a> {
    /// Answers.
    pub out: &'a mut dyn Write,
    /// All else.
    pub aside: &'a mut dyn Write,
    /// Is `out` a terminal? Then nothing that a model writes may command it.
    pub terminal: bool,
}

impl<'a> Chat<'a> {
    /// A conversation that has not begun.
    pub fn new(speaker: &'a mut dyn Speaker, settings: Settings, system: Option<String>) -> Self {
        Chat { speaker, settings, system, messages: Vec::new(), saved: HashSet::new(), failed: false }
    }

    /// Did an answer fail?
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// Takes a line. `stop` is asked often during an answer whether that is enough.
    ///
    /// # Errors
    /// Nothing can be written any more. What fails of an answer is told, and is no error here.
    pub fn line(
        &mut self,
        line: &str,
        stop: &dyn Fn() -> bool,
        screen: &mut Screen<'_>,
    ) -> io::Result<After> {
        match parse(line) {
            Err(error) => writeln!(screen.aside, "{error}")?,
            Ok(Line::Nothing) => {}
            Ok(Line::Quit) => return Ok(After::End),
            Ok(Line::Help) => writeln!(screen.aside, "{HELP}")?,
            Ok(Line::Settings) => writeln!(screen.aside, "{}", self.settings)?,
            Ok(Line::Set { name, value }) => match self.settings.set(&name, &value) {
                Ok(()) => writeln!(screen.aside, "{name} is {value}")?,
                Err(error) => writeln!(screen.aside, "{error}")?,
            },
            Ok(Line::Reset) => {
                self.messages.clear();
                writeln!(screen.aside, "the conversation begins anew")?;
            }
            Ok(Line::System(text)) => {
                writeln!(screen.aside, "the system message is {}", text.as_deref().unwrap_or("left out"))?;
                self.system = text;
            }
            Ok(Line::Save(path)) => match self.save(&path) {
                Ok(()) => writeln!(screen.aside, "{} messages are in {}", self.all().len(), path.display())?,
                Err(error) => writeln!(screen.aside, "{} can't be written: {error}", path.display())?,
            },
            Ok(Line::Say(text)) => self.say(text, stop, screen)?,
        }
        Ok(After::GoOn)
    }

    /// The conversation with its system message.
    fn all(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        system.chain(self.messages.iter().cloned()).collect()
    }

    fn say(&mut self, text: String, stop: &dyn Fn() -> bool, screen: &mut Screen<'_>) -> io::Result<()> {
        self.messages.push(Message::new("user", text));
        let messages = self.all();
        let mut answer = Answer { text: String::new(), thinks: false, screen };
        let mut unwritten = None;
        let ended = self.speaker.answer(&messages, &self.settings, stop, &mut |said| {
            answer.hear(said).map_err(|error| {
                let told = error.to_string().into();
                unwritten = Some(error);
                told
            })
        });
        if let Some(error) = unwritten {
            return Err(error);
        }
        answer.end()?;
        let (said, screen) = (answer.text, answer.screen);
        match &ended {
            Ok(Ending::Whole) => {}
            Ok(Ending::Stopped) => writeln!(screen.aside, "(stopped)")?,
            Ok(Ending::Length) => writeln!(
                screen.aside,
                "(cut off at {} tokens; /set max_tokens allows for more)",
                self.settings.max_tokens()
            )?,
            Err(error) => {
                self.failed = true;
                writeln!(screen.aside, "no answer: {error}")?;
            }
        }
        match ended {
            Ok(_) => self.messages.push(Message::new("assistant", said)),
            Err(_) => drop(self.messages.pop()),
        }
        Ok(())
    }

    /// Writes the conversation down; a file that is there already is left alone, unless it is this conversation's.
    fn save(&mut self, path: &Path) -> io::Result<()> {
        let text = format!("{:#}\n", json!({"messages": self.all()}));
        match self.saved.contains(path) {
            true => fs::write(path, text)?,
            false => File::create_new(path)?.write_all(text.as_bytes())?,
        }
        self.saved.insert(path.to_owned());
        Ok(())
    }
}

/// An answer as it comes.
struct Answer<'a, 'b> {
    text: String,
    /// A thought has begun and not ended.
    thinks: bool,
    screen: &'a mut Screen<'b>,
}

impl Answer<'_, '_> {
    fn hear(&mut self, said: Said<'_>) -> io::Result<()> {
        let (text, is_thought) = match said {
            Said::Thought(text) => (text, true),
            Said::Text(text) => (text, false),
        };
        if text.is_empty() {
            return Ok(());
        }
        if is_thought != self.thinks {
            self.turn(is_thought)?;
        }
        if !is_thought {
            self.text.push_str(text);
        }
        match self.screen.terminal {
            true => self.screen.out.write_all(harmless(text).as_bytes())?,
            false => self.screen.out.write_all(text.as_bytes())?,
        }
        self.screen.out.flush()
    }

    /// A thought begins or ends.
    fn turn(&mut self, thinks: bool) -> io::Result<()> {
        self.thinks = thinks;
        if self.screen.terminal {
            write!(self.screen.out, "{}", DIM[usize::from(!thinks)])?;
        }
        if !thinks {
            writeln!(self.screen.out)?;
        }
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        if self.thinks {
            self.turn(false)?;
        }
        writeln!(self.screen.out)?;
        self.screen.out.flush()
    }
}

/// A text without what commands a terminal: control characters are shown as such.
fn harmless(text: &str) -> String {
    let shown = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use minisgl::Cause;

    use super::*;

    /// Says the same parts each time, and remembers what it was asked.
    struct Parrot {
        parts: Vec<(bool, &'static str)>,
        end: Result<Ending, &'static str>,
        asked: Vec<Vec<Message>>,
    }

    impl Speaker for Parrot {
        fn answer(
            &mut self,
            messages: &[Message],
            _: &Settings,
            stop: &dyn Fn() -> bool,
            hear: &mut dyn FnMut(Said<'_>) -> Result<(), Cause>,
        ) -> Result<Ending, Cause> {
            self.asked.push(messages.to_vec());
            for (is_thought, text) in &self.parts {
                if stop() {
                    return Ok(Ending::Stopped);
                }
                hear(if *is_thought { Said::Thought(text) } else { Said::Text(text) })?;
            }
            Ok(self.end?)
        }
    }

    fn parrot(parts: &[(bool, &'static str)], end: Result<Ending, &'static str>) -> Parrot {
        Parrot { parts: parts.to_vec(), end, asked: Vec::new() }
    }

    /// What a conversation of these lines prints: answers, and all else.
    fn talk(parrot: &mut Parrot, terminal: bool, lines: &[&str]) -> (String, String) {
        let (mut out, mut aside) = (Vec::new(), Vec::new());
        let mut chat = Chat::new(parrot, Settings::default(), None);
        let mut screen = Screen { out: &mut out, aside: &mut aside, terminal };
        for line in lines {
            chat.line(line, &|| false, &mut screen).unwrap();
        }
        (String::from_utf8(out).unwrap(), String::from_utf8(aside).unwrap())
    }

    fn roles_and_texts(messages: &[Message]) -> Vec<(String, String)> {
        let field = |message: &Message, name: &str| message.fields()[name].as_str().unwrap().to_owned();
        messages.iter().map(|message| (field(message, "role"), field(message, "content"))).collect()
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(role, text)| ((*role).to_owned(), (*text).to_owned())).collect()
    }

    #[test]
    fn each_answer_is_asked_with_all_that_was_said_before_and_without_thoughts() {
        let mut parrot = parrot(&[(true, "hm"), (false, "Hel"), (false, "lo.")], Ok(Ending::Whole));
        let (out, aside) = talk(&mut parrot, false, &["Hi", "/system Be brief.", "And?", "/reset", "Anew"]);
        assert_eq!(out, "hm\nHello.\n".repeat(3));
        assert_eq!(aside, "the system message is Be brief.\nthe conversation begins anew\n");
        let asked: Vec<_> = parrot.asked.iter().map(|messages| roles_and_texts(messages)).collect();
        assert_eq!(asked[0], owned(&[("user", "Hi")]));
        let second = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And?")];
        assert_eq!(asked[1], owned(&second));
        assert_eq!(asked[2], owned(&[("system", "Be brief."), ("user", "Anew")]));
    }

    #[test]
    fn what_fails_is_told_and_taken_back() {
        let mut parrot = parrot(&[(false, "Hel")], Err("gone"));
        let (out, aside) = talk(&mut parrot, false, &["Hi", "Hi again"]);
        assert_eq!((out.as_str(), aside.as_str()), ("Hel\nHel\n", "no answer: gone\nno answer: gone\n"));
        assert_eq!(roles_and_texts(&parrot.asked[1]), owned(&[("user", "Hi again")]));
    }

    #[test]
    fn a_stopped_answer_stays_as_far_as_it_came() {
        let mut parrot = parrot(&[(false, "Hel"), (false, "lo")], Ok(Ending::Whole));
        let (mut out, mut aside) = (Vec::new(), Vec::new());
        let mut chat = Chat::new(&mut parrot, Settings::default(), None);
        let mut screen = Screen { out: &mut out, aside: &mut aside, terminal: false };
        let looks = std::cell::Cell::new(0);
        chat.line("Hi", &|| looks.replace(looks.get() + 1) == 1, &mut screen).unwrap();
        chat.line("And?", &|| false, &mut screen).unwrap();
        assert!(!chat.has_failed());
        assert_eq!(String::from_utf8(aside).unwrap(), "(stopped)\n");
        let asked = roles_and_texts(&parrot.asked[1]);
        assert_eq!(asked, owned(&[("user", "Hi"), ("assistant", "Hel"), ("user", "And?")]));
    }

    #[test]
    fn an_answer_that_is_cut_off_says_what_allows_for_more() {
        let (_, aside) =
            talk(&mut parrot(&[(false, "a")], Ok(Ending::Length)), false, &["/set max_tokens 1", "Hi"]);
        assert_eq!(aside, "max_tokens is 1\n(cut off at 1 tokens; /set max_tokens allows for more)\n");
    }

    #[test]
    fn no_model_commands_the_terminal() {
        let parts = [(true, "hm"), (false, "a\x1b]0;title\x07\tb\n")];
        let (out, _) = talk(&mut parrot(&parts, Ok(Ending::Whole)), true, &["Hi"]);
        assert_eq!(out, "\x1b[2mhm\x1b[0m\na\u{fffd}]0;title\u{fffd}\tb\n\n");
        let (piped, _) = talk(&mut parrot(&parts, Ok(Ending::Whole)), false, &["Hi"]);
        assert!(piped.contains("\x1b]0;title"), "a pipe gets what the model wrote");
    }

    #[test]
    fn a_conversation_is_saved_anew_and_nothing_else_is_overwritten() {
        let folder = std::env::temp_dir().join(format!("minisgl-chat-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (mine, other) = (folder.join("mine.json"), folder.join("other.json"));
        fs::write(&other, "precious").unwrap();
        let save = [format!("/save {}", mine.display()), format!("/save {}", other.display())];
        let mut parrot = parrot(&[(false, "Hello.")], Ok(Ending::Whole));
        let (_, aside) = talk(&mut parrot, false, &["Hi", &save[0], "And?", &save[0], &save[1]]);
        let saved: serde_json::Value = serde_json::from_slice(&fs::read(&mine).unwrap()).unwrap();
        assert_eq!(saved["messages"].as_array().unwrap().len(), 4);
        assert_eq!(saved["messages"][1], json!({"role": "assistant", "content": "Hello."}));
        assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
        assert!(
            aside.contains("4 messages are in") && aside.contains("other.json can't be written"),
            "{aside}"
        );
        fs::remove_dir_all(&folder).unwrap();
    }
}
