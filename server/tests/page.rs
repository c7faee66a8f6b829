//! The page at `/`, opened by a real browser where there is one.

#[path = "../../tests/browser/mod.rs"]
mod browser;
mod common;

use std::io::{self, Write};

use common::{Running, Scratch, settings};
use minisgl_server::Settings;

/// The text of the element of this id.
fn text_of<'a>(document: &'a str, id: &str) -> &'a str {
    let (_, rest) =
        document.split_once(&format!("id=\"{id}\"")).unwrap_or_else(|| panic!("no {id}: {document}"));
    let (_, rest) = rest.split_once('>').unwrap();
    rest.split_once("</").unwrap().0
}

#[test]
fn the_page_and_what_it_needs_are_part_of_the_program_and_load_nothing_from_elsewhere() {
    let running = Running::tiny(Settings { api_keys: vec!["secret".to_owned()], ..settings() });
    let page = running.get("/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    for file in ["/page.css", "/page.js"] {
        let file = running.get(file);
        assert_eq!(file.status, 200, "no key is asked for");
        assert!(!String::from_utf8(file.body).unwrap().contains("http"), "it names another place");
    }
}

#[test]
fn a_prompt_is_tried_and_the_metrics_are_drawn_in_a_browser() {
    let Some(browser) = browser::find() else {
        // Past the capture that hides what a passing test prints.
        let _ = writeln!(io::stderr(), "skipped: there is no Chromium here");
        return;
    };
    let (scratch, running) = (Scratch::new(), Running::tiny(settings()));
    for (kind, prompt, dark, width) in [
        ("chat", "Hello%20there", false, 1200),
        ("text", "Once", true, 390),
        ("ids", "5,%206,%207", false, 390),
    ] {
        let url =
            format!("http://{}/#prompt={prompt}&kind={kind}&temperature=1&tokens=12&run", running.address);
        let profile = scratch.path().join(kind);
        let document = browser::document(&browser, &url, &profile, dark, width, 5);
        assert_eq!(text_of(&document, "fault"), "", "{document}");
        assert_eq!(text_of(&document, "model"), "model, up to 256 tokens");
        assert!(text_of(&document, "said-of").contains(" tokens, the first after "), "{document}");
        if kind == "ids" {
            let ids: Vec<_> = text_of(&document, "answer").split_whitespace().collect();
            assert!(!ids.is_empty() && ids.iter().all(|id| id.parse::<u32>().is_ok()), "{ids:?}");
        }
        assert_eq!(document.matches("<polyline points=\"").count(), 8, "every chart is drawn: {document}");
        for broken in ["NaN", "undefined", "Infinity", "[object"] {
            assert!(!document.contains(broken), "{broken}: {document}");
        }
    }
    // What can't be run is said where the answer would be.
    let url = format!("http://{}/#kind=ids&prompt=999999&run", running.address);
    let document = browser::document(&browser, &url, &scratch.path().join("fault"), false, 800, 5);
    assert!(text_of(&document, "fault").contains("outside the vocabulary"), "{document}");
}
