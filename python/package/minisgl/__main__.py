"""`python -m minisgl --model Qwen/Qwen3-0.6B`: a service with OpenAI's API; with `--shell`, a conversation in the terminal."""

import sys

from minisgl import _minisgl
from minisgl.program import signals_end_it, translate


def main() -> int:
    try:
        words, shell = translate(sys.argv[1:])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    signals_end_it()
    program = _minisgl.chat if shell else _minisgl.serve
    return 0 if program("python -m minisgl" + (" --shell" if shell else ""), words) else 1


if __name__ == "__main__":
    sys.exit(main())
