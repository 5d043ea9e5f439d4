"""The users' door: `from quire import LLM, SamplingParams, connect`.

Names are loaded when they are first asked for, so that `import quire` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.client import AsyncClient as AsyncClient
    from launch.client import Client as Client
    from launch.client import connect as connect
    from launch.config import EngineConfig as EngineConfig
    from launch.llm import LLM as LLM
    from launch.llm import CompletionOutput as CompletionOutput
    from launch.llm import RequestOutput as RequestOutput
    from pagetable.errors import QuireError as QuireError
    from pagetable.sampling import SamplingParams as SamplingParams

# Never 0.17 to 0.19: transformers would take our package `kernels` for Hugging Face's of that version.
__version__ = "0.1.0"

_HOMES = {
    "AsyncClient": "launch.client",
    "Client": "launch.client",
    "LLM": "launch.llm",
    "connect": "launch.client",
    "CompletionOutput": "launch.llm",
    "RequestOutput": "launch.llm",
    "EngineConfig": "launch.config",
    "QuireError": "pagetable.errors",
    "SamplingParams": "pagetable.sampling",
}

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "CompletionOutput",
    "EngineConfig",
    "QuireError",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "connect",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    if name == "LLM":
        importlib.import_module("launch.machine").sleep_while_waiting()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
