"""The engine in this process: `from quire import LLM`.

    raw request -> parse (text to ids, every field checked) -> Loop.add -> Loop.step ... -> Collector (ids to text)

The parts are those of the distributed service at size one: the same validator and text objects as a front, the same
loop as a worker. `LLM` only composes them.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from cluster.chat_template import ChatTemplate
from cluster.requests import Text, parse_request
from cluster.tokenizer import Tokenizer
from launch.config import EngineConfig
from launch.crew import Crew, rank_environment, rank_settings
from launch.devices import choose_device
from launch.memory import MemoryPlan
from launch.models.catalog import resolve
from launch.outputs import Collector, CompletionOutput, RequestOutput
from launch.progress import RankProgress, loading_bar, summed
from pagetable.errors import AlreadyExists, InvalidRequest, NotFound, QuireError, RequestFailed
from pagetable.sampling import Limits, Request, SamplingParams
from worker.cores import Cores
from worker.loop import EpochOver, Loop
from worker.model_config import ModelConfig
from worker.ranks import Ranks
from worker.sequence import FinishReason, TokenOutput
from worker.shard import ShardSpec, build_runner, make_loop, make_pipe, make_ranks

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "describe_plan"]

Raw: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
Progress: TypeAlias = Callable[[int, int], None]

_BLAME_SECONDS = 1.0  # for a process that ended to be seen as such, when its connection has ended
_AHEAD = 2  # requests queued ahead, in units of max_num_seqs: a long file is not tokenized before its first token


class LLM:
    """A model, its pages and its loop in this process. One caller at a time.

    Args:
        model: folder of a Hugging Face model, or the name of one that comes with Quire.
        config: everything else; or give its fields by name.
        progress: show a bar on stderr while weights load; or a callable `(bytes done, bytes in all)`.

    Attributes:
        cores: where steps run, `step` sees to that; none where there is one rank.

    Errors: ConfigError, ModelError and NotSupported say which setting or file is refused and why.
    """

    def __init__(
        self, model: str, *, config: EngineConfig | None = None, progress: bool | Progress = False, **fields: Any
    ) -> None:
        if config is None:
            config = EngineConfig(model=model, **fields)
        elif fields:
            raise TypeError(f"give config or {', '.join(fields)}, not both")
        config.check_one_process()
        self.config = config
        folder = Path(resolve(model))
        self.model_config = ModelConfig.from_folder(folder)
        self.plan = MemoryPlan.make(config, self.model_config, device=choose_device(config))
        self.tokenizer = Tokenizer.from_folder(folder)
        self.text = _text(self.tokenizer)
        self.eos_token_ids = self.model_config.eos_token_ids
        if not self.eos_token_ids and self.tokenizer is not None and self.tokenizer.eos_id is not None:
            self.eos_token_ids = (self.tokenizer.eos_id,)
        shard = self.plan.shard
        self.limits = Limits(
            vocab_size=self.model_config.vocab_size,
            max_model_len=shard.max_model_len,
            max_pool_tokens=shard.num_blocks * shard.block_size,
        )
        self._crew: Crew | None = None
        self.cores = Cores()
        self.loop = self._build(folder, progress)
        self._collectors: dict[str, Collector] = {}
        self._arrivals = 0  # requests admitted
        self._names = 0  # ids given to requests that bring none

    def close(self) -> None:
        """End the processes of its ranks; they end with the object too. Nothing may be asked of it any more."""
        if self._crew is not None:
            self._crew.close()
            assert isinstance(self.loop.pipe, Ranks)
            self.loop.pipe.leave()

    @property
    def pids(self) -> list[int]:
        """Of its ranks' processes by rank; the first is this one."""
        return [os.getpid(), *(self._crew.pids if self._crew is not None else [])]

    def describe(self) -> list[str]:
        """What was loaded and what fits, for people."""
        return self.plan.describe()

    # vLLM's verbs

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Run prompts to their ends.

        Args:
            prompts: texts, lists of token ids, or mappings with `prompt` or `prompt_token_ids` (and `cache_salt`).
            sampling_params: for all, or one for each.

        Errors: InvalidRequest, before anything runs, where one may not be.
        """
        many: list[Any] = list(prompts) if isinstance(prompts, (list, tuple)) and not _is_ids(prompts) else [prompts]
        return self._complete([_prompt_fields(prompt) for prompt in many], sampling_params)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through the model's chat template."""
        one = not messages or isinstance(messages[0], Mapping)
        many = [messages] if one else list(messages)
        return self._complete([{"messages": list(conversation)} for conversation in many], sampling_params)

    def generate_raw(self, raws: Iterable[Raw | QuireError]) -> list[RequestOutput | QuireError]:
        """Run JSON objects (see `cluster.requests`) in order; each is answered by its output or by why it was
        refused."""
        results: dict[int, RequestOutput | QuireError] = {}
        names: dict[str, int] = {}
        waiting = enumerate(raws)
        more = True
        try:
            while more or names:
                while more and self._has_room:
                    index, raw = next(waiting, (-1, {}))
                    if index < 0:
                        more = False
                        break
                    try:
                        if isinstance(raw, QuireError):
                            raise raw
                        names[self.add_request(raw)] = index
                    except QuireError as error:
                        results[index] = error
                for output in self.step():
                    if output.finished and output.request_id in names:
                        results[names.pop(output.request_id)] = self.pop(output.request_id)
        except BaseException:
            self._drop(names)
            raise
        return [results[index] for index in sorted(results)]

    # Step by step

    def add_request(self, raw: Raw) -> str:
        """Queue one JSON object's request; its id. Errors as `parse_request` and `Loop.add`."""
        return self._submit(self._parse(raw), raw)

    def fork(self, request_id: str, sample_index: int = 0, **changes: Any) -> str:
        """Split a running sample: a new request goes on from its tokens so far and shares their pages.

        Args:
            changes: sampling fields that differ; a `seed` of its own is drawn where none is given. `max_tokens`
            counts from the prompt, as in the forked request, whose prompt logprobs are not repeated.

        Returns the new request's id. Errors: NotFound where the sample does not run; InvalidRequest.
        """
        parent = self._collectors.get(request_id)
        if parent is None or not 0 <= sample_index < len(parent.output.outputs):
            raise NotFound(f"sample {sample_index} of request {request_id!r} is not in flight")
        sample = parent.output.outputs[sample_index]
        origin = self.loop.scheduler.request(request_id)
        fields = _params_fields(origin.params) | {"n": 1, "seed": None, "prompt_logprobs": None} | changes
        raw: dict[str, Any] = {"prompt_token_ids": list(origin.prompt), **_as_lists(fields)}
        if origin.cache_salt:
            raw["cache_salt"] = origin.cache_salt
        request = self._parse(raw)
        for name, missing in (("prompt_logprobs", True), ("logprobs", sample.logprobs is None)):
            asked = getattr(request.params, name)
            if missing and asked is not None:
                raise InvalidRequest(name, asked, "be left out in this fork", "ask for them in the forked request")
        self.loop.fork(request_id, sample_index, request)
        self._arrivals += 1
        collector = Collector(request, parent.output.prompt, self.tokenizer)
        collector.inherit(sample)
        self._collectors[request.request_id] = collector
        return request.request_id

    def abort(self, request_id: str) -> RequestOutput:
        """End a request now; what it has so far. Its pages are free when the plans that name them have retired."""
        for found in self.loop.cancel(request_id):
            self._collectors[request_id].push(found)
        return self.pop(request_id)

    def step(self) -> list[RequestOutput]:
        """One plan of the loop; the requests that it moved, each once, as they are now. Finished ones stay until
        `pop`."""
        moved: dict[str, RequestOutput] = {}
        for found in self._step():
            collector = self._collectors[found.request_id]
            stop = collector.push(found)
            if stop is not None:
                ended = self.loop.finish(found.request_id, found.sample_index, FinishReason.STOP, stop)
                collector.push(ended)
            moved[found.request_id] = collector.output
        return list(moved.values())

    def _step(self) -> list[TokenOutput]:
        try:
            with self.cores.hold():
                return self.loop.step()
        except EpochOver as over:
            assert self._crew is not None, "who is alone in an epoch cannot lose it"
            why = self._crew.await_failure(_BLAME_SECONDS) or over
            raise RequestFailed(f"this engine has lost a rank and cannot go on ({why}); make a new one") from None

    def pop(self, request_id: str) -> RequestOutput:
        """Take a finished request's output out of the engine's books. Raises NotFound where there is none."""
        collector = self._collectors.get(request_id)
        if collector is None or not collector.output.finished:
            raise NotFound(f"request {request_id!r} has no finished output here")
        return self._collectors.pop(request_id).output

    def stream(self, raw: Raw) -> Iterator[RequestOutput]:
        """Run one request and yield its output each time it has grown, at last when it has finished.

        Closing the iterator aborts the request. Several streams may run side by side.
        """
        request_id = self.add_request(raw)
        output = self._collectors[request_id].output
        finished = False
        try:
            while not finished:
                # another stream's step may have brought the end
                moved = output.finished or any(each is output for each in self.step())
                finished = output.finished
                if moved:
                    yield output
        finally:
            if request_id in self._collectors:  # unless somebody else aborted it
                self._drop([request_id])

    def _complete(
        self, raws: list[dict[str, Any]], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each: Sequence[SamplingParams] = [sampling_params or SamplingParams()] * len(raws)
        else:
            each = sampling_params
        if len(each) != len(raws):
            raise ValueError(
                f"sampling_params: got {len(each)}, must be one, or one for each of the {len(raws)} prompts"
            )
        whole = [{**_params_fields(params), **raw} for params, raw in zip(each, raws, strict=True)]
        parsed = [(self._parse(raw, ahead), raw) for ahead, raw in enumerate(whole)]
        ids = set[str]()
        for request, _ in parsed:
            self._refuse_known(request.request_id, ids)
            ids.add(request.request_id)
        waiting, running, names = deque(parsed), set[str](), list[str]()
        try:
            with self.cores.hold():
                while waiting or running:
                    while waiting and self._has_room:
                        names.append(self._submit(*waiting.popleft()))
                        running.add(names[-1])
                    running -= {output.request_id for output in self.step() if output.finished}
        except BaseException:
            self._drop(names)
            raise
        return [self.pop(name) for name in names]

    @property
    def _has_room(self) -> bool:
        scheduler = self.loop.scheduler
        return scheduler.num_waiting < min(_AHEAD * self.config.max_num_seqs, scheduler.config.max_waiting)

    def _parse(self, raw: Raw, ahead: int = 0) -> Request:
        """An admitted request. `ahead` others are parsed and will be submitted before it: seeds go by arrival."""
        self._names += 1
        while f"auto-{self._names}" in self._collectors:  # somebody chose that very id
            self._names += 1
        return parse_request(
            raw,
            self.limits,
            text=self.text,
            request_id=f"auto-{self._names}",
            seed=_seed(self.config.seed, self._arrivals + ahead + 1),
            eos_token_ids=self.eos_token_ids,
        )

    def _submit(self, request: Request, raw: Raw) -> str:
        self._refuse_known(request.request_id)
        self.loop.add(request)
        self._arrivals += 1
        prompt = raw["prompt"] if isinstance(raw.get("prompt"), str) else None
        self._collectors[request.request_id] = Collector(request, prompt, self.tokenizer)
        return request.request_id

    def _refuse_known(self, request_id: str, others: Collection[str] = ()) -> None:
        """The scheduler forgets an id when its request ends; here its output may still wait to be taken."""
        if request_id in self._collectors or request_id in others:
            raise AlreadyExists(f"request_id {request_id!r} is in flight; choose another or wait for its end")

    def _drop(self, names: Iterable[str]) -> None:
        """Forget requests, running or finished."""
        for name in list(names):
            if self._collectors[name].output.finished:
                self.pop(name)
            else:
                self.abort(name)

    def _build(self, folder: Path, progress: bool | Progress) -> Loop:
        if progress is True:
            with loading_bar() as show:
                return self._load(folder, show)
        return self._load(folder, summed(progress, self.config.layout.num_ranks) if progress else None)

    def _load(self, folder: Path, progress: RankProgress | None) -> Loop:
        plan, config = self.plan, self.config
        threads = config.num_threads
        spec = ShardSpec(
            folder,
            self.model_config,
            plan.shard,
            plan.dtype,
            config.layout,
            ways=config.ways,
            device=plan.device,
            threads=threads,
        )
        own = None if progress is None else partial(progress, 0)
        if config.layout.num_ranks == 1:
            return make_loop(spec, make_pipe(spec, build_runner(spec, 0, own)))
        secret = secrets.token_bytes(32)
        pin = config.pins(config.layout.num_ranks, threads)
        if pin:
            self.cores = Cores.claim(threads)
        ranks = make_ranks(spec, secret, self.cores)
        self._crew = crew = Crew(
            rank_settings(spec, secret, ranks.listen("127.0.0.1", 0), pin),
            rank_environment(threads),
            progress,
            ranks.close,
        )
        weakref.finalize(self, crew.close)
        try:
            with self.cores.hold():
                ranks.runner = build_runner(spec, 0, own)
            ranks.begin(1)
        except EpochOver:
            raise crew.failure or RequestFailed("the engine's ranks did not come together") from None
        return make_loop(spec, ranks)


def describe_plan(config: EngineConfig) -> list[str]:
    """What `config` would load and what would fit, without reading weights."""
    config.check_one_process()
    model = ModelConfig.from_folder(resolve(config.model))
    return MemoryPlan.make(config, model, device=choose_device(config)).describe()


def _text(tokenizer: Tokenizer | None) -> Text | None:
    if tokenizer is None:
        return None
    source = tokenizer.chat_template
    chat = None if source is None else ChatTemplate(source, tokenizer.special_tokens, datetime.now)
    return Text(tokenizer, chat)


def _is_ids(prompts: Sequence[Any]) -> bool:
    return len(prompts) > 0 and all(type(item) is int for item in prompts)


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        return dict(prompt)
    return {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}


def _params_fields(params: SamplingParams) -> dict[str, Any]:
    """As a raw object's fields."""
    return _as_lists({each.name: getattr(params, each.name) for each in dataclasses.fields(params)})


def _as_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def _seed(base: int, arrival: int) -> int:
    """A seed of its own for each request, from the engine's."""
    return int.from_bytes(sha256(f"quire seed {base} {arrival}".encode()).digest()[:8], "little") >> 1
