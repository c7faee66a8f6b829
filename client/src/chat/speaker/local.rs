//! An engine in this process.

use std::hash::{BuildHasher, RandomState};

use minisgl::{
    Cause, ChatPrompt, FinishReason, GenerateRequest, JsonObject, Llm, Message, Next, Prompt, RequestError,
    SamplingParams, SessionEvent, SessionOptions,
};

use super::{Ending, LOOK, Said, Speaker};
use crate::chat::settings::Settings;

/// A model on a device of this machine.
pub struct Local {
    llm: Llm,
    sampling: SamplingParams,
    kwargs: JsonObject,
}

impl Local {
    /// A model that draws as in `sampling` where nothing else is said; the chat template gets `kwargs`.
    ///
    /// # Errors
    /// It has no chat template, or one that fails.
    pub fn new(llm: Llm, sampling: SamplingParams, kwargs: JsonObject) -> Result<Self, RequestError> {
        let speaker = Local { llm, sampling, kwargs };
        speaker.llm.encode_prompt(speaker.prompt(&[Message::new("user", "Hello")]))?;
        Ok(speaker)
    }

    fn prompt(&self, messages: &[Message]) -> Prompt {
        Prompt::Chat(ChatPrompt { kwargs: self.kwargs.clone(), ..ChatPrompt::new(messages) })
    }
}

impl Speaker for Local {
    fn answer(
        &mut self,
        messages: &[Message],
        settings: &Settings,
        stop: &dyn Fn() -> bool,
        hear: &mut dyn FnMut(Said<'_>) -> Result<(), Cause>,
    ) -> Result<Ending, Cause> {
        // Asked again, a model answers otherwise, unless a seed is wanted.
        let seed = RandomState::new().hash_one(0);
        let sampling = settings.sampling(SamplingParams { seed, ..self.sampling });
        let request = GenerateRequest::new(self.prompt(messages)).sampling(sampling);
        let options = SessionOptions { tokens: true, text: true, ..SessionOptions::default() };
        let (mut submitter, mut events) = self.llm.handle().session(options);
        submitter.submit(0, request)?;
        drop(submitter);
        // Dropping the events aborts what has not ended.
        while !stop() {
            match events.next_timeout(LOOK)? {
                Next::Event(SessionEvent::Token { text, .. }) => hear(Said::Text(&text))?,
                Next::Event(SessionEvent::Finished { text, completion, .. }) => {
                    hear(Said::Text(&text))?;
                    return match (completion.error, completion.finish_reason) {
                        (Some(error), _) => Err(error.into()),
                        (None, FinishReason::Length) => Ok(Ending::Length),
                        (None, _) => Ok(Ending::Whole),
                    };
                }
                Next::Event(SessionEvent::Started { .. } | SessionEvent::Step(_)) | Next::TimedOut => {}
                Next::Over => return Err("the engine ended the answer without an end".into()),
            }
        }
        Ok(Ending::Stopped)
    }
}
