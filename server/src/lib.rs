//! OpenAI's API over an engine.
//!
//! ```text
//!   connections ──> router: log, CORS, key ──> handlers ── try to submit ──> a session of the engine's front
//!   (listen.rs)        (routes.rs)                (completions.rs, …)              │ events
//!        ^                                                                         ▼
//!        └────────────────────── whole answers, or chunks as they come <── Outputs (output.rs, stream.rs)
//!
//!   supervisor (engine.rs): builds the engine, hears when it fails, builds the next
//! ```
//!
//! Tasks never wait for the engine: they are woken when it has something for them. What takes time beside it (templates,
//! tokenizers) runs on threads of the front's or of the runtime's for such work.
//!
//! Invariants: a field of a request is served as it says or refused by its name; an answer that nobody reads any more stops
//! its request within two steps; a client that reads slowly, or says nothing, costs a connection and no more.

mod access;
mod api;
mod app;
mod auth;
mod engine;
mod listen;
mod metrics;
mod page;
pub mod program;
mod random;
mod routes;
mod settings;
mod stages;
mod state;

use std::sync::Arc;
use std::thread;

use minisgl::{Error, Llm};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use api::{
    asked, body, completions, embeddings, error, heading, large_bodies, models, output, stream, tokenize,
};
pub use app::App;
pub use engine::{Engine, EngineState, Engines};
pub use routes::router;
pub use settings::Settings;

/// How a service came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything that was open was answered.
    Drained,
    /// The time for that was over, and something was cut off.
    CutOff,
}

/// A service that has begun.
pub struct Service {
    app: Arc<App>,
    supervised: oneshot::Receiver<Result<(), Error>>,
}

impl Service {
    /// Begins to build an engine by `build`, on a thread of its own, which builds another one when it fails.
    ///
    /// # Errors
    /// A thread that the system does not give.
    pub fn start(
        settings: Settings,
        mut build: impl FnMut() -> Result<Llm, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let (engines, news) = Engines::new();
        let app = App::new(settings, engines);
        let (end, supervised) = oneshot::channel();
        let of_thread = app.clone();
        let supervise = move || {
            let app = of_thread;
            let observer = app.clone();
            let Settings { rebuilds_max, tool_format, .. } = app.settings;
            let build = || {
                let llm = build()?;
                let tool_format = tool_format.or_else(|| llm.handle().text().tool_format());
                Ok((llm, tool_format))
            };
            let observe = move |step: &_| observer.metrics.step(step);
            let ended = engine::supervise(&app.engines, &news, rebuilds_max, build, observe);
            // Who started it may be gone.
            let _ = end.send(ended);
        };
        let thread = thread::Builder::new().name("supervisor".to_owned()).spawn(supervise);
        thread.map_err(Error::Thread)?;
        Ok(Service { app, supervised })
    }

    /// What its handlers share.
    pub fn app(&self) -> &Arc<App> {
        &self.app
    }

    /// Serves a listener's connections until `end` is there, then drains: no more connections and requests are taken, and
    /// those that are open have their time to end.
    ///
    /// # Errors
    /// The engine can't be built, or failed too often.
    pub async fn serve(
        mut self,
        listener: TcpListener,
        end: impl Future<Output = ()>,
    ) -> Result<Ended, Error> {
        let engines = &self.app.engines;
        let stop = async {
            end.await;
            engines.end_intake();
        };
        let router = router(self.app.clone());
        let drained = tokio::select! {
            drained = listen::serve(listener, router, &self.app.settings, stop) => drained,
            ended = &mut self.supervised => match ended {
                Ok(Err(error)) => return Err(error),
                // It ends well only when it is told to, which is below.
                _ => false,
            },
        };
        engines.end();
        // The engine's threads end before its memory goes.
        let _ = self.supervised.await;
        Ok(if drained { Ended::Drained } else { Ended::CutOff })
    }
}
