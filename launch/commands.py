"""What `quire generate` and `quire chat` do, on a model in this process or on a service."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, Protocol

from launch.flags import Effective, UsageError, sampling_of
from pagetable.errors import QuireError

if TYPE_CHECKING:
    from launch.llm import LLM
    from launch.outputs import RequestOutput
    from launch.prompts import Raw


class Engine(Protocol):
    """What both can do: `LLM` here, `Client` for a service."""

    def generate_raw(self, raws: Iterable[Raw]) -> list[RequestOutput | QuireError]: ...

    def stream(self, raw: Mapping[str, Any]) -> Iterator[RequestOutput]: ...


@contextlib.contextmanager
def open_engine(found: argparse.Namespace, engine: Effective | None) -> Iterator[Engine]:
    """The service that `--server` names, or a model in this process."""
    if engine is not None:
        yield start(engine)
        return
    from launch.remote import open_client

    with open_client(found) as client:
        yield client


def generate(found: argparse.Namespace, engine: Effective | None) -> int:
    """A batch: results in the order of the requests. 1 where one failed."""
    from launch.prompts import has_failed, result_line, to_text

    raws = _read_requests(found)
    with _output(found.output) as out, open_engine(found, engine) as llm:
        began = time.perf_counter()
        results = llm.generate_raw(raws)
        seconds = time.perf_counter() - began
        failed = tokens = 0
        for index, result in enumerate(results):
            line = result_line(index, result)
            failed += has_failed(line)
            tokens += sum(len(output["token_ids"]) for output in line.get("outputs", ()))
            print(to_text(line) if found.json else _plain(line), file=out, flush=True)
    note(
        f"{len(results)} requests, {failed} failed; {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"
    )
    return 1 if failed else 0


def start(engine: Effective) -> LLM:
    """Load the model, and say on stderr what was changed and what fits."""
    from launch.llm import LLM

    if changed := engine.changed():
        note("not default: " + ", ".join(changed))
    llm = LLM(engine.config.model, config=engine.config, progress=sys.stderr.isatty())
    for line in llm.describe():
        note(line)
    return llm


def note(text: str) -> None:
    print(f"quire: {text}", file=sys.stderr, flush=True)


def _read_requests(found: argparse.Namespace) -> list[Raw]:
    from launch.prompts import read_lines

    defaults = sampling_of(found)
    raws: list[Raw] = []
    if found.prompts is not None:
        try:
            with (
                contextlib.nullcontext(sys.stdin.buffer) if found.prompts == "-" else open(found.prompts, "rb") as file
            ):
                raws.extend(read_lines(file, defaults))
        except OSError as error:
            raise UsageError(f"--prompts: cannot read {found.prompts}: {error.strerror}") from error
    raws.extend({**defaults, "prompt": text} for text in found.prompt)
    if not raws:
        raise UsageError("--prompts: nothing to do; give --prompts FILE with at least one line, or --prompt TEXT")
    return raws


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[IO[str]]:
    """The file to write to, opened before the model loads: a long run must not end in "no such folder"."""
    with contextlib.ExitStack() as stack:
        try:
            file = (
                sys.stdout
                if path is None
                else stack.enter_context(open(path, "w", encoding="utf-8", errors="backslashreplace"))
            )
        except OSError as error:
            raise UsageError(f"--output: cannot write {path}: {error.strerror}") from error
        yield file


def _plain(line: dict[str, Any]) -> str:
    """A result for people."""
    if "error" in line:
        return f"[{line['index']}] error: {line['error']['message']}"
    many = len(line["outputs"]) > 1
    return "\n".join(
        f"[{line['index']}{'.' + str(output['index']) if many else ''}] "
        + (output["text"] or " ".join(map(str, output["token_ids"])))
        for output in line["outputs"]
    )


def chat(found: argparse.Namespace, engine: Effective | None) -> int:
    """Turn by turn, until the input ends; text appears as it comes. A failed turn is taken back."""
    given = {"max_tokens": 512, **sampling_of(found)}
    if given.get("n", 1) != 1:
        raise UsageError("--n: a chat has one answer; use quire generate for several")
    opening = [{"role": "system", "content": found.system}] if found.system else []
    messages = list(opening)
    failed = False
    with open_engine(found, engine) as llm:
        for turn in _turns():
            if turn == "/clear":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": turn})
            try:
                answer = _say(llm, {**given, "messages": messages})
            except QuireError as error:
                note(f"error: {' '.join(str(error).split())}")
                messages.pop()
                failed = True
                continue
            messages.append({"role": "assistant", "content": answer})
    return 1 if failed else 0


def _say(llm: Engine, raw: Mapping[str, Any]) -> str:
    """Print one answer as it comes; the whole of it."""
    answer = ""
    for output in llm.stream(raw):
        grown = output.outputs[0].text
        print(_printable(grown[len(answer) :]), end="", flush=True)
        answer = grown
    print(flush=True)
    return answer


def _printable(text: str) -> str:
    """Half a surrogate pair, which a terminal cannot show, as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _turns() -> Iterator[str]:
    talks = sys.stdin.isatty()
    while True:
        if talks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
