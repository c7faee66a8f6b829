"""`python -m minisgl.bench`: the program `offline-bench`, by default over the requests of mini-sglang's benchmark.

Its line is `Total: 133966tok, Time: …s, Throughput: …tok/s`, as mini-sglang prints it.
"""

import sys

from minisgl import _minisgl
from minisgl.program import signals_end_it


def main() -> int:
    words = sys.argv[1:]
    others = ("--workload", "--requests", "--compare", "--list-models", "--help")
    if not any(word.partition("=")[0] in others for word in words):
        words = ["--workload", "minisgl", *words]
    signals_end_it()
    return 0 if _minisgl.offline_bench("python -m minisgl.bench", words) else 1


if __name__ == "__main__":
    sys.exit(main())
