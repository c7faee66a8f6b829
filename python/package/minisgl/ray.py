"""Batch inference over Ray Data: a pool of actors, an engine each, and results that a killed job does not lose.

    Dataset ── rows without a result ──> actors, an LLM each ── a part a batch ──> folder ──> Dataset
                        ^                                                            │
                        └───────────────────── ids that have one ────────────────────┘

A row is `prompt` (a text), `prompt_token_ids` or `messages`; what it has beside them comes through. What is drawn depends on the
row, its id and the seed alone, not on the actor or the batch: a row that runs again comes to the same tokens.

Needs Ray and pyarrow, which the extra `ray` of the package brings.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import ray
import ray.data

from minisgl import _minisgl
from minisgl.llm import LLM
from minisgl.sampling_params import FIELDS, SamplingParams

#: The columns that are added to a row.
RESULT_COLUMNS = pa.schema(
    [
        ("generated_text", pa.string()),
        ("generated_token_ids", pa.list_(pa.uint32())),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.uint32()),
        ("error", pa.string()),
    ]
)

#: Of a row that asks for something.
PROMPT_COLUMNS = ("messages", "prompt_token_ids", "prompt")


def generate(
    dataset: ray.data.Dataset,
    llm: dict[str, Any],
    sampling_params: SamplingParams | None = None,
    *,
    id_column: str = "id",
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 256,
    num_gpus: float | None = None,
    seed: int = 0,
    **ray_remote_args: Any,
) -> ray.data.Dataset:
    """A stage that generates for every row, lazily, and adds the columns `RESULT_COLUMNS`.

    Args:
        dataset: rows as above. A column `sampling_params`, a struct of SamplingParams's fields, changes them for a row.
        llm: the arguments of each actor's LLM, `model` among them.
        sampling_params: of all rows; None: as `LLM.get_default_sampling_params`.
        id_column: what tells rows apart: a row draws with a seed made of its id and `seed`.
        concurrency: actors, or fewest and most of them.
        batch_size: rows of a batch. An actor has several batches at once, so that its engine does not run empty between
            them; Ray holds back what comes before where all have enough.
        num_gpus: GPUs of an actor; None: 1, or 0 with `backend="cpu"`.
        seed: see `id_column`.
        ray_remote_args: of the actors, see `ray.data.Dataset.map_batches`.

    A row that can't run has `error` and no text; the others go on. An actor that dies is started anew, and what it had in
    hand runs again.
    """
    return _stage(dataset, llm, sampling_params, None, id_column, concurrency, batch_size, num_gpus, seed, ray_remote_args)


def generate_into(
    folder: str | os.PathLike[str],
    dataset: ray.data.Dataset,
    llm: dict[str, Any],
    sampling_params: SamplingParams | None = None,
    *,
    file_format: str = "parquet",
    id_column: str = "id",
    concurrency: int | tuple[int, int] = 1,
    batch_size: int = 256,
    num_gpus: float | None = None,
    seed: int = 0,
    retry_errors: bool = False,
    **ray_remote_args: Any,
) -> ray.data.Dataset:
    """Generates for every row that has no result in `folder`, writes each batch there as it ends, and gives all results.

    A job that was killed goes on where it was: the same call again runs what is missing. Each row has one result, however often
    actors die, provided that its id is one of a kind. Files appear whole.

    Args:
        folder: where parts lie, `part-….parquet` or `part-….jsonl`; one that all machines see.
        file_format: "parquet" or "jsonl".
        retry_errors: run rows again whose result is an error.

    The others are those of `generate`.
    """
    columns = dataset.columns()
    if columns is not None and id_column not in columns:
        raise ValueError(f"rows have no {id_column!r}, by which results are told apart: name another column as id_column, of {columns}")
    folder = Path(folder).absolute()
    parts = _Parts(folder, file_format)
    parts.prepare()
    done = parts.tidy(id_column, drop_errors=retry_errors)
    if len(done):
        dataset = dataset.map_batches(
            _without, batch_format="pyarrow", fn_kwargs={"id_column": id_column, "done": ray.put(done)}
        )
    left = _stage(dataset, llm, sampling_params, parts, id_column, concurrency, batch_size, num_gpus, seed, ray_remote_args)
    left.materialize()
    parts.tidy(id_column)
    return parts.read()


def _stage(
    dataset: ray.data.Dataset,
    llm: dict[str, Any],
    sampling_params: SamplingParams | None,
    parts: _Parts | None,
    id_column: str,
    concurrency: int | tuple[int, int],
    batch_size: int,
    num_gpus: float | None,
    seed: int,
    ray_remote_args: dict[str, Any],
) -> ray.data.Dataset:
    if num_gpus is None:
        num_gpus = 0 if llm.get("backend") == "cpu" else 1
    actor = {"llm": llm, "sampling_params": sampling_params, "parts": parts, "id_column": id_column, "seed": seed}
    return dataset.map_batches(
        _Actor,
        fn_constructor_kwargs=actor,
        batch_format="pyarrow",
        batch_size=batch_size,
        concurrency=concurrency,
        num_gpus=num_gpus,
        **ray_remote_args,
    )


class _Actor:
    """An engine, and what makes tables of rows tables of results. Ray calls it for several batches at once."""

    def __init__(
        self,
        llm: dict[str, Any],
        sampling_params: SamplingParams | None,
        parts: _Parts | None,
        id_column: str,
        seed: int,
    ) -> None:
        self.llm = LLM(**{"quiet": True, **llm})
        self.sampling = sampling_params or self.llm.get_default_sampling_params()
        self.parts = parts
        self.id_column = id_column
        self.seed = seed

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        table = await self._generate(batch)
        if self.parts is not None:
            # What Ray carries on is only that it is done.
            self.parts.write(table, self.id_column)
            table = table.select([self.id_column])
        yield table

    async def _generate(self, batch: pa.Table) -> pa.Table:
        results: list[dict[str, Any] | None] = [None] * batch.num_rows
        runnable, prompts, sampling = [], [], []
        for row, columns in enumerate(_rows(batch, self.id_column)):
            try:
                prompt, params = _prompt(columns), self._sampling(columns)
            except (AttributeError, TypeError, ValueError) as error:
                results[row] = {"error": str(error)}
                continue
            prompts.append(prompt)
            sampling.append(params)
            runnable.append(row)
        async for output in self.llm.stream(prompts, sampling, tokens=False, errors="keep"):
            one = output.outputs[0]
            results[runnable[output.index]] = {
                "generated_text": None if output.error else one.text,
                "generated_token_ids": None if output.error else one.token_ids,
                "finish_reason": one.finish_reason,
                "num_prompt_tokens": len(output.prompt_token_ids or ()),
                "error": output.error,
            }
        made = pa.Table.from_pylist([result or {} for result in results], schema=RESULT_COLUMNS)
        kept = batch.drop_columns([name for name in RESULT_COLUMNS.names if name in batch.column_names])
        for field in RESULT_COLUMNS:
            kept = kept.append_column(field, made[field.name])
        return kept

    def _sampling(self, columns: dict[str, Any]) -> SamplingParams:
        own = {name: value for name, value in (columns.get("sampling_params") or {}).items() if value is not None}
        fields = {name: getattr(self.sampling, name) for name in FIELDS}
        params = SamplingParams(**{**fields, **own})
        if params.n != 1:
            raise ValueError(f"n={params.n}: a row has one output; give a row for each")
        if params.seed is None:
            params.seed = seed_of(self.seed, columns.get(self.id_column))
        return params


def seed_of(seed: int, row_id: Any) -> int:
    """The seed of a row: 63 bits that depend on the job's seed and the row's id."""
    digest = hashlib.blake2b(f"{seed}:{row_id!r}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _rows(batch: pa.Table, id_column: str) -> Iterable[dict[str, Any]]:
    """Of each row what is asked for; token ids as arrays, where they lie."""
    wanted = [name for name in (id_column, "sampling_params", *PROMPT_COLUMNS) if name in batch.column_names]
    for row in range(batch.num_rows):
        values = {name: batch[name][row] for name in wanted}
        yield {
            name: value.values.to_numpy(zero_copy_only=False)
            if isinstance(value, (pa.ListScalar, pa.LargeListScalar)) and value.is_valid and pa.types.is_integer(value.type.value_type)
            else value.as_py()
            for name, value in values.items()
        }


def _prompt(columns: dict[str, Any]) -> Any:
    """A row's prompt."""
    for name in PROMPT_COLUMNS:
        given = columns.get(name)
        if given is None:
            continue
        if name != "messages":
            return given
        # A column of messages has every field that one of them has.
        messages = [{key: value for key, value in message.items() if value is not None} for message in given]
        return _minisgl.Chat(
            json.dumps(messages), tools=None, kwargs=None, add_generation_prompt=True, continue_final_message=False
        )
    raise ValueError(f"the row has none of {', '.join(PROMPT_COLUMNS)}")


