//! Offline LLM inference.
