//! What a program says on stderr while it works: messages, log events and progress, written by a thread of its own.
//!
//! ```text
//!   say ───────┐
//!   log events ┼── queue of 1024 ──> thread ──> stderr: lines above a bar (terminal), or lines alone
//!   show ──────┘   full: left out, and counted
//! ```
//!
//! Invariant: nobody but that thread waits for stderr (save a moment for a bar to be gone, so that what is printed next has
//! the line for itself), and no failure to write reaches anybody. So a closed pipe, a full
//! disk or a reader that sleeps costs messages, never results.

mod view;

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressDrawTarget;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use view::{MakeTarget, Source, View};

/// Messages that wait for the thread at most.
const QUEUE: usize = 1024;
/// How long what is still queued may take at the end.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a bar has to go.
const BAR_GOES: Duration = Duration::from_millis(200);
/// Time between two looks at the progress that a terminal shows.
const TERMINAL_PERIOD: Duration = Duration::from_millis(100);
/// Time between two lines of progress where there is no terminal.
const LINE_PERIOD: Duration = Duration::from_secs(30);

/// How far work has come, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Which part of the work this is; may be empty.
    pub label: String,
    /// Done so far.
    pub done: u64,
    /// What there is to do, where it is known.
    pub total: Option<u64>,
    /// What `done` and `total` count.
    pub unit: Unit,
    /// Requests that ended well.
    pub finished: u64,
    /// Requests and lines that failed.
    pub failed: u64,
    /// Tokens drawn.
    pub output_tokens: u64,
    /// Requests in the batch.
    pub running: u32,
    /// Requests that wait for a place in it.
    pub waiting: u32,
    /// KV pages in use.
    pub pages_used: u32,
    /// KV pages that there are.
    pub pages: u32,
}

/// What progress is counted in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unit {
    /// Bytes of the input whose requests have ended.
    #[default]
    Bytes,
    /// Output tokens.
    Tokens,
}

/// What the thread is told.
enum Order {
    Text(String),
    Show(Source),
    /// Tells when it is done.
    Hide(mpsc::Sender<()>),
    Wake,
}

/// The way to stderr. Clones share it; when the last is dropped, what is queued gets a second to go out.
#[derive(Clone)]
pub struct Stderr(Arc<Shared>);

struct Shared {
    queue: Queue,
    closing: Arc<AtomicBool>,
    ended: std::sync::Mutex<Receiver<()>>,
    terminal: bool,
}

/// Puts orders in line; what finds no place is counted.
#[derive(Clone)]
struct Queue {
    orders: SyncSender<Order>,
    left_out: Arc<AtomicU64>,
}

impl Queue {
    fn put(&self, order: Order) {
        if self.orders.try_send(order).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Progress that is being shown; dropping it ends that.
pub struct Shown {
    queue: Queue,
    terminal: bool,
}

impl fmt::Debug for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shown").field("terminal", &self.terminal).finish_non_exhaustive()
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        let (done, gone) = mpsc::channel();
        self.queue.put(Order::Hide(done));
        if self.terminal {
            let _ = gone.recv_timeout(BAR_GOES);
        }
    }
}

impl fmt::Debug for Stderr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stderr").field("terminal", &self.0.terminal).finish_non_exhaustive()
    }
}

impl Stderr {
    /// Starts the thread that writes the process's stderr.
    pub fn open() -> Self {
        let terminal = io::stderr().is_terminal();
        let bar = terminal.then(|| Box::new(ProgressDrawTarget::stderr) as MakeTarget);
        Self::over(Box::new(io::stderr()), bar, if terminal { TERMINAL_PERIOD } else { LINE_PERIOD })
    }

    fn over(out: Box<dyn Write + Send>, bar: Option<MakeTarget>, period: Duration) -> Self {
        let (orders, inbox) = mpsc::sync_channel(QUEUE);
        let (end, ended) = mpsc::channel();
        let queue = Queue { orders, left_out: Arc::new(AtomicU64::new(0)) };
        let closing = Arc::new(AtomicBool::new(false));
        let terminal = bar.is_some();
        let writer = Writer {
            inbox,
            left_out: queue.left_out.clone(),
            closing: closing.clone(),
            out,
            bar,
            period,
            view: None,
        };
        // Without a thread there are no messages, and the work goes on.
        let _ = thread::Builder::new().name("stderr".to_owned()).spawn(move || {
            writer.run();
            let _ = end.send(());
        });
        Stderr(Arc::new(Shared { queue, closing, ended: std::sync::Mutex::new(ended), terminal }))
    }

