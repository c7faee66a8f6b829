//! The flags of a program's help, held against the tables of the docs: each flag stands in one, no other does, and where the help
//! names a default in a word, so does the table.

use std::collections::BTreeMap;

/// Each flag of a help text, and what is said of it.
fn of_help(help: &str) -> BTreeMap<String, String> {
    let mut flags = BTreeMap::new();
    let mut current = None;
    for line in help.lines() {
        let is_flag = line.starts_with("  --");
        let mut words = line.split_whitespace();
        if is_flag {
            current = words.next().map(|flag| flag.trim_end_matches(',').to_owned());
        } else if !line.starts_with("      ") {
            current = None;
        }
        if let Some(flag) = current.as_ref().filter(|flag| *flag != "--help") {
            let said: &mut String = flags.entry(flag.clone()).or_default();
            words.for_each(|word| *said += &format!("{word} "));
        }
    }
    flags
}

/// Each flag of the tables of a text, and the last cell of its row.
fn of_tables(text: &str) -> BTreeMap<String, String> {
    let mut flags = BTreeMap::new();
    for row in text.lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<&str> = row.trim().trim_matches('|').split('|').map(str::trim).collect();
        let (names, default) = (cells[0], cells[cells.len() - 1]);
        for name in names.split('`').filter(|name| name.starts_with("--")) {
            flags.insert(name.to_owned(), default.to_owned());
        }
    }
    flags
}

/// The default that a help names in a word: `(default 16384 on a GPU)`, `auto (default)`.
fn default_of(said: &str) -> Option<&str> {
    if let Some((before, _)) = said.split_once(" (default)") {
        return before.split_whitespace().last();
    }
    let (_, behind) = said.split_once("(default ")?;
    let default = behind.split([',', ';', ')', ':']).next()?.trim();
    let (first, others) = default.split_once(' ').unwrap_or((default, ""));
    (others.is_empty() || first.parse::<f64>().is_ok()).then_some(first)
}

/// Holds a program's help against the tables in texts.
#[track_caller]
pub fn assert_documented(help: &str, texts: &[&str]) {
    let (help, tables) = (of_help(help), of_tables(&texts.join("\n")));
    assert!(help.len() > 5, "no help: {help:?}");
    let missing: Vec<_> = help.keys().filter(|flag| !tables.contains_key(*flag)).collect();
    let unknown: Vec<_> = tables.keys().filter(|flag| !help.contains_key(*flag)).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "not in the docs: {missing:?}; not in the help: {unknown:?}"
    );
    for (flag, said) in &help {
        if let Some(default) = default_of(said) {
            let table = &tables[flag];
            let mut words = table.split(|c: char| c.is_whitespace() || "`,;:()".contains(c));
            assert!(words.any(|word| word == default), "{flag}: by default {default}, in the docs {table}");
        }
    }
}

/// The part of a text from the line that begins with `from` up to the one that begins with `to`.
#[track_caller]
pub fn part<'a>(text: &'a str, from: &str, to: &str) -> &'a str {
    let begin = text.find(&format!("\n{from}")).unwrap_or_else(|| panic!("no line begins with {from}"));
    let behind = &text[begin + 1..];
    let end = behind.find(&format!("\n{to}")).unwrap_or_else(|| panic!("no line begins with {to}"));
    &behind[..end]
}
