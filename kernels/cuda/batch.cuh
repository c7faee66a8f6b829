// The packed batch as core lays it out: 32-bit words, parts at offsets that a step's shape fixes, the same structs on both sides.
//
//   | Header | plan words | Row, Row, … | Token, Token, … | PageUpdate, … | SlotUpdate, … | rules …
#pragma once

struct Header {
    unsigned rows, tokens, samples, updates, output, slot_updates, reserved[10];
};

struct Row {
    unsigned slot, first_token, tokens, position, kv_len, sampled, logprobs, mask;
};

// How the tokens of a slot are drawn.
struct SlotState {
    float temperature;
    unsigned top_k;
    float top_p, min_p;
    unsigned seed_low, seed_high;
    unsigned edits;  // 0: nothing below is looked at
    float repetition, presence, frequency;
    unsigned prompt_len, endings_from, biases, endings, bad_words, reserved;
};

struct SlotUpdate {
    unsigned slot, rules, rule_words, reserved;
    SlotState state;
};

struct PageUpdate {
    unsigned index, page;
};

struct Token {
    unsigned id, slot, position, location;
};

static_assert(sizeof(Header) == 64 && sizeof(Row) == 32 && sizeof(PageUpdate) == 8 && sizeof(Token) == 16, "layout");
static_assert(sizeof(SlotState) == 64 && sizeof(SlotUpdate) == 80, "layout");

// Words of a slot's region of rules.
#define RULE_WORDS 3328u

// Token::id of a token that the host does not know yet: the one the slot sampled last.
#define LAST_TOKEN 0xffffffffu