    /// Writes a line. Never waits, never fails.
    pub fn say(&self, line: impl Into<String>) {
        let mut line = line.into();
        line.push('\n');
        self.0.queue.put(Order::Text(line));
    }

    /// Shows progress until what it returns is dropped: a bar on a terminal, elsewhere a line every 30 seconds. Something
    /// that was shown before is replaced.
    pub fn show(&self, source: impl Fn() -> Progress + Send + 'static) -> Shown {
        self.0.queue.put(Order::Show(Box::new(source)));
        Shown { queue: self.0.queue.clone(), terminal: self.0.terminal }
    }

    /// Writes log events from now on, those that the variable RUST_LOG names (warnings and errors without it). Only the
    /// first call of a process has an effect.
    pub fn log(&self) {
        self.log_or("warn");
    }

    /// As [`Stderr::log`]; without RUST_LOG those that `unset` names, in its form.
    pub fn log_or(&self, unset: &str) {
        let filter = || EnvFilter::builder().with_default_directive(LevelFilter::WARN.into());
        let filter = match std::env::var_os(EnvFilter::DEFAULT_ENV) {
            None => filter().parse_lossy(unset),
            Some(_) => filter().from_env().unwrap_or_else(|error| {
                self.say(format!(
                    "RUST_LOG is not obeyed: {error}; write for example RUST_LOG=minisgl=debug"
                ));
                filter().parse_lossy(unset)
            }),
        };
        let queue = self.0.queue.clone();
        let events = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false);
        let _ = events.with_writer(move || Event(queue.clone())).try_init();
    }

    /// Gives what is queued a second to go out; nothing goes out after it. For a program that ends without dropping
    /// everything.
    pub fn finish(&self) {
        self.0.finish();
    }

    /// Is it a terminal, which somebody looks at?
    pub fn is_terminal(&self) -> bool {
        self.0.terminal
    }
}

