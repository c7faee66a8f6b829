//! Clients of services with OpenAI's API: a conversation in the terminal, and load with its latencies.
//!
//! ```text
//!   endpoint ── service (ureq: one thing at a time)             ──> chat
//!            └─ bench   (mio: many streams on one thread)           ──> serve-bench
//!   http ──> sse ──> chunk      bytes ──> an answer's body ──> events ──> what they say
//! ```

pub mod bench;
pub mod chat;
pub mod chunk;
pub mod endpoint;
pub mod http;
pub mod service;
pub mod sse;
mod tls;
