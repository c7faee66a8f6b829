//! The filter `tojson` as transformers defines it: Python's `json.dumps`, to the byte.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Error, ErrorKind, State};

use super::jinja::charge;

/// `value | tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub fn to_json(state: &State, value: Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut positional = positional.0.into_iter();
    let mut argument = |name: &str| -> Result<Value, Error> {
        let named: Option<Value> = named.get(name)?;
        Ok(positional.next().or(named).unwrap_or(Value::from(())))
    };
    let ensure_ascii = argument("ensure_ascii")?.is_true();
    let indent = indent(state, &argument("indent")?)?;
    let separators = separators(&argument("separators")?, indent.is_some())?;
    let sort_keys = argument("sort_keys")?.is_true();
    named.assert_all_used()?;
    let charge = |bytes| charge(state, bytes);
    let mut writer =
        Writer { charge: &charge, out: String::new(), ensure_ascii, indent, separators, sort_keys, depth: 0 };
    writer.value(&value)?;
    Ok(Value::from(writer.out))
}

/// What indents a level: so many spaces, or a text.
fn indent(state: &State, value: &Value) -> Result<Option<String>, Error> {
    match (value.is_none(), value.as_str()) {
        (true, _) => Ok(None),
        (_, Some(text)) => Ok(Some(text.to_owned())),
        _ => {
            let spaces = usize::try_from(i64::try_from(value.clone())?).unwrap_or(0);
            charge(state, spaces)?;
            Ok(Some(" ".repeat(spaces)))
        }
    }
}

/// Between items, and between a key and its value.
fn separators(value: &Value, indented: bool) -> Result<(String, String), Error> {
    if value.is_none() {
        return Ok(((if indented { "," } else { ", " }).to_owned(), ": ".to_owned()));
    }
    let texts: Vec<String> = value.try_iter()?.filter_map(|text| text.as_str().map(str::to_owned)).collect();
    match <[String; 2]>::try_from(texts) {
        Ok([item, key]) => Ok((item, key)),
        Err(_) => Err(invalid("tojson: separators are two texts")),
    }
}

fn invalid(reason: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason)
}

struct Writer<'a> {
    /// Accounts for bytes before they are written.
    charge: &'a dyn Fn(usize) -> Result<(), Error>,
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    separators: (String, String),
    sort_keys: bool,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        (self.charge)(value.as_str().map_or(0, str::len))?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out += &number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value)?,
            ValueKind::Map => self.object(value)?,
            kind => return Err(invalid(format!("tojson: {kind} is nothing that JSON knows"))),
        }
        Ok(())
    }

    fn list(&mut self, list: &Value) -> Result<(), Error> {
        let items: Vec<Value> = list.try_iter()?.collect();
        self.nested('[', ']', items.len(), |writer, at| writer.value(&items[at]))
    }

    fn object(&mut self, object: &Value) -> Result<(), Error> {
        let mut fields = Vec::new();
        for key in object.try_iter()? {
            fields.push((key_text(&key)?, object.get_item(&key)?));
        }
        if self.sort_keys {
            fields.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.nested('{', '}', fields.len(), |writer, at| {
            let (key, value) = &fields[at];
            writer.string(key);
            writer.out += &writer.separators.1;
            writer.value(value)
        })
    }

    /// What stands between brackets: `len` items, each on a line of its own where there is an indent.
    fn nested(
        &mut self,
        open: char,
        close: char,
        len: usize,
        mut item: impl FnMut(&mut Self, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let indented = self.indent.as_ref().map_or(0, |indent| indent.len().saturating_mul(self.depth + 1));
        let beside = indented.saturating_add(self.separators.0.len() + self.separators.1.len());
        (self.charge)(len.saturating_mul(beside.saturating_add(size_of::<Value>())))?;
        self.out.push(open);
        self.depth += 1;
        for at in 0..len {
            if at > 0 {
                self.out += &self.separators.0;
            }
            self.line();
            item(self, at)?;
        }
        self.depth -= 1;
        if len > 0 {
            self.line();
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out += "\\\"",
                '\\' => self.out += "\\\\",
                '\n' => self.out += "\\n",
                '\r' => self.out += "\\r",
                '\t' => self.out += "\\t",
                '\u{8}' => self.out += "\\b",
                '\u{c}' => self.out += "\\f",
                ' '..='~' => self.out.push(c),
                _ if c >= ' ' && !self.ensure_ascii => self.out.push(c),
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out += &format!("\\u{unit:04x}");
                    }
                }
            }
        }
        self.out.push('"');
    }
}

/// Keys are texts; numbers, truth values and none become them.
fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::Number => Ok(number(key)),
        ValueKind::Bool => Ok((if key.is_true() { "true" } else { "false" }).to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        kind => Err(invalid(format!("tojson: {kind} can't be a key"))),
    }
}

fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float),
        _ => value.to_string(),
    }
}

/// A float as Python writes it: the fewest digits that tell it apart, an exponent of two digits beyond 1e16 and below
/// 1e-4.
fn python_float(value: f64) -> String {
    if !value.is_finite() {
        let infinity = if value > 0.0 { "Infinity" } else { "-Infinity" };
        return (if value.is_nan() { "NaN" } else { infinity }).to_owned();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return format!("{value:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}
