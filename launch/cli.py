"""`quire`: generate, chat and bench on the command line.

Exit codes: 0; 1 where a request or the model failed; 2 where the command line or the configuration may not be;
130 after an interrupt. Heavy modules are imported by the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from launch.flags import Effective, Parser, UsageError, add_engine_flags, add_sampling_flags, effective, sampling_of
from launch.machine import sleep_while_waiting
from pagetable.errors import ConfigError, QuireError
from quire import __version__

if TYPE_CHECKING:
    from launch.llm import LLM
    from launch.prompts import Raw

_GENERATE = """\
Runs a batch and prints its results in the order of the requests. A line of --prompts is a JSON object with one of
`prompt` (text), `messages` ([{"role", "content"}]) and `prompt_token_ids`, and any sampling fields, for example
    {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.7, "seed": 1}
A line that may not be is answered in its place; the others run, and the exit code is 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. An error of Quire's tree is one line on stderr."""
    sleep_while_waiting()
    # JSON is UTF-8 whatever the locale says; half a surrogate pair, which UTF-8 cannot hold, is written escaped.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except QuireError as error:
        print(f"quire: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("quire: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output is gone; without this Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: Sequence[str]) -> int:
    parser = build_parser()
    found = parser.parse(argv)
    if found.command is None:
        parser.print_help(sys.stderr)
        return 2
    _check_packages()
    engine = effective(found, os.environ)
    if found.print_config:
        print("\n".join([*engine.to_yaml(), *_limits()]))
        return 0
    if found.dry_run:
        return _dry_run(engine)
    code: int = found.run(found, engine)
    return code


def build_parser() -> Parser:
    parser = Parser(prog="quire", description="Serves large language models from one paged memory.")
    parser.add_argument("--version", action="version", version=f"quire {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    command: Parser = commands.add_parser(
        "generate",
        usage="quire generate MODEL --prompts FILE [FLAG ...]",
        help="run a batch of prompts",
        description=_GENERATE,
    )
    command.add_argument("--prompts", metavar="FILE", help="JSON lines; - is standard input")
    command.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="may stand several times")
    command.add_argument("--json", action="store_true", help="one JSON line for each request")
    command.add_argument("--output", metavar="FILE", help="instead of standard output")
    add_sampling_flags(command)
    add_engine_flags(command)
    command.set_defaults(run=generate, parser=command)

    command = commands.add_parser(
        "chat",
        usage="quire chat MODEL [FLAG ...]",
        help="talk to a model",
        description="One turn a line; /clear starts over.",
    )
    command.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling_flags(command)
    add_engine_flags(command)
    command.set_defaults(run=chat, parser=command)

    command = commands.add_parser(
        "bench", usage="quire bench --model DIR --case CASES [FLAG ...]", help="measure one engine in this process"
    )
    _add_bench_flags(command)
    command.set_defaults(run=_bench, parser=command)
    return parser


def _add_bench_flags(command: Parser) -> None:
    command.description = (
        "Cases, comma separated: prefill[:N] decode[:B] mixed[:N] prefix[:N] prefixwarm[:N] noprefix[:N] long[:N].\n"
        "Each case sets --max-model-len, --max-num-seqs and prefix caching itself."
    )
    command.add_argument("--case", required=True, help="e.g. prefill,decode:8,long:8192")
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="timed runs; default: 3")
    command.add_argument("--warmups", type=int, default=1, metavar="N", help="untimed runs before; default: 1")
    command.add_argument("--quiet", type=float, default=0.0, metavar="S", help="wait up to S seconds for idle cores")
    command.add_argument("--json", action="store_true", help="one JSON line for each case")
    add_engine_flags(command, skip=("max_model_len", "max_num_seqs", "enable_prefix_caching"), model_flag=True)


def _bench(found: argparse.Namespace, engine: Effective) -> int:
    from launch.bench import Options, bench

    return bench(engine.config, Options(found.case, found.repeats, found.warmups, found.quiet, found.json))


def generate(found: argparse.Namespace, engine: Effective) -> int:
    from launch.prompts import has_failed, result_line, to_text

    raws = _read_requests(found)
    with _output(found.output) as out:
        llm = start(engine)
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


def _dry_run(engine: Effective) -> int:
    from launch.llm import describe_plan

    print("\n".join(describe_plan(engine.config)))
    return 0


def _limits() -> list[str]:
    """The limits of a request that no model decides, as comments: they are not part of the configuration."""
    import dataclasses

    from pagetable.sampling import Limits

    known = [(f.name, f.default) for f in dataclasses.fields(Limits) if f.default is not dataclasses.MISSING]
    return ["# limits of a request:", *(f"#   {name}: {value}" for name, value in known)]


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


def chat(found: argparse.Namespace, engine: Effective) -> int:
    """Turn by turn, until the input ends; text appears as it comes. A failed turn is taken back."""
    given = {"max_tokens": 512, **sampling_of(found)}
    if given.get("n", 1) != 1:
        raise UsageError("--n: a chat has one answer; use quire generate for several")
    llm = start(engine)
    opening = [{"role": "system", "content": found.system}] if found.system else []
    messages = list(opening)
    failed = False
    for turn in _turns():
        if turn == "/clear":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": turn})
        answer = ""
        try:
            for output in llm.stream({**given, "messages": messages}):
                grown = output.outputs[0].text
                print(_printable(grown[len(answer) :]), end="", flush=True)
                answer = grown
        except QuireError as error:
            note(f"error: {' '.join(str(error).split())}")
            messages.pop()
            failed = True
            continue
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
    return 1 if failed else 0


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


def _check_packages() -> None:
    """Our packages have plain names; another distribution's of the same name would be imported instead of ours."""
    home = Path(__file__).resolve().parent.parent
    for name in ("cluster", "kernels", "pagetable", "worker"):
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve().parent for place in (spec and spec.submodule_search_locations) or ()]
        if places[:1] != [home]:
            raise ConfigError(
                name,
                "another package of that name",
                "be Quire's own package",
                f"pip uninstall {name}, or give Quire an environment of its own",
            )


if __name__ == "__main__":
    sys.exit(main())
