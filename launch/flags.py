"""Flags made from the fields of the configuration and of a request's sampling, and the order in which sources win.

First a flag, then a variable `QUIRE_*`, then the `--config` file, then the default.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from launch.config import DEFAULTS, SETTINGS, EngineConfig, Setting
from launch.config_file import nearest, read_config_file
from pagetable.errors import ConfigError
from pagetable.sampling import SamplingParams

ENVIRONMENT = "QUIRE_"
CONFIG_VARIABLES = (*(ENVIRONMENT + name.upper() for name in SETTINGS), "QUIRE_CONFIG")
# Read elsewhere, and so not a mistake: the kernels' backend.
_OTHER_VARIABLES = ("QUIRE_KERNELS",)


class UsageError(ConfigError):
    """A command line that cannot be read. Its text stands alone."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)


class Parser(argparse.ArgumentParser):
    """argparse that raises one line instead of printing its whole usage, and never guesses from a prefix."""

    def __init__(self, **more: Any) -> None:
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists what there is")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """UsageError with the nearest flag where one is unknown."""
        found, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=", 1)[0]
            owner: Parser = getattr(found, "parser", self)
            cure = nearest(flag, owner._option_string_actions) or f"{owner.prog} --help lists what there is"
            raise UsageError(f"{flag}: no such {'flag' if flag.startswith('-') else 'argument'}; {cure}")
        return found


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return ENVIRONMENT + name.upper()


def add_engine_flags(parser: Parser, *, skip: Collection[str] = (), model_flag: bool = False) -> None:
    """One flag for each field of EngineConfig that is not in `skip`; absent flags leave nothing in the namespace.

    Args:
        model_flag: the model is `--model DIR` instead of the first argument.
    """
    model_help = SETTINGS["model"].help
    if model_flag:
        parser.add_argument("--model", metavar="DIR", default=argparse.SUPPRESS, help=model_help)
    else:
        parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=model_help)
    group = parser.add_argument_group(
        "engine", "Each flag is also an environment variable (QUIRE_BLOCK_SIZE) and a key of the file (block-size)."
    )
    group.add_argument("--config", metavar="FILE", help="YAML file with any of these keys")
    group.add_argument(
        "--print-config", action="store_true", help="print the configuration that holds as YAML and stop"
    )
    group.add_argument("--dry-run", action="store_true", help="read the model's config, print the memory plan and stop")
    for name, known in SETTINGS.items():
        if name == "model" or name in skip:
            continue
        flags = [flag_of(name), *([known.short] if known.short else [])]
        text = _help(name, known)
        if known.kind == "bool":
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(*flags, default=argparse.SUPPRESS, metavar=_metavar(known), help=text)


def add_sampling_flags(parser: Parser) -> None:
    """One flag for each field of SamplingParams that fits one; `--seed` is the engine's, lines may bring their own."""
    group = parser.add_argument_group("sampling", "Defaults for requests that do not say.")
    for field in dataclasses.fields(SamplingParams):
        kind, flag, dest = str(field.type), flag_of(field.name), _SAMPLING + field.name
        if field.name == "seed" or kind not in _SAMPLING_KINDS:
            continue
        more: dict[str, Any] = {"dest": dest, "default": argparse.SUPPRESS}
        if kind == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **more)
        elif kind.startswith("tuple"):
            more |= {"action": "append", "help": "may stand several times"}
            group.add_argument(flag, type=_SAMPLING_KINDS[kind], metavar="X", **more)
        else:
            text = f"default: {_UNSAID.get(field.name, field.default)}"
            group.add_argument(flag, type=_SAMPLING_KINDS[kind], metavar="X", help=text, **more)


def sampling_of(found: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that were given as flags, by the names that a request's JSON uses."""
    return {name[len(_SAMPLING) :]: value for name, value in vars(found).items() if name.startswith(_SAMPLING)}


def _optional_int(text: str) -> int | None:
    return None if text.lower() in ("none", "null") else int(text)


_optional_int.__name__ = "int"  # argparse names the type in its errors

_SAMPLING = "sampling_"
# What an absent field means, where its default as a value does not say it.
_UNSAID = {"max_tokens": "as many as fit", "logprobs": "none", "prompt_logprobs": "none"}
_SAMPLING_KINDS: dict[str, Callable[[str], Any]] = {
    "bool": bool,
    "float": float,
    "int": int,
    "int | None": _optional_int,
    "tuple[int, ...]": int,
    "tuple[str, ...]": str,
}


def _metavar(known: Setting) -> str:
    if known.kind == "choice":
        return "|".join(known.choices)
    return {"int": "N", "size": "SIZE"}.get(known.kind, "TEXT")


def _help(name: str, known: Setting) -> str:
    default = DEFAULTS[name]
    shown = str(default).lower() if isinstance(default, bool) else known.show(default)
    text = known.help if default is None else f"{known.help}; default: {shown}"
    return text.replace("%", "%%")


@dataclass(frozen=True, slots=True)
class Effective:
    """The configuration that holds, and where each value came from.

    Attributes:
        origins: field -> the flag, variable or file that set it, or `default`.
    """

    config: EngineConfig
    origins: Mapping[str, str]

    def changed(self) -> list[str]:
        """`block_size=32 (--block-size)` for each field but the model that differs from its default."""
        return [
            f"{name}={SETTINGS[name].show(getattr(self.config, name))} ({origin})"
            for name, origin in self.origins.items()
            if name != "model" and getattr(self.config, name) != DEFAULTS[name]
        ]

    def to_yaml(self) -> list[str]:
        """Lines that `--config` reads back, each with its origin as a comment."""
        import yaml

        lines = []
        for name, origin in self.origins.items():
            value = {name.replace("_", "-"): SETTINGS[name].show(getattr(self.config, name))}
            lines.append(f"{yaml.safe_dump(value, width=1 << 20, allow_unicode=True).rstrip()}  # {origin}")
        return lines


def effective(found: argparse.Namespace, environ: Mapping[str, str]) -> Effective:
    """Merge the sources. ConfigError or NotSupported names the value as its source spells it."""
    _refuse_unknown_variables(environ)
    file = found.config if found.config is not None else environ.get("QUIRE_CONFIG")
    in_file = read_config_file(file, SETTINGS) if file is not None else {}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, known in SETTINGS.items():
        flag, variable = flag_of(name), variable_of(name)
        if hasattr(found, name):
            spelled, origin, value = flag, "argument" if name == "model" else flag, getattr(found, name)
            value = value if isinstance(value, bool) else known.parse(spelled, value)
        elif variable in environ:
            spelled, origin, value = variable, variable, known.parse(variable, environ[variable])
        elif name in in_file:
            spelled, origin = f"{name.replace('_', '-')} in {file}", str(file)
            value = known.from_yaml(spelled, in_file[name])
        else:
            spelled, origin, value = name, "default", DEFAULTS[name]
        if name == "model" and value is None:
            raise UsageError(f"model: missing, must be the {known.help}; give it on the command line or as {variable}")
        known.check(spelled, value)
        values[name], origins[name] = value, origin
    return Effective(EngineConfig(**values), origins)


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """A misspelt variable would otherwise be a silent default."""
    for variable in sorted(environ):
        if variable.startswith(ENVIRONMENT) and variable not in (*CONFIG_VARIABLES, *_OTHER_VARIABLES):
            raise ConfigError(
                variable,
                environ[variable],
                "be a variable that Quire knows",
                nearest(variable, CONFIG_VARIABLES) or "unset it",
            )
