//! Calls of functions, in the form in which a model writes them, as a grammar.
//!
//! ```text
//!   required   [thought] call [between call]…          thought   <think> … </think>, or from within one
//!   free       [text call]… text                       call      before(f) arguments behind, for one of the functions f
//! ```
//!
//! The texts around arguments are the caller's, to the letter; arguments are JSON that the function's schema describes.

use serde_json::Value;

/// Calls that an output is held to.
#[derive(Clone, Debug)]
pub struct Calls<'a> {
    /// Those that may be called, at least one.
    pub functions: Vec<CallOf<'a>>,
    /// What stands behind arguments.
    pub behind: &'a str,
    /// What stands between two calls.
    pub between: &'a str,
    /// What each call begins with, where calls may stand in a text; `None`: they are the whole output, which begins with neither
    /// a brace nor white space where it is text, nor with what is overlooked and a brace.
    pub opening: Option<&'a str>,
    /// What may stand before calls that are the whole output: who reads them overlooks it.
    pub tag: &'a str,
    /// What a thought begins and ends with: one before `tag`, or before calls, is overlooked as well.
    pub thought_tags: (&'a str, &'a str),
    /// The output is calls and nothing else.
    pub required: bool,
    /// There may be several.
    pub parallel: bool,
    /// What may come before them.
    pub thought: Option<Thought<'a>>,
}

/// A function that may be called.
#[derive(Clone, Debug)]
pub struct CallOf<'a> {
    /// Its name, for errors.
    pub name: &'a str,
    /// What stands in front of its arguments.
    pub before: String,
    /// The schema of its arguments.
    pub arguments: &'a Value,
}

/// What a model thinks before it answers.
#[derive(Clone, Copy, Debug)]
pub struct Thought<'a> {
    /// It may begin with this; `None`: the prompt ends within it.
    pub begin: Option<&'a str>,
    /// It ends with this.
    pub end: &'a str,
}

impl Calls<'_> {
    /// The grammar, in llguidance's form of Lark's syntax; `schema` prepares a function's.
    pub(crate) fn lark(&self, schema: impl Fn(&Value) -> Value) -> String {
        let mut lark = String::new();
        let opening = self.opening.filter(|_| !self.required);
        let mut rule = |name: &str, is: &str| lark.push_str(&format!("{name}: {is}\n"));
        let names: Vec<String> = (0..self.functions.len()).map(|i| format!("call_{i}")).collect();
        for (name, function) in names.iter().zip(&self.functions) {
            let before = function.before.strip_prefix(opening.unwrap_or("")).unwrap_or(&function.before);
            let (before, behind) = (literal(before), literal(self.behind));
            rule(name, &format!("{before} %json {} {behind}", schema(function.arguments)));
        }
        rule("call", &names.join(" | "));
        let between = literal(self.between);
        rule("calls", &if self.parallel { format!("call ({between} call)*") } else { "call".to_owned() });
        rule("ANYTHING", r"/(.|\n)*/");
        let answer = match (self.required, opening) {
            (true, _) => "calls",
            (false, Some(opening)) => {
                rule("opened[lazy]", &format!("ANYTHING {}", literal(opening)));
                if self.parallel { "(opened call)* ANYTHING" } else { "opened call | ANYTHING" }
            }
            (false, None) => {
                let (begin, end) = self.thought_tags;
                rule("OVERLOOKED", &format!(r"{} ANYTHING {} /\s*/", literal(begin), literal(end)));
                let tag = literal(self.tag);
                rule("LIKE_A_CALL", &format!(r"(OVERLOOKED | {tag} | OVERLOOKED {tag}) /\s*\{{(.|\n)*/"));
                rule("UNLIKE_A_CALL", r"/[^{\s](.|\n)*/ & ~LIKE_A_CALL");
                "calls | UNLIKE_A_CALL"
            }
        };
        rule("answer", answer);
        match self.thought {
            Some(Thought { begin: Some(begin), end }) if self.required => {
                rule("thought[lazy]", &format!("{} ANYTHING {}", literal(begin), literal(end)));
                rule("start", &format!("(thought {GAP})? answer"));
            }
            Some(Thought { begin: None, end }) => {
                rule("thought[lazy]", &format!("ANYTHING {}", literal(end)));
                rule("start", &format!("thought {GAP} answer"));
            }
            // What is thought is text, where there may be text.
            _ => rule("start", "answer"),
        }
        lark
    }
}

/// Between a thought and the answer.
const GAP: &str = r"/\n{1,2}/?";

/// A text as a grammar has it: as JSON does.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}
