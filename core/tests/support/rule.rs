//! A constraint whose masks are hashes of the output so far, and come as late as one likes.

use std::sync::Mutex;

use minisgl_core::constraint::{Constraint, ConstraintState};

use super::expected::{Allowed, allowed};

/// See the module.
#[derive(Debug)]
pub struct Rule {
    seed: u32,
    /// How often it says that it has no mask yet, after each token.
    late: u32,
    heard: Mutex<Heard>,
}

#[derive(Debug)]
struct Heard {
    output: Vec<u32>,
    left: u32,
}

impl Rule {
    /// It allocates now, and no more for an output of up to 64 tokens.
    pub fn new(seed: u32, late: u32) -> Rule {
        Rule { seed, late, heard: Mutex::new(Heard { output: Vec::with_capacity(64), left: late }) }
    }
}

impl Constraint for Rule {
    fn accept(&self, token: u32) {
        let heard = &mut *self.heard.lock().unwrap();
        assert_eq!(heard.left, 0, "a token was drawn before its mask was known");
        match allowed(self.seed, &heard.output) {
            Allowed::Mask(mask) => assert!(mask >> token & 1 == 1, "token {token} was not allowed"),
            end => panic!("token {token} was drawn behind {end:?}"),
        }
        heard.output.push(token);
        heard.left = self.late;
    }

    fn state(&self) -> ConstraintState {
        let heard = &mut *self.heard.lock().unwrap();
        if heard.left > 0 {
            heard.left -= 1;
            return ConstraintState::Computing;
        }
        match allowed(self.seed, &heard.output) {
            Allowed::Mask(_) => ConstraintState::Ready,
            Allowed::Nothing => ConstraintState::Complete,
            Allowed::Unknown => ConstraintState::Failed,
        }
    }

    fn wait(&self) {
        self.heard.lock().unwrap().left = 0;
    }

    fn write_mask(&self, mask: &mut [u32]) {
        match allowed(self.seed, &self.heard.lock().unwrap().output) {
            Allowed::Mask(bits) => mask.copy_from_slice(&[bits]),
            end => panic!("{end:?} is no mask"),
        }
    }
}
