//! A line of an output that an earlier run left.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minisgl::lines::read_result;

fuzz_target!(|line: &[u8]| {
    let _ = read_result(line);
});
