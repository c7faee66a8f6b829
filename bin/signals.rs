//! SIGINT and SIGTERM end a job in order; a second one ends the program at once.
//!
//! ```text
//!   first signal ──> its thread: what the caller wants done ──> exit 128 + signal
//!   second signal ──────────────────────────────────────────> exit 128 + signal, now
//! ```

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::{flag, low_level};

/// From now on the first signal runs `last_words` on a thread of its own and ends the program: exit status 130 for SIGINT,
/// 143 for SIGTERM.
///
/// # Errors
/// The system refuses.
pub fn handle(last_words: impl FnOnce() + Send + 'static) -> io::Result<()> {
    // First, so that no signal is caught which nobody hears of.
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let again = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal only sets what makes the second one end everything.
        flag::register_conditional_shutdown(signal, status(signal), Arc::clone(&again))?;
        flag::register(signal, Arc::clone(&again))?;
    }
    // A write beyond the limit of a file's size is then an error like any other.
    flag::register(SIGXFSZ, Arc::default())?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            last_words();
            // Not through the exit handlers: the device's would meet a device at work.
            low_level::exit(status(signal));
        }
    })?;
    Ok(())
}

fn status(signal: i32) -> i32 {
    128 + signal
}
