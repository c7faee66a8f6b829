//! A JSON object, field by field: each is taken by its name, and what nobody takes is an error.
//!
//! ```text
//!   {"id": 7, "top_k": 5.0, "max_token": 9}  ── Fields ──>  take "id"     7        the text that stands there
//!                                                           take "top_k"  5
//!                                                           left over:    max_token
//! ```
//!
//! A value stays the JSON text that it is until somebody asks for it: ids of any size are kept to the letter, a value
//! that can't be read spoils no other field, and nothing deep is walked that nobody wants. Numbers are taken as people
//! and their tools write them: `16.0` is 16.
//!
//! Invariant: a field that is null is as good as absent.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::error::Category;
use serde_json::value::RawValue;

use super::error::{FieldError, ObjectError, shown};

/// How alike a misspelt name and the one that was meant are, of 1.
const ALIKE: f64 = 0.9;

/// The fields of an object that nobody has taken yet.
#[derive(Debug)]
pub struct Fields<'a> {
    values: BTreeMap<String, &'a RawValue>,
    /// A key that stood there twice.
    twice: Option<String>,
    /// All names that were asked for, there or not: what a misspelt one may have been meant to be.
    names: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// Reads an object.
    ///
    /// # Errors
    /// Text that is no JSON, or no object.
    pub fn read(json: &'a str) -> Result<Self, ObjectError> {
        serde_json::from_str(json).map_err(|error: serde_json::Error| match error.classify() {
            Category::Data => ObjectError::NotObject,
            _ => ObjectError::NotJson { cause: cause(&error), line: error.line(), column: error.column() },
        })
    }

    /// All names that were asked for.
    #[cfg(test)]
    pub fn names(&self) -> &[&'static str] {
        &self.names
    }

    /// Does it have a field, null or not, that nobody has taken?
    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// Does it give a field that nobody has taken?
    pub fn gives(&self, name: &str) -> bool {
        self.values.get(name).is_some_and(|value| value.get() != "null")
    }

    /// A field's JSON text.
    pub fn raw(&mut self, name: &'static str) -> Option<&'a RawValue> {
        self.names.push(name);
        self.values.remove(name).filter(|value| value.get() != "null")
    }

    /// A field, read as `T`.
    ///
    /// # Errors
    /// It is not `expected`.
    pub fn take<T: Deserialize<'a>>(
        &mut self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, FieldError> {
        self.raw(name).map(|value| read(name, value, expected)).transpose()
    }

    /// A text.
    ///
    /// # Errors
    /// Something else.
    pub fn text(&mut self, name: &'static str) -> Result<Option<String>, FieldError> {
        self.take(name, "a text")
    }

    /// `true` or `false`.
    ///
    /// # Errors
    /// Something else.
    pub fn flag(&mut self, name: &'static str) -> Result<Option<bool>, FieldError> {
        self.take(name, "true or false")
    }

    /// A number.
    ///
    /// # Errors
    /// Something else.
    pub fn number(&mut self, name: &'static str) -> Result<Option<f32>, FieldError> {
        self.take(name, "a number")
    }

    /// A whole number, as an integer or as a float without a fraction, from `least` on; beyond 32 bits it is the largest
    /// of them.
    ///
    /// # Errors
    /// Something that is not `expected`.
    pub fn whole(
        &mut self,
        name: &'static str,
        least: i128,
        expected: &'static str,
    ) -> Result<Option<i64>, FieldError> {
        let Some(value) = self.raw(name) else { return Ok(None) };
        let Whole(number) = read(name, value, expected)?;
        match number >= least {
            true => Ok(Some(number.min(u32::MAX.into()) as i64)),
            false => Err(wrong(name, value, expected)),
        }
    }

    /// Takes fields, whatever they hold.
    pub fn take_all(&mut self, names: impl IntoIterator<Item = &'static str>) {
        for name in names {
            self.raw(name);
        }
    }

    /// Checks that every field was taken, and stood there once.
    ///
    /// # Errors
    /// The first that was not, or one that stood there twice.
    pub fn finish(mut self) -> Result<(), FieldError> {
        self.check_once()?;
        match self.unknown() {
            Some((name, near)) => Err(FieldError::unknown(&name, near)),
            None => Ok(()),
        }
    }

    /// The first field that was not taken, and the one that it may have been meant to be.
    pub fn unknown(&mut self) -> Option<(String, Option<&'static str>)> {
        let (name, _) = self.values.pop_first()?;
        let alike = |known: &&'static str| (strsim::jaro_winkler(&name, known), *known);
        let near = self.names.iter().map(alike).filter(|(alike, _)| *alike >= ALIKE);
        let near = near.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known);
        Some((name, near))
    }

    /// Checks that no key stood there twice.
    ///
    /// # Errors
    /// One that did.
    pub fn check_once(&self) -> Result<(), FieldError> {
        match &self.twice {
            Some(field) => Err(FieldError::Twice { field: shown(field) }),
            None => Ok(()),
        }
    }
}

/// A value of the field `name`, read as `T`.
///
/// # Errors
/// It is not `expected`, or can't be read at all.
pub fn read<'a, T: Deserialize<'a>>(
    name: &'static str,
    value: &'a RawValue,
    expected: &'static str,
) -> Result<T, FieldError> {
    serde_json::from_str(value.get()).map_err(|error| match error.classify() {
        Category::Data => wrong(name, value, expected),
        _ => FieldError::Unreadable { field: name, cause: cause(&error) },
    })
}

/// A value of the field `name` that is not `expected`.
pub fn wrong(name: &'static str, value: &RawValue, expected: &'static str) -> FieldError {
    FieldError::Wrong { field: name, value: shown(value.get()), expected }
}

/// What the parser says, without where: its place counts from the beginning of a value.
pub fn cause(error: &serde_json::Error) -> String {
    let text = error.to_string();
    shown(text.rsplit_once(" at line ").map_or(text.as_str(), |(cause, _)| cause))
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Object)
    }
}

struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields { values: BTreeMap::new(), twice: None, names: Vec::new() };
        while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
            match fields.values.entry(name) {
                Entry::Vacant(entry) => drop(entry.insert(value)),
                Entry::Occupied(entry) => fields.twice = Some(entry.key().clone()),
            }
        }
        Ok(fields)
    }
}

/// A whole number, however it is written.
#[derive(Debug)]
pub struct Whole(pub i128);

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyNumber)
    }
}

struct AnyNumber;

impl Visitor<'_> for AnyNumber {
    type Value = Whole;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_u64<E>(self, number: u64) -> Result<Whole, E> {
        Ok(Whole(number.into()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Whole, E> {
        Ok(Whole(number.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Whole, E> {
        match number.fract() == 0.0 {
            true => Ok(Whole(number as i128)),
            false => Err(E::custom("a fraction")),
        }
    }
}