impl Shared {
    fn finish(&self) {
        self.closing.store(true, Ordering::Release);
        self.queue.put(Order::Wake);
        if let Ok(ended) = self.ended.lock() {
            let _ = ended.recv_timeout(FAREWELL);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Takes the lines of log events, which come whole.
struct Event(Queue);

impl Write for Event {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.put(Order::Text(String::from_utf8_lossy(line).into_owned()));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The thread's side.
struct Writer {
    inbox: Receiver<Order>,
    left_out: Arc<AtomicU64>,
    closing: Arc<AtomicBool>,
    out: Box<dyn Write + Send>,
    /// Where there is a terminal.
    bar: Option<MakeTarget>,
    period: Duration,
    view: Option<View>,
}

impl Writer {
    fn run(mut self) {
        loop {
            match self.next() {
                Ok(Order::Text(text)) => self.write(&text),
                Ok(Order::Show(source)) => self.view = Some(View::new(source, self.bar.as_ref())),
                Ok(Order::Hide(done)) => {
                    self.view = None;
                    // Who asked may have waited long enough.
                    let _ = done.send(());
                }
                Ok(Order::Wake) => {}
                Err(RecvTimeoutError::Timeout) => self.tick(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            match self.left_out.swap(0, Ordering::Relaxed) {
                0 => {}
                count => self.write(&format!("{count} messages were left out: stderr took too long\n")),
            }
        }
    }

    /// The next order; a timeout where progress is due; disconnected when all has been written and nobody is left.
    fn next(&self) -> Result<Order, RecvTimeoutError> {
        if self.closing.load(Ordering::Acquire) {
            return self.inbox.try_recv().map_err(|_| RecvTimeoutError::Disconnected);
        }
        match &self.view {
            None => self.inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(view) => {
                let due = view.seen().map_or_else(Instant::now, |seen| seen + self.period);
                self.inbox.recv_timeout(due.saturating_duration_since(Instant::now()))
            }
        }
    }

    fn write(&mut self, text: &str) {
        let mut write = || {
            let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        };
        match self.view.as_ref().and_then(|view| view.bar.as_ref()) {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn tick(&mut self) {
        let line = self.view.as_mut().and_then(View::tick);
        if let Some(line) = line {
            self.write(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use indicatif::TermLike;

    use super::view::tests::half_done;
    use super::*;

    /// A writer whose content can be read, and which may refuse or sleep.
    #[derive(Clone, Default, Debug)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl Paper {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    impl Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl TermLike for Paper {
        fn width(&self) -> u16 {
            120
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, line: &str) -> io::Result<()> {
            self.write_str(line)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.clone().write_all(text.as_bytes())
        }

        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn wait_until(what: impl Fn() -> bool) {
        let started = Instant::now();
        while !what() {
            assert!(started.elapsed() < Duration::from_secs(20), "it does not come");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn messages_come_out_in_order_before_the_last_handle_is_gone() {
        let paper = Paper::default();
        let stderr = Stderr::over(Box::new(paper.clone()), None, LINE_PERIOD);
        (0..100).for_each(|i| stderr.clone().say(i.to_string()));
        drop(stderr);
        assert_eq!(paper.text(), (0..100).map(|i| format!("{i}\n")).collect::<String>());
    }

    #[test]
    fn a_writer_that_refuses_everything_stops_nobody() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Err(io::ErrorKind::StorageFull.into())
            }
        }
        let stderr = Stderr::over(Box::new(Full), None, Duration::from_millis(1));
        let shown = stderr.show(half_done);
        (0..10).for_each(|_| stderr.say("a message"));
        drop(shown);
        drop(stderr);
    }

    #[test]
    fn a_reader_that_sleeps_holds_nobody_up_and_what_it_missed_is_counted() {
        struct Asleep(Receiver<()>, Paper);
        impl Write for Asleep {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv();
                self.1.write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (wake, asleep) = mpsc::channel();
        let paper = Paper::default();
        let stderr = Stderr::over(Box::new(Asleep(asleep, paper.clone())), None, LINE_PERIOD);
        (0..QUEUE + 50).for_each(|_| stderr.say("x"));
        let started = Instant::now();
        drop(stderr.clone());
        drop(stderr);
        assert!(started.elapsed() >= FAREWELL, "what is queued gets its time");
        drop(wake);
        // The thread's own paper goes with it, when it has written all.
        wait_until(|| Arc::strong_count(&paper.0) == 1);
        assert!(paper.text().contains("messages were left out"));
        let kept = paper.text().matches('x').count();
        assert!((QUEUE..QUEUE + 50).contains(&kept), "{kept}");
    }

    #[test]
    fn without_a_terminal_progress_is_a_line_a_period() {
        let paper = Paper::default();
        let stderr = Stderr::over(Box::new(paper.clone()), None, Duration::from_millis(1));
        let shown = stderr.show(half_done);
        wait_until(|| paper.text().lines().count() > 2);
        drop(shown);
        drop(stderr);
        let text = paper.text();
        assert!(
            text.starts_with("50.0% of 1.00 KiB, 1,200 requests, 0 tok/s, 256 running, 7 waiting, KV 75%\n"),
            "{text}"
        );
    }

    #[test]
    fn on_a_terminal_a_bar_is_drawn_and_messages_go_above_it() {
        let (screen, lines) = (Paper::default(), Paper::default());
        let target = {
            let screen = screen.clone();
            move || ProgressDrawTarget::term_like(Box::new(screen.clone()))
        };
        let stderr = Stderr::over(Box::new(lines.clone()), Some(Box::new(target)), Duration::from_millis(1));
        assert!(stderr.is_terminal());
        let shown = stderr.show(half_done);
        wait_until(|| screen.text().contains("50.0% of 1.00 KiB"));
        assert!(screen.text().contains('█'), "{}", screen.text());
        stderr.say("a message");
        wait_until(|| lines.text() == "a message\n");
        drop(shown);
        drop(stderr);
    }
}
