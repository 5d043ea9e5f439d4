"""`quire`: generate, chat, serve and bench on the command line.

Exit codes: 0; 1 where a request or the model failed; 2 where the command line or the configuration may not be;
130 after an interrupt. Heavy modules are imported by the commands that need them, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.commands import chat, generate
from launch.config import SETTINGS
from launch.flags import Effective, Parser, UsageError, add_engine_flags, add_sampling_flags, effective, flag_of
from launch.machine import sleep_while_waiting
from launch.plan import add_plan_flags, plan
from launch.remote import add_server_flags
from launch.serve_flags import DEFAULT_PORT, add_serve_flags
from pagetable.errors import ConfigError, NotSupported, QuireError
from quire import __version__

if TYPE_CHECKING:
    pass

# commands that talk to a running service
_REMOTE = {
    "status": "what each shard of a service is and does",
    "pages": "which pages its sequences hold, as (device_id, block_id)",
    "devices": "its pools of blocks",
    "stop": "end a service of this machine: what runs may finish",
}
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
    if list(argv[:2]) == ["bench", "compare"]:
        return _compare(argv[2:])
    parser = build_parser()
    found = parser.parse(argv)
    if found.command is None:
        parser.print_help(sys.stderr)
        return 2
    _check_packages()
    if found.command in _REMOTE or getattr(found, "server", None) is not None:
        _refuse_engine_flags(found)
        return int(found.run(found, None))
    if found.command == "plan":
        return int(found.run(found))
    engine = effective(found, os.environ)
    if found.print_config:
        print("\n".join([*engine.to_yaml(), *_limits()]))
        return 0
    if found.dry_run and found.command != "serve":  # which plans for all its shards
        return _dry_run(engine)
    code: int = found.run(found, engine)
    return code


def _refuse_engine_flags(found: argparse.Namespace) -> None:
    """An engine is configured where it runs."""
    given = [name for name in SETTINGS if name != "model" and hasattr(found, name)]
    given += [name for name in ("config", "print_config", "dry_run") if getattr(found, name, None)]
    if given:
        raise UsageError(
            f"{flag_of(given[0])}: stands with an engine in this process, not with --server; drop one of the two"
        )


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
    add_server_flags(command, required=False)
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
    add_server_flags(command, required=False)
    add_engine_flags(command)
    command.set_defaults(run=chat, parser=command)

    command = commands.add_parser(
        "serve",
        usage="quire serve MODEL [FLAG ...]",
        help="serve a model over gRPC",
        description="Starts a global scheduler, a front and a worker for each replica; ends on SIGTERM or Ctrl-C.",
    )
    add_serve_flags(command)
    add_engine_flags(command)
    command.set_defaults(run=_serve, parser=command)

    command = commands.add_parser(
        "bench",
        usage="quire bench --model DIR --case CASES [FLAG ...]\n       quire bench compare [--help] [FLAG ...]",
        help="measure one engine in this process, or beside others",
    )
    _add_bench_flags(command)
    command.set_defaults(run=_bench, parser=command)

    command = commands.add_parser(
        "plan",
        usage="quire plan MODEL --devices N --context L --batch B [FLAG ...]\n"
        "       quire plan --measure [--output FILE]",
        help="predict which layout of a model on some devices is quickest",
    )
    add_plan_flags(command)
    command.set_defaults(run=plan, parser=command)

    for name, text in _REMOTE.items():
        command = commands.add_parser(name, usage=f"quire {name} [FLAG ...]", help=text, description=text)
        if name == "pages":
            command.add_argument("request_id", nargs="?", metavar="REQUEST", help="only this request's")
        if name == "stop":
            command.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"of gRPC; default: {DEFAULT_PORT}")
            command.add_argument("--admin-socket", metavar="PATH", help="where the service was given one")
        else:
            add_server_flags(command, required=True)
            command.add_argument("--admin-socket", metavar="PATH", help="instead of --server: no key, all tenants")
        command.set_defaults(run=_remote, parser=command)
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


def _remote(found: argparse.Namespace, _: None) -> int:
    from launch import remote

    code: int = getattr(remote, found.command)(found)
    return code


def _serve(found: argparse.Namespace, engine: Effective) -> int:
    from launch.serve import serve

    return serve(found, engine)


def _bench(found: argparse.Namespace, engine: Effective) -> int:
    from launch.bench import Options, bench

    return bench(engine.config, Options(found.case, found.repeats, found.warmups, found.quiet, found.json))


def _compare(argv: Sequence[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "compare.py").exists():
        raise NotSupported("quire bench compare: needs a checkout of the repository (benchmarks/ is not installed)")
    sys.path.insert(0, str(root))
    code: int = importlib.import_module("benchmarks.compare").main(argv)
    return code


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
