// The packed batch as core lays it out: 32-bit words, parts at offsets that a step's shape fixes, the same structs on both sides.
//
//   | Header | plan words | Row, Row, … | Token, Token, … | PageUpdate, … | SlotUpdate, … | rules …
//
// What a slot's tokens are drawn by is in slot.cuh: few kernels ask for it, and nearly all for a batch.
#pragma once

struct Header {
    unsigned rows, tokens, samples, updates, output, slot_updates, words, reserved[9];
};

struct Row {
    unsigned slot, first_token, tokens, position, kv_len, sampled, logprobs, mask;
};

struct PageUpdate {
    unsigned index, page;
};

struct Token {
    unsigned id, slot, position, location;
};

static_assert(sizeof(Header) == 64 && sizeof(Row) == 32 && sizeof(PageUpdate) == 8 && sizeof(Token) == 16, "layout");

// Token::id of a token that the host does not know yet: the one the slot sampled last.
#define LAST_TOKEN 0xffffffffu
