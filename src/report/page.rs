//! A report as a page: one file with the numbers as JSON and a script that draws them. It asks no network for anything.
//!
//! The page follows the reader's choice of light or dark, and charts are as wide as their place.

use std::io::{self, Write};

use serde::Serialize;

const PAGE: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");
const JS: &str = include_str!("page.js");

/// Writes the page of a report: a [`Setup`](super::Setup) with `runs` beside it, each a
/// [`RunRecord`](crate::telemetry::RunRecord) and what else is known of it.
///
/// # Errors
/// The writer's.
pub fn write_page(title: &str, report: &impl Serialize, out: &mut impl Write) -> io::Result<()> {
    let json = in_script(&serde_json::to_string(report)?);
    let mut rest = PAGE;
    while let Some((text, tail)) = rest.split_once('{') {
        let Some((name, tail)) = tail.split_once('}') else { break };
        let content = match name {
            "title" => &in_text(title),
            "css" => CSS,
            "json" => &json,
            "js" => JS,
            _ => "",
        };
        out.write_all(text.as_bytes())?;
        out.write_all(content.as_bytes())?;
        rest = tail;
    }
    out.write_all(rest.as_bytes())
}

/// JSON that ends no script element, whatever its strings hold.
fn in_script(json: &str) -> String {
    // A `<` can only stand in a string.
    json.replace('<', "\\u003c")
}

fn in_text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn no_text_of_a_report_can_break_out_of_the_page() {
        let report = json!({"command": ["</script><script>alert(1)</script>", "<!--", "{js}", "]]>&amp;"]});
        let mut page = Vec::new();
        write_page("a <b> & {css}", &report, &mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        assert!(page.contains("<title>a &lt;b> &amp; {css}</title>"));
        assert_eq!(page.matches("<script").count(), 2, "the numbers and the script");
        assert_eq!(page.matches("</script").count(), 2);
        let json = page.split_once(r#"id="report">"#).unwrap().1.split_once("</script>").unwrap().0;
        assert_eq!(serde_json::from_str::<Value>(json).unwrap(), report);
    }

    #[test]
    fn a_page_needs_no_network() {
        for asset in [PAGE, CSS, JS] {
            for word in ["src=", "href=", "@import", "url(", "fetch(", "XMLHttpRequest", "import("] {
                assert!(!asset.contains(word), "{word}");
            }
            let links: Vec<_> = asset.match_indices("http").map(|(at, _)| &asset[at..]).collect();
            assert!(links.iter().all(|link| link.starts_with("http://www.w3.org/2000/svg")), "{links:?}");
        }
    }
}
