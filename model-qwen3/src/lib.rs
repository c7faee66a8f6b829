//! The Qwen3 model of minisgl: configuration, weights and the forward pass over a backend's operations.
