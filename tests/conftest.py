"""For all tests: few threads that sleep while they wait, and no configuration from the developer's shell."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch: OpenMP reads these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["OMP_WAIT_POLICY"] = "passive"
# Before anything imports Triton: it decorates its kernels as it finds this.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from launch.flags import CONFIG_VARIABLES

for _name in CONFIG_VARIABLES:
    os.environ.pop(_name, None)

if Path("/dev/nvidiactl").exists():  # only tests that ask for it use it
    from launch import llm

    os.environ["QUIRE_DEVICE"] = "cpu"
    _choose = llm.choose_device
    llm.choose_device = lambda config, why=None: "cpu" if config.device == "auto" else _choose(config, why)

# Subprocesses of tests import this tree too, installed or not.
_ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (_ROOT, f"{_ROOT}/proto", os.environ.get("PYTHONPATH"))))
