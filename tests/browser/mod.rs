//! A real browser, which opens pages and says what became of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Chromium, where there is one.
pub fn find() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];
    let folders: Vec<_> = std::env::split_paths(&path).collect();
    names
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)))
        .find(|file| file.is_file())
}

/// Opens a page and gives its document as it is `seconds` later, by the page's own clock, which stands while something is being
/// fetched and runs ahead where there is nothing to do. Each frame goes through all its stages before that: else the clock may be
/// there while the first frame, which a page that draws by its size waits for, is not.
pub fn document(browser: &Path, url: &str, profile: &Path, dark: bool, width: u32, seconds: u32) -> String {
    let scheme = if dark { 0 } else { 1 };
    let mut child = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"])
        .arg("--run-all-compositor-stages-before-draw")
        .arg(format!("--virtual-time-budget={}", seconds * 1000))
        .arg(format!("--user-data-dir={}", profile.display()))
        .arg(format!("--blink-settings=preferredColorScheme={scheme}"))
        .arg(format!("--window-size={width},900"))
        .arg("--dump-dom")
        .arg(url)
        .stdout(Stdio::from(fs::File::create(profile.with_extension("dom")).unwrap()))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_secs(120) {
            child.kill().unwrap();
            panic!("the browser hangs");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    fs::read_to_string(profile.with_extension("dom")).unwrap()
}
