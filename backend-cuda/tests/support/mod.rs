//! Which shapes a test takes: all, or few of them where a kernel takes a hundred times as long as it should.

/// The shapes that a test goes through: all of `shapes`, or with `MINISGL_TEST_SHAPES=few`, under a sanitizer say, every
/// fourth, beginning with the first.
pub fn taken<T, const N: usize>(shapes: [T; N]) -> impl Iterator<Item = T> {
    let few = std::env::var_os("MINISGL_TEST_SHAPES").is_some_and(|value| value == "few");
    shapes.into_iter().step_by(if few { 4 } else { 1 })
}
