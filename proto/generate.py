"""Makes `quire_pb`, the Python side of the contracts, out of `proto/quire/**/*.proto`.

    python proto/generate.py            writes proto/quire_pb
    python proto/generate.py --check    writes nothing; exit 1 where a stub is not what would be written

The sources lie where their packages say (proto/quire/inference/v1), so protoc writes imports of `quire.inference.v1`;
but `quire` is the users' module, hence three substitutions move the stubs to `quire_pb.inference.v1`. The names on the
wire stay. Needs grpcio-tools of exactly one version: newer ones write stubs that protobuf 6 refuses to load.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TOOLS_VERSION = "1.80.1"  # writes protobuf 6.31 code, which protobuf 6 and 7 run; 1.82 and newer write 7.35
ROOT = Path(__file__).resolve().parent
PACKAGE = "quire_pb"
BANNER = "# Made by proto/generate.py"
SUBSTITUTIONS = (
    (re.compile(r"^from quire\.", re.MULTILINE), f"from {PACKAGE}."),
    # __module__ of the message classes: a pickled message names it
    (re.compile(r"_descriptor, 'quire\."), f"_descriptor, '{PACKAGE}."),
    (re.compile(r"\(DESCRIPTOR, 'quire\."), f"(DESCRIPTOR, '{PACKAGE}."),
)
_SERVICE = re.compile(r"^service \w+ \{", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the stubs are stale")
    parser.add_argument("--out", type=Path, default=ROOT / PACKAGE, help="where the stubs lie (default: %(default)s)")
    found = parser.parse_args(arguments)
    out: Path = found.out
    fault = _tools_fault()
    if fault is not None:
        print(f"generate.py: {fault}", file=sys.stderr)
        return 2
    fresh = stubs()
    if not found.check:
        write(fresh, out)
        return 0
    stale = differences(fresh, out)
    for name, why in stale.items():
        print(f"generate.py: {out / name}: {why}; run python proto/generate.py", file=sys.stderr)
    return 1 if stale else 0


def stubs() -> dict[str, bytes]:
    """Every file of `quire_pb` by its path in there, with slashes."""
    sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "quire").rglob("*.proto"))
    services = [name for name in sources if _SERVICE.search((ROOT / name).read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory() as folder:
        _protoc(f"--python_out={folder}", f"--pyi_out={folder}", *sources)
        _protoc(f"--grpc_python_out={folder}", *services)
        made = sorted(path for path in (Path(folder) / "quire").rglob("*") if path.is_file())
        files = {path.relative_to(Path(folder) / "quire").as_posix(): path.read_text(encoding="utf-8") for path in made}
    files = {name: _banner(name) + _moved(text) for name, text in files.items()}
    packages = {parent.as_posix() for name in files for parent in Path(name).parents}
    for package in packages:
        files[(Path(package) / "__init__.py").as_posix()] = f"{BANNER}. Do not edit.\n"
    files["py.typed"] = ""  # tells type checkers that the .pyi files count
    return {name: files[name].encode() for name in sorted(files)}


def differences(fresh: dict[str, bytes], out: Path) -> dict[str, str]:
    """What is wrong with each file under `out` (path in there -> why), byte by byte."""
    there = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name: "is missing" for name in fresh if name not in there}
    found |= {name: "has no source" for name in there if name not in fresh}
    found |= {name: "is stale" for name in fresh if name in there and there[name] != fresh[name]}
    return dict(sorted(found.items()))


def write(fresh: dict[str, bytes], out: Path) -> None:
    """Write every stub and remove those whose source is gone; files without our banner are left alone."""
    for name, why in differences(fresh, out).items():
        if why == "has no source" and (out / name).read_bytes().startswith(BANNER.encode()):
            (out / name).unlink()
    for name, data in fresh.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _tools_fault() -> str | None:
    """Why the stubs can't be made here, or None."""
    try:
        there = version("grpcio-tools")
    except PackageNotFoundError:
        there = "none"
    if there == TOOLS_VERSION:
        return None
    return f"grpcio-tools: got {there}, must be {TOOLS_VERSION}; pip install grpcio-tools=={TOOLS_VERSION}"


def _protoc(*arguments: str) -> None:
    from grpc_tools import protoc

    code = protoc.main(["protoc", f"--proto_path={ROOT}", *arguments])
    if code:
        raise SystemExit(f"generate.py: protoc failed ({code}); its messages stand above")


def _banner(name: str) -> str:
    source = re.sub(r"_pb2(_grpc)?\.pyi?$", ".proto", name)
    return f"{BANNER} from proto/quire/{source}. Do not edit.\n"


def _moved(text: str) -> str:
    for pattern, replacement in SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
