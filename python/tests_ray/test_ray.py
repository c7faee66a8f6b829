"""`minisgl.ray` on a real Ray, with engines on the CPU: two actors, one of which is killed half-way.

Takes some minutes, so it is not among the package's other tests: python/check ray

MINISGL_RAY_ROWS=5000 python/check ray -k is_killed    takes so many rows where an actor is killed (400 without it)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import ray
import ray.data
from conftest import FIXTURES

from minisgl import LLM, SamplingParams
from minisgl.ray import generate, generate_into, seed_of

PARAMS = SamplingParams(temperature=1, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def arguments(checkpoint):
    return {"model": checkpoint, "backend": "cpu", "max_model_len": 64, "max_num_seqs": 32, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    # Ray's workers have a low priority by default, and so stand still beside whatever else the machine does.
    os.environ["RAY_worker_niceness"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


def rows_of(dataset):
    return sorted(dataset.take_all(), key=lambda row: row["id"])


def actors():
    """The processes of this machine that are actors of the stage, and belong to this test."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                command = (process / "cmdline").read_bytes()
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if command.startswith(b"ray::") and b"_Actor" in command and parent in raylets():
                found.append(int(process.name))
    return found


def raylets():
    """The process ids of the nodes that this process started."""
    node = ray._private.worker._global_node
    return {str(info.process.pid) for info in node.all_processes.get("raylet", [])}


def test_rows_get_columns_and_errors_are_rows_too(arguments):
    rows = [
        {"id": 0, "prompt": "Once", "kept": "a"},
        {"id": 1, "prompt": "Once upon " * 200, "kept": "b"},
        {"id": 2, "prompt": None, "kept": "c"},
        {"id": 3, "prompt": "Once", "kept": "d"},
    ]
    results = rows_of(generate(ray.data.from_items(rows), arguments, PARAMS, batch_size=2))
    assert [row["kept"] for row in results] == ["a", "b", "c", "d"]
    assert [row["finish_reason"] for row in results] == ["length", "error", None, "length"]
    assert "max_model_len" in results[1]["error"] and results[1]["generated_text"] is None
    assert "the row has none of" in results[2]["error"]
    llm = LLM(**arguments, quiet=True)
    for row in (results[0], results[3]):
        params = SamplingParams(temperature=1, max_tokens=6, ignore_eos=True, seed=seed_of(0, row["id"]))
        alone = llm.generate(["Once"], params, use_tqdm=False)[0]
        assert list(row["generated_token_ids"]) == alone.outputs[0].token_ids, "whatever the batch and the actor"
        assert row["generated_text"] == alone.outputs[0].text and row["num_prompt_tokens"] == len(alone.prompt_token_ids)


def test_a_prompt_may_be_ids_or_messages_and_sampling_a_column(arguments):
    table = pa.table({"id": ["x", "y"], "prompt_token_ids": [[1, 2, 3], [-4]], "sampling_params": [{"max_tokens": 2}, {}]})
    results = rows_of(generate(ray.data.from_arrow(table), arguments, PARAMS))
    assert len(results[0]["generated_token_ids"]) == 2
    assert "-4 is no token id" in results[1]["error"]
    rows = [{"id": 1, "messages": [{"role": "user", "content": "Hi"}]}, {"id": 2, "messages": [{"role": None, "content": "Hi"}]}]
    results = rows_of(generate(ray.data.from_items(rows), arguments, PARAMS))
    assert results[0]["num_prompt_tokens"] > 5 and "no role" in results[1]["error"]


def test_every_row_has_one_result_though_an_actor_is_killed(arguments, tmp_path):
    count = int(os.environ.get("MINISGL_RAY_ROWS", 400))
    dataset = ray.data.from_items([{"id": i, "prompt_token_ids": [1 + i % 500, 2, 3]} for i in range(count)])
    killed = []

    def kill_one_half_way():
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("part-*"))) < count // 80 and time.monotonic() < end:
            time.sleep(0.05)
        found = actors()
        if len(found) == 2:
            os.kill(found[0], signal.SIGKILL)
            killed.append(len(list(tmp_path.glob("part-*"))))

    killer = threading.Thread(target=kill_one_half_way)
    killer.start()
    results = rows_of(generate_into(tmp_path, dataset, arguments, PARAMS, concurrency=2, batch_size=16))
    killer.join()
    assert killed and killed[0] < count // 16, "it was killed while there was work"
    assert [row["id"] for row in results] == list(range(count))
    assert all(row["error"] is None and len(row["generated_token_ids"]) == 6 for row in results)
    # What a row draws depends on itself alone: the same rows again, in other batches.
    again = rows_of(generate(dataset.limit(100), arguments, PARAMS, batch_size=17))
    assert [list(row["generated_token_ids"]) for row in again] == [list(row["generated_token_ids"]) for row in results[:100]]


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_a_job_goes_on_where_it_was(arguments, tmp_path, file_format):
    rows = [{"id": i, "prompt_token_ids": [1 + i]} for i in range(40)]
    job = {"llm": arguments, "sampling_params": PARAMS, "file_format": file_format, "batch_size": 8}
    first = rows_of(generate_into(tmp_path, ray.data.from_items(rows[:20]), **job))
    (tmp_path / ".part-of-a-killed-writer").write_text("half a lin")
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    results = rows_of(generate_into(tmp_path, ray.data.from_items(rows), **job))
    assert [row["id"] for row in results] == list(range(40))
    assert [list(row["generated_token_ids"]) for row in results[:20]] == [list(row["generated_token_ids"]) for row in first]
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert written.items() <= now.items(), "what was there did not run again"
    with pytest.raises(ValueError, match="go on with file_format"):
        generate_into(tmp_path, ray.data.from_items(rows), **{**job, "file_format": "jsonl" if file_format == "parquet" else "parquet"})


