"""The token without which nobody joins the Ray cluster that we start. Imports no ray, which reads it when imported."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path

_MODE, _PATH, _VALUE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"


class RayToken:
    """A token file of this user alone (mode 0600, in a folder of mode 0700), there before Ray starts."""

    def __init__(self) -> None:
        assert "ray" not in sys.modules, "ray has read its token already"
        self.folder = Path(tempfile.mkdtemp(prefix="quire-"))
        path = self.folder / "ray-token"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        os.environ.update({_MODE: "token", _PATH: str(path)})
        os.environ.pop(_VALUE, None)  # it would win over the file
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # it would take 15: any other process would slow us down

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
