//! Who waits for whom in the kernel, run on the host: blocks that do what `layers_flags.cuh` says, in any order.

use minisgl_core::tensor::splitmix64;

/// The products of a half in a layer, and blocks that have a part in each.
const PRODUCTS: usize = 4;

/// A device whose blocks do what `layers_flags.cuh` says, a step at a time, in any order.
struct Simulated {
    phases: usize,
    /// Of each half, in a layer.
    turns: [usize; 2],
    taken: usize,
    /// Of each phase, the turns that are attended to; of each phase and product, the blocks that ended it.
    done: Vec<usize>,
    ended: Vec<[usize; PRODUCTS]>,
    /// Of each phase and turn, how often it was attended to.
    attended: Vec<Vec<u32>>,
}

/// Who attends has taken turns, and has fetched what is old of the later ones; who multiplies is at a product of a phase.
enum Block {
    Attends { ahead: usize, turns: std::collections::VecDeque<(usize, usize)> },
    Multiplies { at: usize, phase: usize, product: usize },
}

impl Simulated {
    /// The phase and turn of a ticket.
    fn turn(&self, ticket: usize) -> (usize, usize) {
        let (layer, turn) =
            (ticket / (self.turns[0] + self.turns[1]), ticket % (self.turns[0] + self.turns[1]));
        match turn.checked_sub(self.turns[0]) {
            None => (2 * layer, turn),
            Some(turn) => (2 * layer + 1, turn),
        }
    }

    fn can_attend(&self, phase: usize, parts: [usize; PRODUCTS]) -> bool {
        phase < 2 || self.ended[phase - 2][PRODUCTS - 1] == parts[PRODUCTS - 1]
    }

    /// Something that the block does; `None` where it waits or has ended.
    fn go_on(&mut self, block: &mut Block, parts: [usize; PRODUCTS], random: u64) -> Option<()> {
        match block {
            Block::Attends { ahead, turns } => {
                let next = self.turn(self.taken);
                // The warp that fetches takes turns ahead of those that read, whatever the flags say.
                if turns.len() <= *ahead
                    && next.0 < self.phases
                    && (random.is_multiple_of(2) || turns.is_empty())
                {
                    self.taken += 1;
                    turns.push_back(next);
                    return Some(());
                }
                let (phase, turn) = *turns.front()?;
                if !self.can_attend(phase, parts) {
                    return None;
                }
                turns.pop_front();
                self.attended[phase][turn] += 1;
                self.done[phase] += 1;
                Some(())
            }
            Block::Multiplies { at, phase, product } => {
                // The last phase's products are other kernels'.
                if *phase + 1 == self.phases {
                    return None;
                }
                let is_last_layer = *phase + 2 >= self.phases;
                let has_part = *at < parts[*product] && !(*product == PRODUCTS - 1 && is_last_layer);
                if has_part {
                    let ready = match *product {
                        0 => self.done[*phase] == self.turns[*phase % 2],
                        later => self.ended[*phase][later - 1] == parts[later - 1],
                    };
                    if !ready {
                        return None;
                    }
                    self.ended[*phase][*product] += 1;
                }
                (*phase, *product) = match *product + 1 {
                    PRODUCTS => (*phase + 1, 0),
                    next => (*phase, next),
                };
                Some(())
            }
        }
    }
}

#[test]
fn blocks_that_wait_for_each_other_in_any_order_end_with_every_turn_attended_to_once() {
    for draw in 0..400 {
        let random = |i: u64, below: u64| splitmix64(draw << 24 | i) % below;
        let (layers, multiply) = (1 + random(0, 4) as usize, 1 + random(1, 8) as usize);
        // Some products have parts for fewer blocks than there are. A second half may be padding alone.
        let parts = [2, 3, 4, 5].map(|i| 1 + random(i, multiply as u64) as usize);
        let mut device = Simulated {
            phases: 2 * layers,
            turns: [1 + random(6, 40) as usize, random(7, 40) as usize],
            taken: 0,
            done: vec![0; 2 * layers],
            ended: vec![[0; PRODUCTS]; 2 * layers],
            attended: Vec::new(),
        };
        device.attended = (0..2 * layers).map(|phase| vec![0; device.turns[phase % 2]]).collect();
        let attend = (0..1 + random(8, 12))
            .map(|i| Block::Attends { ahead: random(20 + i, 4) as usize, turns: Default::default() });
        let multiply = (0..multiply).map(|at| Block::Multiplies { at, phase: 0, product: 0 });
        let mut blocks: Vec<Block> = attend.chain(multiply).collect();
        for step in 100.. {
            let first = random(step, blocks.len() as u64) as usize;
            let all = blocks.len();
            let went = (0..all).any(|i| {
                device.go_on(&mut blocks[(first + i) % all], parts, random(step << 4 | 1, 1 << 20)).is_some()
            });
            if !went {
                break;
            }
        }
        assert!(device.attended.iter().flatten().all(|times| *times == 1), "a turn is lost, or all wait");
        for block in &blocks {
            match block {
                Block::Attends { turns, .. } => assert!(turns.is_empty()),
                Block::Multiplies { phase, .. } => assert_eq!(*phase + 1, device.phases),
            }
        }
    }
}
