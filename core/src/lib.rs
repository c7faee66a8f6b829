//! Scheduler, paged KV manager, backend traits and engine of minisgl: no I/O, no device, no clock.
