"""Prompts in, texts out: vLLM's first example with another import.

    python examples/offline.py [MODEL]
"""

import sys

from minisgl import LLM, SamplingParams

PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]


def main() -> None:
    llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen3-0.6B")
    params = SamplingParams(temperature=0.8, top_p=0.95)
    for output in llm.generate(PROMPTS, params):
        print(f"Prompt:    {output.prompt!r}\nOutput:    {output.outputs[0].text!r}\n")


if __name__ == "__main__":
    main()
