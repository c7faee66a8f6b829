// How the tokens of a slot are drawn, as the device keeps it and the batch changes it: the same structs as core's.
#pragma once

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

static_assert(sizeof(SlotState) == 64 && sizeof(SlotUpdate) == 80, "layout");

// Words of a slot's region of rules.
#define RULE_WORDS 3328u