def test_ids_that_look_like_times_stay_texts(arguments, tmp_path):
    ids = ["2024-01-01", "2024-01-02", "x"]
    job = {"llm": arguments, "sampling_params": PARAMS, "file_format": "jsonl", "batch_size": 1}
    for count in (2, 3):
        dataset = ray.data.from_items([{"id": row_id, "prompt_token_ids": [1]} for row_id in ids[:count]])
        results = rows_of(generate_into(tmp_path, dataset, **job))
        assert [row["id"] for row in results] == ids[:count]
    assert len(list(tmp_path.glob("part-*"))) == 3, "what was there did not run again"


def test_rows_without_an_id_are_refused_before_anything_runs(arguments, tmp_path):
    with pytest.raises(ValueError, match="id_column"):
        generate_into(tmp_path / "none", ray.data.from_items([{"key": 1, "prompt": "Once"}]), arguments, PARAMS)
    assert not (tmp_path / "none").exists()


def test_a_part_that_others_contain_goes(arguments, tmp_path):
    dataset = ray.data.from_items([{"id": i, "prompt_token_ids": [1 + i]} for i in range(4)])
    results = rows_of(generate_into(tmp_path / "a", dataset, arguments, PARAMS, batch_size=4))
    generate_into(tmp_path / "b", dataset, arguments, PARAMS, batch_size=1)
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    assert rows_of(generate_into(tmp_path / "b", dataset, arguments, PARAMS)) == results


def test_a_job_killed_while_it_rewrote_parts_loses_no_row(arguments, tmp_path):
    """Each part has a row and an error; parts without the error lie beside some of them, as a killed job leaves them."""
    pairs = [(i, 100 + i) for i in range(16)]
    rows = [{"id": i, "prompt_token_ids": [1] if i < 100 else [-1]} for pair in pairs for i in pair]
    job = {"llm": arguments, "sampling_params": PARAMS, "batch_size": 2}
    dataset = ray.data.from_items(rows, override_num_blocks=1)
    generate_into(tmp_path / "before", dataset, **job)
    assert len(list((tmp_path / "before").glob("part-*"))) == len(pairs)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    generate_into(tmp_path / "after", dataset, retry_errors=True, **job)
    shutil.copytree(tmp_path / "before", tmp_path / "after", dirs_exist_ok=True)
    results = rows_of(generate_into(tmp_path / "after", dataset, retry_errors=True, **job))
    assert [row["id"] for row in results] == sorted(row["id"] for row in rows)


def test_errors_run_again_where_that_is_asked_for(arguments, tmp_path):
    rows = [{"id": i, "prompt": "Once" if i % 2 else "Once upon " * 200} for i in range(8)]
    assert sum(row["error"] is not None for row in rows_of(generate_into(tmp_path, ray.data.from_items(rows), arguments, PARAMS))) == 4
    mended = ray.data.from_items([{**row, "prompt": "Once"} for row in rows])
    results = rows_of(generate_into(tmp_path, mended, arguments, PARAMS))
    assert sum(row["error"] is not None for row in results) == 4, "an error is a result"
    results = rows_of(generate_into(tmp_path, mended, arguments, PARAMS, retry_errors=True))
    assert [row["id"] for row in results] == list(range(8)) and all(row["error"] is None for row in results)
    # Parts of errors alone.
    rows = ray.data.from_items([{"id": i, "prompt_token_ids": [-1]} for i in range(3)])
    generate_into(tmp_path / "bad", rows, arguments, PARAMS)
    mended = ray.data.from_items([{"id": i, "prompt_token_ids": [1]} for i in range(3)])
    results = rows_of(generate_into(tmp_path / "bad", mended, arguments, PARAMS, retry_errors=True))
    assert [row["error"] for row in results] == [None] * 3


@pytest.mark.parametrize("given", ["in.jsonl", "folder of parquet"])
def test_the_example_runs(checkpoint, tmp_path, given):
    lines = [{"id": i, "prompt": "Once"} for i in range(10)]
    if given == "in.jsonl":
        (tmp_path / given).write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        (tmp_path / given).mkdir()
        pyarrow.parquet.write_table(pa.Table.from_pylist(lines), tmp_path / given / "0.parquet")
    script = FIXTURES.parents[1] / "examples" / "ray_data.py"
    words = [tmp_path / given, tmp_path / "out", "--model", checkpoint, "--backend", "cpu", "--max-model-len", "64"]
    said = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, timeout=300, cwd=FIXTURES)
    assert said.returncode == 0, said.stderr
    assert "10 rows, 0 with an error" in said.stdout
