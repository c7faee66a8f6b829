"""Offline throughput through the Python package, over the requests of mini-sglang's benchmark.

    python benchmark/offline/bench.py [MODEL]
    MINISGL_DISABLE_OVERLAP_SCHEDULING=1 python benchmark/offline/bench.py

MODEL is Qwen/Qwen3-0.6B if nothing is given; `qwen3-0.6b`, dummy weights of that size, needs no network. The same requests
without Python: offline-bench --workload minisgl.
"""

import argparse
import random
import time

from minisgl.core import SamplingParams
from minisgl.llm import LLM

REQUESTS = 256
LENGTHS = (100, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?", default="Qwen/Qwen3-0.6B")
    llm = LLM(parser.parse_args().model, max_seq_len_override=4096, max_extend_tokens=16384, cuda_graph_max_bs=256)
    highest = min(10_000, llm.info()["vocab_size"] - 1)
    random.seed(0)
    prompts = [[random.randint(0, highest) for _ in range(random.randint(*LENGTHS))] for _ in range(REQUESTS)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=random.randint(*LENGTHS)) for _ in range(REQUESTS)
    ]
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0.1, max_tokens=16), use_tqdm=False)  # Touches everything once.
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = sum(len(output["token_ids"]) for output in outputs)
    print(f"Total: {tokens}tok, Time: {seconds:.2f}s, Throughput: {tokens / seconds:.2f}tok/s")


if __name__ == "__main__":
    main()
