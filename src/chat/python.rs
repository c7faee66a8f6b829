//! Methods of Python's texts, dictionaries and lists, which templates call and minijinja lacks.
//!
//! All that change nothing are here, as Python 3 defines them; those that change their object (`append`, `update`, …)
//! are refused, as by Jinja2's sandbox in transformers. Places count characters. What a method gives the engine accounts for; what
//! may be far more than its arguments is accounted for here before it is made.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

use super::jinja::charge;

/// Answers a call of a method that minijinja doesn't know.
pub fn method(state: &mut State, this: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    charge(state, this.len().unwrap_or(0))?;
    match (this.as_str(), this.kind()) {
        (Some(text), _) => of_text(state, text, name, args),
        (None, ValueKind::Map) => of_dictionary(this, name, args),
        (None, ValueKind::Seq) => of_list(this, name, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// White space as Python's texts know it.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn of_text(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "startswith" | "endswith" => affix(text, name == "endswith", args),
        "find" | "rfind" | "index" | "rindex" | "count" => search(text, name, args),
        "strip" | "lstrip" | "rstrip" => strip(text, name, args),
        "split" | "rsplit" => split(text, name == "rsplit", args),
        "partition" | "rpartition" => partition(text, name == "rpartition", args),
        "splitlines" => split_lines(text, args),
        "ljust" | "rjust" | "center" | "zfill" => pad(text, name, args),
        "join" => join(state, text, args),
        "replace" => replace(state, text, args),
        "format" => {
            charge(state, formatted_len(text, args))?;
            format(FormatStyle::StrFormat, text, args).map(Value::from)
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "upper" => alone(args, text.to_uppercase()),
        "lower" | "casefold" => alone(args, text.to_lowercase()),
        "title" => alone(args, title(text)),
        "capitalize" => alone(args, capitalize(text)),
        "swapcase" => alone(args, swap_case(text)),
        "isspace" => alone(args, every(text, is_space)),
        "isalpha" => alone(args, every(text, char::is_alphabetic)),
        "isalnum" => alone(args, every(text, char::is_alphanumeric)),
        "isdigit" | "isdecimal" | "isnumeric" => alone(args, every(text, char::is_numeric)),
        "isascii" => alone(args, text.is_ascii()),
        "isupper" => {
            alone(args, text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase))
        }
        "islower" => {
            alone(args, text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase))
        }
        "istitle" => alone(args, text.chars().any(char::is_uppercase) && title(text) == text),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn of_dictionary(map: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let keys: Vec<Value> = match name {
        "get" => Vec::new(),
        _ => map.try_iter()?.collect(),
    };
    let value = |key: &Value| map.get_item(key);
    match name {
        "get" => {
            let (key, default): (Value, Option<Value>) = from_args(args)?;
            let value = value(&key)?;
            Ok(if value.is_undefined() { default.unwrap_or(Value::from(())) } else { value })
        }
        "keys" => alone(args, keys),
        "values" => alone(args, keys.iter().map(value).collect::<Result<Vec<_>, _>>()?),
        "items" => {
            let pair = |key: &Value| Ok(Value::from(Tuple::from([key.clone(), value(key)?])));
            alone(args, keys.iter().map(pair).collect::<Result<Vec<_>, Error>>()?)
        }
        "copy" => alone(args, map.clone()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn of_list(list: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match name {
        "count" => {
            let (item,): (Value,) = from_args(args)?;
            Ok(Value::from(list.try_iter()?.filter(|other| *other == item).count()))
        }
        "index" => {
            let (item,): (Value,) = from_args(args)?;
            let place = list.try_iter()?.position(|other| other == item);
            place.map(Value::from).ok_or_else(|| invalid("index: the list has no such item"))
        }
        "copy" => alone(args, list.clone()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// The result of a method that takes no arguments.
fn alone(args: &[Value], result: impl Into<Value>) -> Result<Value, Error> {
    let () = from_args(args)?;
    Ok(result.into())
}

fn invalid(reason: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

fn every(text: &str, holds: impl Fn(char) -> bool) -> bool {
    !text.is_empty() && text.chars().all(holds)
}

/// The part of a text from one place to another, places below zero counted from its end, and the place where it begins.
/// `None` where it begins behind the end.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(&str, usize)> {
    let len = text.chars().count();
    let place = |place: i64| match usize::try_from(place) {
        Ok(place) => place,
        Err(_) => len.saturating_sub(place.unsigned_abs() as usize),
    };
    let (start, end) = (start.map_or(0, place), end.map_or(len, place).min(len));
    let byte = |place: usize| text.char_indices().nth(place).map_or(text.len(), |(at, _)| at);
    (start <= end).then(|| (&text[byte(start)..byte(end)], start))
}

/// `startswith` and `endswith` take one text, or several of which any may match.
fn affix(text: &str, at_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (affix, start, end): (Value, Option<i64>, Option<i64>) = from_args(args)?;
    let Some((text, _)) = part(text, start, end) else { return Ok(Value::from(false)) };
    let matches = |affix: &str| if at_end { text.ends_with(affix) } else { text.starts_with(affix) };
    Ok(Value::from(match affix.as_str() {
        Some(affix) => matches(affix),
        None => affix.try_iter()?.any(|affix| affix.as_str().is_some_and(matches)),
    }))
}

fn search(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (wanted, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let found = part(text, start, end).and_then(|(text, start)| {
        if name == "count" {
            return Some(if wanted.is_empty() {
                text.chars().count() + 1
            } else {
                text.matches(wanted).count()
            });
        }
        let at = if name.starts_with('r') { text.rfind(wanted) } else { text.find(wanted) };
        at.map(|at| start + text[..at].chars().count())
    });
    match (found, name) {
        (Some(number), _) => Ok(Value::from(number)),
        (None, "count") => Ok(Value::from(0)),
        (None, "find" | "rfind") => Ok(Value::from(-1)),
        _ => Err(invalid("index: the text does not hold what is looked for")),
    }
}

/// `strip` and its halves remove the characters given, else white space.
fn strip(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (set,): (Option<&str>,) = from_args(args)?;
    let removed = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
    Ok(Value::from(match name {
        "lstrip" => text.trim_start_matches(removed),
        "rstrip" => text.trim_end_matches(removed),
        _ => text.trim_matches(removed),
    }))
}

/// `split(sep, maxsplit)`: at each separator, at most so many times; without a separator, at runs of white space.
fn split(text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.or(named.get("sep")?).filter(|separator| !separator.is_none());
    let most = most.or(named.get("maxsplit")?).and_then(|most| usize::try_from(most).ok());
    named.assert_all_used()?;
    let most = most.unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = match separator.as_ref().map(Value::as_str) {
        None if from_end => split_at_space_from_end(text, most),
        None => split_at_space(text, most),
        Some(None) => return Err(invalid("split: the separator is no text")),
        Some(Some("")) => return Err(invalid("split: the separator is empty")),
        Some(Some(separator)) if from_end => text.rsplitn(most.saturating_add(1), separator).collect(),
        Some(Some(separator)) => text.splitn(most.saturating_add(1), separator).collect(),
    };
    if from_end {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

fn split_at_space(text: &str, most: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = if words.len() < most { rest.find(is_space) } else { None };
        words.push(&rest[..end.unwrap_or(rest.len())]);
        rest = end.map_or("", |end| rest[end..].trim_start_matches(is_space));
    }
    words
}

/// The words, the last one first.
fn split_at_space_from_end(text: &str, most: usize) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        let space = if words.len() < most { rest.rfind(is_space) } else { None };
        let from = space.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
        words.push(&rest[from..]);
        rest = rest[..space.unwrap_or(0)].trim_end_matches(is_space);
    }
    words
}

fn partition(text: &str, from_end: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(invalid("partition: the separator is empty"));
    }
    let at = if from_end { text.rfind(separator) } else { text.find(separator) };
    let parts = match at {
        Some(at) => [&text[..at], separator, &text[at + separator.len()..]],
        None if from_end => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

/// Lines end at each of Python's line boundaries, which are more than a newline.
fn split_lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.or(named.get("keepends")?).unwrap_or(false);
    named.assert_all_used()?;
    let boundary =
        |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(boundary).unwrap_or(rest.len());
        let mark = match rest[end..].chars().next() {
            Some('\r') if rest[end..].starts_with("\r\n") => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        lines.push(Value::from(&rest[..if keep { end + mark } else { end }]));
        rest = &rest[end + mark..];
    }
    Ok(Value::from(lines))
}

fn pad(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (width, fill): (i64, Option<&str>) = from_args(args)?;
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    if missing > 1 << 20 {
        return Err(invalid("the text would be padded to more than a million characters"));
    }
    let fill = |count: usize| fill.unwrap_or(if name == "zfill" { "0" } else { " " }).repeat(count);
    Ok(Value::from(match name {
        "ljust" => format!("{text}{}", fill(missing)),
        "rjust" => format!("{}{text}", fill(missing)),
        "zfill" => {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", fill(missing))
        }
        _ => {
            // An odd one is to the left where the width is odd.
            let left = missing / 2 + (missing & width as usize & 1);
            format!("{}{text}{}", fill(left), fill(missing - left))
        }
    }))
}

fn join(state: &State, separator: &str, args: &[Value]) -> Result<Value, Error> {
    let (items,): (Value,) = from_args(args)?;
    let mut texts = Vec::new();
    for item in items.try_iter()? {
        let text = item.as_str().ok_or_else(|| invalid("join: an item is no text"))?;
        charge(state, size_of::<String>() + text.len() + separator.len())?;
        texts.push(text.to_owned());
    }
    Ok(Value::from(texts.join(separator)))
}

fn replace(state: &State, text: &str, args: &[Value]) -> Result<Value, Error> {
    let (from, to, most): (&str, &str, Option<i64>) = from_args(args)?;
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    charge(state, text.matches(from).take(most).count().saturating_mul(to.len()))?;
    Ok(Value::from(text.replacen(from, to, most)))
}

/// Bytes that a text may have once it is formatted, at most: any number in it may be a width, and any brace the longest argument.
fn formatted_len(text: &str, args: &[Value]) -> usize {
    let widths = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = widths.map(|digits| digits.parse().unwrap_or(usize::MAX)).fold(0, usize::saturating_add);
    let longest = args.iter().filter_map(Value::len).max().unwrap_or(0);
    text.matches('{').count().saturating_mul(longest).saturating_add(widths)
}

/// Each run of letters begins with a capital; what follows in it is small.
fn title(text: &str) -> String {
    let mut written = String::with_capacity(text.len());
    let mut in_word = false;
    for c in text.chars() {
        match in_word {
            true => written.extend(c.to_lowercase()),
            false => written.extend(capital(c)),
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    written
}

fn capitalize(text: &str) -> String {
    let mut rest = text.chars();
    let first: String = rest.next().into_iter().flat_map(capital).collect();
    first + &rest.as_str().to_lowercase()
}

/// A letter at the beginning of a word: of two that a capital becomes, only the first one is large (`ß`: `Ss`).
fn capital(c: char) -> impl Iterator<Item = char> {
    c.to_uppercase().enumerate().flat_map(|(at, c)| {
        let small = (at > 0).then(|| c.to_lowercase());
        let large = (at == 0).then_some(c);
        large.into_iter().chain(small.into_iter().flatten())
    })
}

fn swap_case(text: &str) -> String {
    let swap = |c: char| match c.is_uppercase() {
        true => c.to_lowercase().collect::<String>(),
        false => c.to_uppercase().collect(),
    };
    text.chars().map(swap).collect()
}
