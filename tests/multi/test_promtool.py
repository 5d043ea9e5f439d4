"""`promtool check metrics` over what a running service with traffic says."""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.request

import pytest

from launch.client import Client
from tests.multi.test_front import PROMPT, Running, start, stop


@pytest.fixture(scope="module")
def promtool(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The one on the path, else Debian's, unpacked and not installed."""
    found = shutil.which("promtool")
    if found is not None:
        return found
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        pytest.skip("promtool is not on the path, and there is no apt-get to fetch it with")
    folder = tmp_path_factory.mktemp("prometheus")
    done = subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, capture_output=True, timeout=120)
    packages = list(folder.glob("*.deb"))
    if done.returncode or not packages:
        pytest.skip("promtool is not on the path, and Debian's package prometheus could not be fetched")
    subprocess.run(["dpkg", "-x", str(packages[0]), str(folder)], check=True)
    return str(folder / "usr/bin/promtool")


def complaints(promtool: str, text: str) -> list[str]:
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    return (done.stdout + done.stderr).splitlines()


def scraped(running: Running) -> str:
    """After traffic, once the shard's figures are there."""
    with Client(running.server) as client:
        client.complete({"prompt": PROMPT, "max_tokens": 20})
    deadline = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(running.metrics) as answer:
            text: str = answer.read().decode()
        if "quire_gpu_mem_used{" in text:
            return text
        assert time.monotonic() < deadline, text
        time.sleep(0.1)


def test_promtool_has_nothing_to_say(promtool: str) -> None:
    running = start()
    try:
        assert complaints(promtool, scraped(running)) == []
    finally:
        stop(running)


def test_of_vllms_names_promtool_refuses_their_colons_only(promtool: str) -> None:
    running = start("--metrics-compat", "vllm")
    try:
        found = complaints(promtool, scraped(running))
    finally:
        stop(running)
    assert found and all(
        line.startswith("vllm:") and line.endswith("metric names should not contain ':'") for line in found
    )


def test_promtool_finds_what_is_wrong(promtool: str) -> None:
    assert complaints(promtool, "# TYPE quire_wait_ms gauge\nquire_wait_ms 1\n")
