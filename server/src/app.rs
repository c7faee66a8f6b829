//! What all handlers share.

use std::sync::Arc;

use crate::engine::Engines;
use crate::large_bodies::LargeBodies;
use crate::metrics::Metrics;
use crate::settings::Settings;

/// See the module.
pub struct App {
    /// How the service behaves.
    pub settings: Settings,
    /// The engine, when there is one.
    pub engines: Engines,
    /// What is counted.
    pub metrics: Metrics,
    /// The turns of large bodies.
    pub large_bodies: LargeBodies,
}

impl App {
    /// Of a service that begins now.
    pub fn new(settings: Settings, engines: Engines) -> Arc<Self> {
        let metrics = Metrics::new(settings.model.first());
        Arc::new(App { settings, engines, metrics, large_bodies: LargeBodies::default() })
    }
}
