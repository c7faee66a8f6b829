"""Batch inference over Ray Data: JSONL or Parquet in, JSONL or Parquet out, an engine a GPU.

    python examples/ray_data.py requests.jsonl results/ --model Qwen/Qwen3-0.6B --concurrency 8

A row has an `id` and a `prompt`, `prompt_token_ids` or `messages`. The same command again goes on where a killed one was.
"""

import argparse
from pathlib import Path

import ray.data

from minisgl import SamplingParams
from minisgl.ray import generate_into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="a *.jsonl or *.parquet, or a folder of them")
    parser.add_argument("output", help="a folder for the results, which all machines see")
    parser.add_argument("--model", required=True)
    parser.add_argument("--concurrency", type=int, default=1, help="engines, one a GPU")
    parser.add_argument("--backend", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-model-len", type=int, help="tokens of a sequence")
    parser.add_argument("--max-tokens", type=int, default=128, help="output tokens at most")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--format", default="parquet", choices=["parquet", "jsonl"], help="of the results")
    flags = parser.parse_args()

    is_parquet = flags.input.endswith(".parquet") or any(Path(flags.input).glob("*.parquet"))
    read = ray.data.read_parquet if is_parquet else ray.data.read_json
    llm = {"model": flags.model, "backend": flags.backend, "max_model_len": flags.max_model_len}
    results = generate_into(
        flags.output,
        read(flags.input),
        llm,
        SamplingParams(temperature=flags.temperature, max_tokens=flags.max_tokens),
        file_format=flags.format,
        concurrency=flags.concurrency,
    )
    errors = results.filter(lambda row: row["error"] is not None).count()
    print(f"{results.count()} rows, {errors} with an error; in {flags.output}")


if __name__ == "__main__":
    main()
