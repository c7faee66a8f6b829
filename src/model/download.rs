//! A download as people see it: a bar on a terminal, elsewhere a line a file.

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use minisgl_hub::Event;

use crate::progress::Stderr;

/// Says what happens while a model is fetched.
pub struct Display<'a> {
    stderr: Option<&'a Stderr>,
    bar: Option<ProgressBar>,
}

impl<'a> Display<'a> {
    /// On stderr; silent without it.
    pub fn new(stderr: Option<&'a Stderr>) -> Self {
        let bar = stderr.filter(|stderr| stderr.is_terminal()).map(|_| {
            let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template);
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Display { stderr, bar }
    }

    /// Takes an event in.
    pub fn hear(&mut self, event: &Event<'_>) {
        tracing::debug!(?event, "fetching the model");
        match event {
            Event::Plan { files, bytes } => {
                self.say(format!("fetching {files} files, {}", HumanBytes(*bytes)))
            }
            Event::File { name, size } => match &self.bar {
                Some(bar) => {
                    bar.reset();
                    bar.set_message((*name).to_owned());
                    bar.set_length(size.unwrap_or_default());
                }
                None => self.say(format!("  {name}, {}", HumanBytes(size.unwrap_or_default()))),
            },
            Event::Bytes(count) => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*count);
                }
            }
            Event::Waiting { name } => self.say(format!("another process fetches {name}; waiting for it")),
            Event::Broken { name, reason } => {
                self.say(format!("the download of {name} broke off ({reason}); going on"))
            }
            Event::Cached { reason, commit } => {
                self.say(format!("{reason}. Using commit {commit}, which is in the cache"))
            }
        }
    }

    fn say(&self, line: String) {
        let Some(stderr) = self.stderr else { return };
        match &self.bar {
            Some(bar) => bar.println(line),
            None => stderr.say(line),
        }
    }
}

impl Drop for Display<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
