"""A model, and what can be asked of it.

    prompts, sampling ── pulled as there is room ──> _minisgl.Run ──> completions, as they end ──> RequestOutputs
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import count, islice, repeat
from typing import Any

from minisgl import _minisgl
from minisgl.arguments import to_options, to_seed
from minisgl.assembly import Assembler
from minisgl.errors import Interrupted, is_raised, refused
from minisgl.outputs import EmbeddingRequestOutput, RequestOutput, ScoreOutput
from minisgl.progress import Progress
from minisgl.prompts import Array, Message, Prompt, each, listed
from minisgl.sampling_params import SamplingParams
from minisgl.stream import Stream


class LLM:
    """A model on a device, ready to generate.

    Several may live in a process. One that is pickled is built anew from its arguments where it is unpickled. Used by a
    forked process it is refused: its threads and its GPU are its maker's.

    Args:
        model: a checkpoint's directory, a name on the Hugging Face hub (OWNER/NAME), or a preset with dummy weights.
        revision: branch, tag or commit of a model by name.
        seed: of requests that have none: the i-th of the LLM draws with seed + i.
        max_model_len: tokens of a sequence, prompt and output; None: all that the model takes.
        max_num_seqs: requests that run at once; None: as many as decoding gains from and memory holds.
        max_num_batched_tokens: tokens of prompts in a step; None: 16384 on a GPU, 1024 on the CPU.
        gpu_memory_utilization: share, in (0, 1], of the GPU's memory that weights and KV pages take at most; buffers and
            recorded steps come on top. None: KV pages take 0.9 of what is free beside weights and buffers.
        enable_prefix_caching: reuse the KV pages of equal prefixes.
        enforce_eager: record no decode steps as CUDA graphs.
        generation_config: "auto": requests without sampling draw as the checkpoint's `generation_config.json` asks for;
            "none" or "vllm": as `SamplingParams()` does.
        backend: "auto" (a GPU where there is one), "cpu" or "cuda".
        device: which GPU, from 0, or which for each rank of each engine; naming one asks for a GPU.
        order: of admission: "given", "longest-output-first" or "prefix" (prompts that begin alike together).
        policy: "throughput", or "latency" (no long wait for a running request's next token).
        speculate: "off", "ngram" or "ngram-always": draft tokens from what texts said before; tokens are the same.
        quiet: say nothing on stderr.
        others: vLLM's and mini-sglang's other arguments. Those that ask for nothing are taken, and those that we have
            under another name; any other is refused by its name.

    Raises:
        ValueError, TypeError: an argument that can't hold.
        EngineError: the model can't be opened, or the device fails.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        revision: str | None = None,
        seed: int | None = 0,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float | None = None,
        enable_prefix_caching: bool | None = None,
        enforce_eager: bool = False,
        generation_config: str = "auto",
        backend: str | None = None,
        device: int | list[int] | str | None = None,
        order: str | None = None,
        policy: str | None = None,
        speculate: str | None = None,
        quiet: bool = False,
        **others: Any,
    ) -> None:
        model = model if model is not None else others.pop("model_path", None)
        if model is None:
            raise TypeError("LLM needs a model: a directory, a name on the Hugging Face hub, or a preset")
        if generation_config not in ("auto", "none", "vllm"):
            raise ValueError(f'generation_config={generation_config!r} is neither "auto" nor "none"')
        named = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_prefix_caching": enable_prefix_caching,
            "enforce_eager": enforce_eager,
            "backend": backend,
            "device": device,
            "order": order,
            "policy": policy,
            "speculate": speculate,
            **others,
        }
        model = str(model)
        options = to_options(model, named)
        #: What it was built with; `LLM(**llm.arguments)` builds another one like it.
        self.arguments: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "seed": seed,
            "generation_config": generation_config,
            "quiet": quiet,
            **{name: value for name, value in named.items() if value is not None},
        }
        self._seed = to_seed(seed)
        #: Requests of all calls are numbered, so that no two have a seed or a request_id in common.
        self._numbers = count()
        self._engine = _minisgl.Engine(model, revision=revision, options=options, quiet=quiet)
        self._assembler = Assembler(self._engine)
        self._recommended = self._engine.recommended_sampling() if generation_config == "auto" else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.arguments)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"

    def close(self) -> None:
        """Ends the engine and gives the device's memory back. Runs that are open end with an error."""
        self._engine.close()

    def sleep(self, level: int = 1) -> None:
        """Gives the device's memory back until `wake_up`: weights, KV pages, recorded steps. Open runs end with an error.

        Args:
            level: 1: what `update_weights` gave stays on the host, and comes back; 2: it is forgotten, and weights come back from
                the checkpoint's files, as those that were never updated do in any case.
        """
        if level not in (1, 2):
            raise ValueError(f"level={level!r} is neither 1 nor 2")
        self._engine.sleep(level == 1)

    def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Loads the model again after `sleep`; what it draws is what it would have drawn.

        Args:
            tags: vLLM's names of what to wake, "weights" and "kv_cache"; here all wakes up with the first of them.
        """
        for tag in [tags] if isinstance(tags, str) else tags or ():
            if tag not in ("weights", "kv_cache"):
                raise ValueError(f'tags has {tag!r}, which is neither "weights" nor "kv_cache"')
        self._engine.wake_up()

    def is_sleeping(self) -> bool:
        """Was it put to sleep?"""
        return self._engine.is_sleeping()

    def info(self) -> dict[str, Any]:
        """The device, capacities and what ends an output, as they were chosen when it was built."""
        return self._engine.info()

    def stats(self) -> dict[str, int]:
        """What the engine did since it was built."""
        return self._engine.stats()

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt."""
        return self._engine.encode(prompt)

    def decode(self, token_ids: Sequence[int] | Array) -> str | None:
        """The text of tokens, special ones left out; None without a tokenizer."""
        return self._engine.decode(token_ids)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes."""
        self._engine.reset_prefix_cache()
        return True

    def update_weights(
        self, weights: Mapping[str, Any] | Iterable[tuple[str, Any]] | str | os.PathLike[str]
    ) -> None:
        """Puts tensors in the place of the model's own; from then on it is, bit for bit, a model that was loaded with them.

        Requests that run end with the old weights first, for which the call waits; those that come meanwhile begin with the new
        ones. Cached prefixes are forgotten.

        Args:
            weights: tensors by the names of the checkpoint, all of them or some: a dict, or pairs of name and array; or a
                safetensors file, or a checkpoint's folder. Arrays are numpy's (bfloat16 by ml_dtypes), or anything on the host
                that has `__dlpack__`, as torch's tensors. They are copied, and the copies stay on the host.

        Raises:
            ValueError, TypeError: a name that the model does not have, or a tensor that is not as the checkpoint's; nothing has
                changed then.
            EngineError: the device failed; the LLM is to be built anew.
        """
        if isinstance(weights, (str, os.PathLike)):
            self._engine.update_weights_from(os.fspath(weights))
        elif isinstance(weights, Iterable):
            self._engine.update_weights(iter(weights.items() if isinstance(weights, Mapping) else weights))
        else:
            raise TypeError(f"weights are a dict or pairs of name and array, a file or a folder, not a {type(weights).__name__}")

    def get_default_sampling_params(self) -> SamplingParams:
        """How requests without sampling are drawn: as the checkpoint asks for, where it does."""
        return SamplingParams(**(self._recommended or {}))

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt] | None = None,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        prompt_token_ids: Prompt | Iterable[Prompt] | None = None,
        on_output: Callable[[RequestOutput], Any] | None = None,
        errors: str = "raise",
        lora_request: None = None,
    ) -> list[RequestOutput]:
        """Runs all prompts; outputs come in their order.

        Args:
            prompts: one prompt or many; see `Prompt`.
            sampling_params: for all of them, or for each its own; None: see `get_default_sampling_params`.
            use_tqdm: show a progress bar; or what makes one.
            prompt_token_ids: instead of `prompts`.
            on_output: hears of each output as soon as it is there.
            errors: "raise": the first request that can't run ends the call; "keep": its output has `error`, and the others
                go on.

        Raises:
            RequestError: a request can't run, or its prompt is none. `index` says which, `outputs` has what had ended.
            EngineError: the engine failed. `outputs` has what had ended.
            Interrupted: Ctrl-C. `outputs` has what had ended.
        """
        if lora_request is not None:
            raise ValueError("lora_request is not served by minisgl: merge the adapter into the checkpoint")
        if prompts is None:
            prompts = prompt_token_ids
        elif prompt_token_ids is not None:
            raise TypeError("give prompts or prompt_token_ids; a dict with `prompt` and `prompt_token_ids` is a prompt with both")
        if prompts is None:
            raise TypeError("generate needs prompts")
        return self._run_all(listed(prompts), sampling_params, use_tqdm, on_output, errors)

    def chat(
        self,
        messages: list[Message] | Sequence[list[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        on_output: Callable[[RequestOutput], Any] | None = None,
        errors: str = "raise",
        lora_request: None = None,
        chat_template: None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or many, by the checkpoint's chat template.

        Args:
            messages: dicts with `role`, `content` and what else the template knows; or lists of them.
            tools: tools that the model may call, as the template wants them.
            chat_template_kwargs: further variables of the template, like `enable_thinking`.
            add_generation_prompt: let the assistant answer.
            continue_final_message: go on with the last message instead; needs `add_generation_prompt=False`.

        The others, and what is raised, are those of `generate`. A conversation that can't be read is a ValueError before
        anything runs, whatever `errors` says.
        """
        if lora_request is not None:
            raise ValueError("lora_request is not served by minisgl: merge the adapter into the checkpoint")
        if chat_template is not None:
            raise ValueError("chat_template is not served by minisgl: put chat_template.jinja into the checkpoint's folder")
        if not isinstance(messages, (list, tuple)):
            kind = type(messages).__name__
            raise TypeError(f"chat takes a conversation, which is a list of messages (dicts), or a list of those, not a {kind}")
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        chat = partial(
            _minisgl.Chat,
            tools=None if tools is None else json.dumps(tools),
            kwargs=None if chat_template_kwargs is None else json.dumps(chat_template_kwargs),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        prompts = [chat(json.dumps(conversation)) for conversation in conversations]
        return self._run_all(prompts, sampling_params, use_tqdm, on_output, errors)

    def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        completions: Prompt | Iterable[Prompt],
        *,
        logprobs: int = 0,
        use_tqdm: bool | Callable[..., Any] = True,
        errors: str = "raise",
    ) -> list[ScoreOutput]:
        """How probable each completion is behind its prompt: the log-probabilities of its tokens, one prefill each.

        Tokens that were drawn get the same bits as when they were drawn with `logprobs`.

        Args:
            prompts: what comes before; see `Prompt`.
            completions: what is scored: texts or token ids, as many as prompts.
            logprobs: give the k most probable tokens at each place too, k <= 20.

        The others, and what is raised, are those of `generate`. A completion that can't be read is an error before anything
        runs, whatever `errors` says.
        """
        before, behind = listed(prompts), listed(completions)
        if len(before) != len(behind):
            raise ValueError(f"there are {len(before)} prompts and {len(behind)} completions")
        scored = [_minisgl.Scored(completion, logprobs) for completion in behind]
        return self._run_all(before, scored, use_tqdm, None, errors, partial(self._assembler.score, top=logprobs))

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        dimensions: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        errors: str = "raise",
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt: its last token's hidden state, scaled to length 1; one prefill each, nothing drawn.

        Args:
            prompts: see `Prompt`. Texts get the tokens that the tokenizer puts around them; token ids must bring them along.
            dimensions: how many of the first values to take, for models that were trained for it; None: all.

        The others, and what is raised, are those of `generate`.
        """
        several = listed(prompts)
        wanted = [_minisgl.Embedded(dimensions)] * len(several)
        return self._run_all(several, wanted, use_tqdm, None, errors, self._assembler.embedding)

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        tokens: bool = True,
        errors: str = "raise",
    ) -> Stream:
        """Runs prompts and gives outputs as they come, to `for` or to `async for`.

        Prompts are pulled out of an iterator as there is room for them, so that there may be any number. When the iterator
        fails, what it gave before runs on, and its error is raised behind that. Closing the stream, or dropping it, aborts
        what has not ended.

        Args:
            prompts: one prompt, or any iterable of them.
            sampling_params: for all of them, or for each its own.
            tokens: give the tokens of each request as they are drawn, one RequestOutput with `finished=False` each,
                whose output has the token and the text that became certain with it alone, and says by its index which
                sample it is of; without, each request gives one RequestOutput, when all of its samples have ended.
            errors: as in `generate`.
        """
        return Stream(self, each(prompts), self._sampling(sampling_params), tokens, is_raised(errors))

    def _sampling(self, given: Any) -> Iterable[SamplingParams]:
        """Sampling for each of any number of prompts."""
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return repeat(given)
        if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
            kind = type(given).__name__
            raise TypeError(f"sampling_params is one SamplingParams for all prompts, or a list with one for each, not a {kind}")
        return given

    def _run_all(
        self,
        prompts: list[Any],
        sampling_params: Any,
        use_tqdm: bool | Callable[..., Any],
        on_output: Callable[[RequestOutput], Any] | None,
        errors: str,
        make: Callable[[list[_minisgl.Completion], Any, int], Any] | None = None,
    ) -> list[Any]:
        make = make or self._assembler.output
        raises = is_raised(errors)
        sampling = self._sampling(sampling_params)
        if not isinstance(sampling, repeat):
            sampling = list(sampling)
            if len(sampling) != len(prompts):
                raise ValueError(f"there are {len(prompts)} prompts and {len(sampling)} sampling_params")
        numbers = list(islice(self._numbers, len(prompts)))
        requests = zip(prompts, sampling, numbers)
        run = self._engine.start(requests, seed=self._seed, tokens=False)
        ended: list[Any] = [None] * len(prompts)
        try:
            with Progress(use_tqdm, len(prompts)) as progress:
                while (places := run.take_into(ended)) is not None:
                    for place in places:
                        samples = ended[place]
                        output = ended[place] = make(samples, prompts[place], numbers[place])
                        progress.add(len(output.prompt_token_ids or ()), sum(len(one.token_ids) for one in samples))
                        if output.error is not None and raises:
                            raise refused(output)
                        if on_output is not None:
                            on_output(output)
        except KeyboardInterrupt:
            raise Interrupted(_kept(ended, prompts, numbers, make)) from None
        except (_minisgl.EngineError, _minisgl.RequestError) as error:
            error.outputs = _kept(ended, prompts, numbers, make)
            raise
        finally:
            run.close()
        return ended


def _kept(ended: list[Any], prompts: list[Any], numbers: list[int], make: Callable[[Any, Any, int], Any]) -> list[Any]:
    """What had ended, those that came last included."""
    return [
        make(done, prompts[place], numbers[place]) if isinstance(done, list) else done
        for place, done in enumerate(ended)
    ]


def _rebuild(kind: type[LLM], arguments: dict[str, Any]) -> LLM:
    return kind(**arguments)
