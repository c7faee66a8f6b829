// attention_ring: keys and values on their way from pages to a block's warps, through a ring of stages in shared memory.
//
//   stage   a section of a unit's keys, or of its values: a tile for each warp that reads; beside a turn's first keys the unit itself
//   order   keys, values, keys, values, ... of unit after unit; behind the last, keys of a unit that says `is_end`
//   queries a turn's, in a ring of their own: they come with the first keys
//
// On Hopper a warp of its own fills the ring: each lane copies a page's share of a leaf (the bytes as they lie, swizzled
// already), which completes on the stage's `full`; threads that have read a stage arrive at its `empty`. Bytes are read once,
// so L2 is told to evict them first. A block's first turn is its number; from then on it takes whichever is next, so that
// blocks that memory serves better do more. Beside prefill rows, whose blocks give way one by one, it takes its first turn so too.
// Elsewhere all threads copy 16 bytes each, one stage ahead, and turns are dealt round.
//
// 1. Copies of older tokens start before the dependent-launch wait: only the keys and values of the row's newest token and of the
//    drafts before it, which are rows of their own, and queries come from the kernel before.
// 2. A turn is taken by counting `taken` up. A block stops at the first turn that does not exist, and so counts once in
//    vain; the last such count sets `taken` to 0 for the next launch. It takes its next turn with the last unit of the one at
//    hand: sooner, and turns would go to who began first, not to who ends first. A half's blocks take it when they begin one,
//    because the other half asks whether all are taken. Three blocks and five turns; a count gives what `taken` was, and turn 3 + that:
//
//      block 0   turn 0    0: turn 3      3: no turn 6, it stops
//      block 1   turn 1          1: turn 4               4: no turn 7, it stops; the last of 2 + 3 counts, so `taken` is 0 again
//      block 2   turn 2                2: no turn 5, it stops
//
// 3. A half of a divided step that begins while the other attends waits, its ring full, until the other's blocks work on their
//    last turns: memory serves who is ahead, whose products wait for it. It waits only while turns are left that any block of
//    the other's takes, and who has taken one does not wait: so one of both goes on, whichever blocks of theirs found room.
//    The kernel behind a half may start when its blocks have filled their last stage, not sooner: it would sit on the place of
//    the other's products.
// 4. Two thirds of a ring, rounded up, are on the way: more would wait in line before memory, with everything that others ask for behind.
// 5. Two neighbouring heads of 64 dims lie side by side in a stage, all tokens of the one before those of the other.
#pragma once

#if __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
#include "hopper/attention/decode_ring.cuh"
#else
#define BULK_COPIES 0
#include "portable/decode_ring.cuh"
#endif
