//! The CPU reference backend of minisgl: every operation in f32, as plain loops.