def _without(batch: pa.Table, id_column: str, done: ray.ObjectRef) -> pa.Table:
    """Rows whose id is not among `done`."""
    known = ray.get(done) if isinstance(done, ray.ObjectRef) else done
    ids = batch[id_column]
    return batch.filter(pc.invert(pc.is_in(ids, value_set=known.cast(ids.type))))


class _Parts:
    """The folder of results: a file a batch.

    A part is named by the ids in it, so that a batch that runs twice, since its actor died between writing it and saying so,
    writes the same file twice. Of ids that several parts have, since batches were cut otherwise then, the first counts.
    """

    def __init__(self, folder: Path, file_format: str) -> None:
        if file_format not in ("parquet", "jsonl"):
            raise ValueError(f'file_format={file_format!r} is neither "parquet" nor "jsonl"')
        self.folder = folder
        self.file_format = file_format

    def prepare(self) -> None:
        """Makes the folder; takes away what a killed writer left, and refuses parts of the other format."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob(".part-*"):
            unfinished.unlink(missing_ok=True)
        other = "jsonl" if self.file_format == "parquet" else "parquet"
        if next(self.folder.glob(f"part-*.{other}"), None) is not None:
            raise ValueError(f"{self.folder} has parts in {other}: go on with file_format={other!r}, or take another folder")

    def write(self, table: pa.Table, id_column: str) -> Path:
        """Writes a part, which appears whole."""
        ids = "\n".join(map(repr, table[id_column].to_pylist()))
        name = f"part-{hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()}.{self.file_format}"
        unfinished = self.folder / f".{name}.{uuid.uuid4().hex}"
        if self.file_format == "parquet":
            pyarrow.parquet.write_table(table, unfinished)
        else:
            with open(unfinished, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())
        return unfinished.replace(self.folder / name)

    def tidy(self, id_column: str, *, drop_errors: bool = False) -> pa.Array:
        """Sees to it that each id is in one part; gives them all. With `drop_errors`, results that are errors go."""
        seen: set[Any] = set()
        columns: list[pa.Array] = []
        # A writer that was killed before it took the old part away has left the new one, which then is met again.
        rewritten: set[Path] = set()
        for path in self._paths():
            if path in rewritten:
                continue
            ids = self._column(path, id_column)
            keep = self._rows_to_keep(ids, self._column(path, "error") if drop_errors else None, seen)
            if len(keep) < len(ids):
                table = self._table(path).take(keep)
                if len(keep):
                    rewritten.add(self.write(table, id_column))
                path.unlink()
                ids = table[id_column]
            columns.extend(ids.chunks)
        return pa.concat_arrays(columns) if columns else pa.array([])

    @staticmethod
    def _rows_to_keep(ids: pa.ChunkedArray, errors: pa.ChunkedArray | None, seen: set[Any]) -> pa.Array:
        """Rows whose id is not among `seen`, which it joins, and which are no errors."""
        rows = []
        for row, value in enumerate(ids.to_pylist()):
            is_error = errors is not None and errors[row].is_valid
            if value not in seen and not is_error:
                seen.add(value)
                rows.append(row)
        return pa.array(rows, pa.int64())

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"part-*.{self.file_format}"))

    def _column(self, path: Path, name: str) -> pa.ChunkedArray:
        if self.file_format == "parquet":
            return pyarrow.parquet.read_table(path, columns=[name], partitioning=None)[name]
        return self._table(path)[name]

    def _table(self, path: Path) -> pa.Table:
        if self.file_format == "parquet":
            return pyarrow.parquet.read_table(path, partitioning=None)
        return _read_lines(path)

    def read(self) -> ray.data.Dataset:
        """All results."""
        # Not by Ray's own reader: where parts are many and aiohttp is missing, its threads fail in each other's imports.
        paths = [{"path": str(path)} for path in self._paths()]
        return ray.data.from_items(paths).map_batches(self._tables, batch_format="pyarrow")

    def _tables(self, paths: pa.Table) -> Iterator[pa.Table]:
        """Parts, one by one."""
        for path in paths["path"].to_pylist():
            yield self._table(Path(path))


def _read_lines(path: str | os.PathLike[str]) -> pa.Table:
    """A part in JSON. pyarrow's own reader would take ids and texts that look like times for times."""
    with open(path, encoding="utf-8") as file:
        table = pa.Table.from_pylist([json.loads(line) for line in file])
    for field in RESULT_COLUMNS:
        table = table.set_column(table.schema.get_field_index(field.name), field, table[field.name].cast(field.type))
    return table
