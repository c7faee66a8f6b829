//! What the CUDA sources declare, for tests that hold it against what this side declares: structs field by field, constants, and
//! the threads that a kernel's launch bounds allow.
//!
//! The sources are read as text: a struct's data come before its functions' bodies, one declaration ends with `;`, and its types
//! are those of [`size_of_type`] or structs of the same or another given source.

use minisgl_kernels::Module;

/// A field: its name, its first byte, its bytes.
pub(crate) type Field = (String, usize, usize);

/// A source below `kernels/cuda`, without comments.
pub(crate) fn source(file: &str) -> String {
    let path = format!("{}/../kernels/cuda/{file}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// Bytes of a type, and what it is aligned to.
fn size_of_type(files: &[&str], name: &str) -> (usize, usize) {
    match name {
        "unsigned short" => (2, 2),
        "unsigned" | "int" | "float" => (4, 4),
        "unsigned long long" => (8, 8),
        "TensorMap" => (128, 64),
        _ => {
            let fields = fields(files, name);
            let align = if fields.iter().any(|(_, _, bytes)| bytes % 8 == 0) { 8 } else { 4 };
            let end = fields.last().map_or(0, |(_, at, bytes)| at + bytes);
            (end.next_multiple_of(align), align)
        }
    }
}

/// The data of `struct name` in the first of these sources that declares it.
pub(crate) fn fields(files: &[&str], name: &str) -> Vec<Field> {
    let opening = format!("struct {name} {{");
    let body = files.iter().find_map(|file| {
        let text = source(file);
        text.find(&opening).map(|at| text[at + opening.len()..].to_owned())
    });
    let body = body.unwrap_or_else(|| panic!("none of {files:?} declares `{opening}`"));
    let mut fields = Vec::new();
    let mut end: usize = 0;
    for statement in statements(&body) {
        let (kind, declared) = declarators(&statement);
        for (name, pointer, count) in declared {
            let (bytes, align) = if pointer { (8, 8) } else { size_of_type(files, &kind) };
            let at = end.next_multiple_of(align);
            end = at + bytes * count;
            fields.push((name, at, bytes * count));
        }
    }
    fields
}

/// The declarations of data of a struct whose body begins the text.
fn statements(body: &str) -> Vec<String> {
    let (mut depth, mut statement, mut statements) = (0, String::new(), Vec::new());
    for letter in body.chars() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => {
                depth -= 1;
                statement.clear();
            }
            ';' if depth == 0 => statements.push(std::mem::take(&mut statement).trim().to_owned()),
            _ if depth == 0 => statement.push(letter),
            _ => {}
        }
    }
    let is_data = |text: &String| {
        let other = ["static", "using", "template", "struct"].iter().any(|word| text.starts_with(word));
        !(text.is_empty() || other || text.contains('('))
    };
    statements.into_iter().filter(is_data).collect()
}

/// A declaration's type, and its names: whether they are pointers, and of how many elements.
fn declarators(statement: &str) -> (String, Vec<(String, bool, usize)>) {
    let statement = statement.replace("const ", "").replace('*', " *");
    let (first, others) = statement.split_once(',').unwrap_or((&statement, ""));
    let words: Vec<&str> = first.split_whitespace().collect();
    let (last, kind) = words.split_last().unwrap_or_else(|| panic!("`{statement}` declares nothing"));
    let kind: Vec<&str> = kind.iter().copied().filter(|word| *word != "*").collect();
    let names =
        std::iter::once(*last).chain(others.split(',').map(str::trim).filter(|name| !name.is_empty()));
    let declared = names.map(|name| {
        let name = name.replace(' ', "");
        let (plain, count) = name.trim_end_matches(']').split_once('[').unwrap_or((&name, "1"));
        let count = count.parse().unwrap_or_else(|_| panic!("`{statement}` has no number of elements"));
        (plain.trim_start_matches('*').to_owned(), plain.starts_with('*'), count)
    });
    (kind.join(" "), declared.collect())
}

/// Bytes of a field, by the way to it.
pub(crate) fn field_bytes<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Holds a struct against the sources' struct of a name: every field by name, place and size, and nothing besides.
macro_rules! assert_declared {
    ($files:expr, $name:literal, $type:ident { $($field:ident),* $(,)? }) => {{
        // Naming every field: one that is added does not pass unseen.
        let _ = |$type { $($field: _),* }: &$type| ();
        let ours: Vec<$crate::declared::Field> = vec![$((
            stringify!($field).to_owned(),
            std::mem::offset_of!($type, $field),
            $crate::declared::field_bytes(|it: &$type| &it.$field),
        )),*];
        assert_eq!($crate::declared::fields($files, $name), ours, "{}", $name);
    }};
}
pub(crate) use assert_declared;

/// The number behind `#define name` or `name =` in a source.
pub(crate) fn constant(file: &str, name: &str) -> u32 {
    let text = source(file);
    let of = |line: &str| {
        let (_, behind) = line
            .split_once(&format!("#define {name} "))
            .or_else(|| line.split_once(&format!(" {name} = ")))?;
        let digits: String = behind.trim().chars().take_while(char::is_ascii_alphanumeric).collect();
        let digits = digits.trim_end_matches('u');
        match digits.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).ok(),
            None => digits.parse().ok(),
        }
    };
    text.lines().find_map(of).unwrap_or_else(|| panic!("{file} has no number {name}"))
}

/// The threads that a kernel's launch bounds allow, as its PTX says; panics where no module has it.
pub(crate) fn threads_of(modules: &[Module], kernel: &str) -> u32 {
    let entry = format!(".entry {kernel}(");
    let ptx = modules.iter().find_map(|module| module.ptx.split_once(entry.as_str()));
    let (_, behind) = ptx.unwrap_or_else(|| panic!("there is no kernel {kernel}"));
    let (head, _) = behind.split_once('{').unwrap_or((behind, ""));
    let bound = head.split_once(".maxntid ").and_then(|(_, bound)| bound.split(',').next());
    bound
        .and_then(|bound| bound.trim().parse().ok())
        .unwrap_or_else(|| panic!("{kernel} has no launch bounds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_are_told_from_functions_and_laid_out_as_a_compiler_does() {
        let body =
            "float *sums, one; unsigned short a[3]; int f() const { return a; } static int N = 1; }; int x;";
        let names: Vec<_> = statements(body).iter().flat_map(|it| declarators(it).1).collect();
        let expected = [("sums", true, 1), ("one", false, 1), ("a", false, 3)];
        assert_eq!(names, expected.map(|(name, pointer, count)| (name.to_owned(), pointer, count)));
        let fields = fields(&["epilogue/row_norm.cuh"], "RowNorm");
        assert_eq!(fields[0], ("sumsq".to_owned(), 0, 8));
        assert_eq!(fields.last(), Some(&("eps".to_owned(), 16, 4)));
    }
}
