"""The peers' harness with a peer that needs no installation: its pipes, its clock, its end, what is said without it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers import environments
from benchmarks.peers.environments import HERE, PEERS, Peer, find
from benchmarks.peers.protocol import Settings
from benchmarks.peers.remote import RemotePeer
from launch import cli
from pagetable.errors import ConfigError, RequestFailed

_PEER = f"""
import sys, time
sys.path.insert(0, {str(HERE)!r})
from protocol import serve

class Slow:
    def __init__(self, settings):
        print("what libraries print")
        if settings.max_seqs == 0:
            raise SystemExit("no room")
        self.version = f"{{settings.dtype}}-{{settings.threads}}"

    def run(self, jobs):
        began = time.perf_counter()
        while time.process_time() < 0.2:
            pass
        times = []
        for prompt, count in jobs:
            if not prompt:
                raise SystemExit("an empty prompt")
            times.append([began + 0.25 * (1 + at) for at in range(count)])
        return times

serve(Slow)
"""


def peer(tmp_path: Path, max_seqs: int = 4) -> RemotePeer:
    script = tmp_path / "run_slow.py"
    script.write_text(_PEER)
    return RemotePeer(Path(sys.executable), script, Settings("m", "bfloat16", 2, 100, max_seqs, False))


def test_times_are_counted_from_where_the_jobs_arrived_and_cpu_is_the_peers(tmp_path: Path) -> None:
    slow = peer(tmp_path)
    try:
        assert slow.version == "bfloat16-2"
        began = time.perf_counter()
        one, two = slow.run([([1, 2], 3), ([3], 1)])
        assert [stamp - one[0] for stamp in one] == pytest.approx([0, 0.25, 0.5], abs=1e-9)
        assert two == [one[0]]
        assert began + 0.25 <= one[0] < began + 0.35  # whatever starting and the pipe took
        assert 0 < slow.elsewhere < 0.5
        assert slow.run([([1], 2)])[0][1] > one[0]
        with pytest.raises(RequestFailed, match=r"(?s)slow ended: .*an empty prompt"):
            slow.run([([], 1)])
    finally:
        slow.close()


def test_a_peer_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RequestFailed, match=r"(?s)slow ended: .*no room"):
        peer(tmp_path, max_seqs=0)


def test_a_missing_environment_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'vllm', must be installed; python -m benchmarks.peers.environments vllm"):
        find("vllm", tmp_path)
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "quire-recipe").write_text("an older one")
    with pytest.raises(ConfigError, match="must be installed"):
        find("vllm", tmp_path)


def test_an_environment_is_made_once_and_a_failure_shows_pips_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Peer("good", (("list",),))
    for _ in range(2):
        good.install(tmp_path)
    assert capsys.readouterr().out == f"good: installing into {tmp_path / 'good'}\n"
    assert good.is_installed(tmp_path) and good.python(tmp_path).exists()
    assert not Peer("good", (("list", "--quiet"),)).is_installed(tmp_path)
    monkeypatch.setitem(PEERS, "bad", Peer("bad", (("install", str(tmp_path / "nothing.whl")),)))
    assert environments.main(["bad", "--cache", str(tmp_path)]) == 1
    assert "bad: pip install" in (err := capsys.readouterr().err) and "nothing.whl" in err
    assert not PEERS["bad"].is_installed(tmp_path)


def test_a_model_is_converted_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(Peer, "python", lambda *_: Path(sys.executable))
    (tmp_path / "prepare_fake.py").write_text(
        "import pathlib, sys\n"
        "if 'bad' in pathlib.Path(sys.argv[1], 'config.json').read_text(): sys.exit('not this one')\n"
        "pathlib.Path(sys.argv[2]).mkdir()\npathlib.Path(sys.argv[2], 'made').write_text(sys.argv[1])\n"
    )
    fake, model = Peer("fake", (), prepares=True), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("one")
    made = fake.prepare(tmp_path, model)
    assert (made / "made").read_text() == str(model)
    assert fake.prepare(tmp_path, model) == made
    (model / "config.json").write_text("two")
    assert fake.prepare(tmp_path, model) != made
    (model / "config.json").write_text("bad")
    with pytest.raises(RequestFailed, match=r"(?s)fake: the model was not converted:.*not this one"):
        fake.prepare(tmp_path, model)
    assert len(list((tmp_path / "models").iterdir())) == 2
    assert Peer("plain", ()).prepare(tmp_path, model) == model


def test_quire_bench_compare_is_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "compare", "--cases", "fast", "--model", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("compare: ")
