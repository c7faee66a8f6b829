"""Command lines for `python -m minisgl`: the flags of the program `serve`, and mini-sglang's as those.

    --max-running-requests 8   ──┐
    --max-running 8            ──┴──>  --max-running 8
"""

from __future__ import annotations

import signal

#: mini-sglang's flags and ours of the same meaning.
ALIASES = {
    "--model-path": "--model",
    "--max-running-requests": "--max-running",
    "--max-seq-len-override": "--max-seq-len",
    "--max-prefill-length": "--max-prefill-tokens",
    "--max-extend-length": "--max-prefill-tokens",
    "--cuda-graph-max-bs": "--max-graph-batch",
    "--graph": "--max-graph-batch",
    "--tensor-parallel-size": "--tensor-parallel",
    "--tp-size": "--tensor-parallel",
}

#: Its flags that have one meaning here, and the values that ask for it.
NEUTRAL: dict[str, tuple[tuple[str, ...], str]] = {
    "--expert-parallel-size": (("1",), "a model runs on one GPU"),
    "--ep-size": (("1",), "a model runs on one GPU"),
    "--dtype": (("auto", "bfloat16"), "activations are bfloat16 on a GPU and float32 on the CPU"),
    "--attention-backend": (("auto",), "see --kernels"),
    "--attn": (("auto",), "see --kernels"),
    "--moe-backend": (("auto",), "see --kernels"),
    "--model-source": (("huggingface",), "give the folder of a model that comes from elsewhere"),
}

#: Its flags that change nothing here: threads tokenize, and one GPU has nothing to exchange.
IGNORED_WITH_VALUE = frozenset({"--num-tokenizer", "--tokenizer-count"})
IGNORED = frozenset({"--disable-pynccl"})


def translate(words: list[str]) -> tuple[list[str], bool]:
    """Our flags for what `words` ask for, and whether they ask for a conversation in the terminal.

    Raises:
        ValueError: a flag of mini-sglang's that asks for what is not served.
    """
    words = _apart(words)
    out: list[str] = []
    shell = dummy = False
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if word in ("--shell", "--shell-mode"):
            shell = True
        elif word == "--dummy-weight":
            dummy = True
        elif word in IGNORED:
            pass
        elif word in IGNORED_WITH_VALUE or word in NEUTRAL or word == "--cache-type":
            value = words[position] if position < len(words) else ""
            position += 1
            out += _with_value(word, value)
        else:
            out.append(ALIASES.get(word, word))
    return (_dummy(out) if dummy else out), shell


def _apart(words: list[str]) -> list[str]:
    """Each `--flag=value` as two words."""
    apart: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        apart += [flag, value] if equals and flag.startswith("--") else [word]
    return apart


def _with_value(flag: str, value: str) -> list[str]:
    if flag == "--cache-type":
        if value not in ("radix", "naive"):
            raise ValueError(f"--cache-type {value} is neither radix (equal prefixes are kept) nor naive")
        return [] if value == "radix" else ["--no-prefix-cache"]
    if flag in NEUTRAL:
        neutral, instead = NEUTRAL[flag]
        if value not in neutral:
            raise ValueError(f"{flag} {value} is not served by minisgl: {instead}")
    return []


def _dummy(words: list[str]) -> list[str]:
    """Dummy weights are those of a preset, which is called as the last part of the model's name."""
    if "--model" not in words[:-1]:
        return words
    model = words.index("--model") + 1
    return [*words[:model], words[model].rpartition("/")[2].lower(), *words[model + 1 :]]


def signals_end_it() -> None:
    """Leaves Ctrl-C to the program: Python's own handler would only note it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
