//! JSON that people can read too: a line a field, and arrays of numbers on one.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::Formatter;

/// Writes a value and a newline.
///
/// # Errors
/// The writer's.
pub fn write_json(value: &impl Serialize, out: &mut impl Write) -> io::Result<()> {
    value.serialize(&mut Serializer::with_formatter(&mut *out, Lines::default()))?;
    out.write_all(b"\n")
}

/// Breaks lines between the fields of objects alone.
#[derive(Default)]
struct Lines {
    depth: usize,
    /// Has the object that ended last, or is about to end, a field?
    has_field: bool,
}

impl Lines {
    fn break_line<W: ?Sized + Write>(&self, out: &mut W) -> io::Result<()> {
        write!(out, "\n{:1$}", "", 2 * self.depth)
    }
}

impl Formatter for Lines {
    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth += 1;
        self.has_field = false;
        out.write_all(b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.depth -= 1;
        if self.has_field {
            self.break_line(out)?;
        }
        out.write_all(b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(b",")?;
        }
        self.break_line(out)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.has_field = true;
        Ok(())
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn written(value: &Value) -> String {
        let mut out = Vec::new();
        write_json(value, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_field_has_a_line_and_so_has_an_array() {
        let text = written(&json!({"a": [1, 2.5, null], "b": {}, "c": [{"d": "x\n"}, {"e": []}]}));
        let expected = r#"{
  "a": [1, 2.5, null],
  "b": {},
  "c": [{
    "d": "x\n"
  }, {
    "e": []
  }]
}
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn what_is_written_is_read_back() {
        let value =
            json!([{"a": {"b": [[], [{}], {"c": {"d": {}}}]}}, "{[\"", 1e300, {"e": [1, {"f": 2}, 3]}]);
        assert_eq!(serde_json::from_str::<Value>(&written(&value)).unwrap(), value);
    }
}
