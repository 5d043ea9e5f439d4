"""API keys and the salts that keep tenants apart."""

from __future__ import annotations

import hmac
from hashlib import sha256
from pathlib import Path

import pytest

from cluster import auth
from cluster.auth import ApiKeys, Gate, new_key, page_salt
from pagetable.errors import ConfigError, ServiceError

SECRET = b"s" * 32


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def line(tenant: str, key: str) -> str:
    return f"{tenant} sha256:{sha256(key.encode()).hexdigest()}\n"


def test_a_key_is_its_tenants(tmp_path: Path) -> None:
    text = "# keys\n\n" + line("anna", "k1") + line("ben", "k2") + line("anna", "k3")
    keys = ApiKeys.from_file(write(tmp_path / "keys", text))
    assert [keys.tenant_of(key) for key in ("k1", "k2", "k3")] == ["anna", "ben", "anna"]
    for other in ("", "k", "k1 ", "K1", "k1\0", "k4", "\ud800", sha256(b"k1").hexdigest()):
        assert keys.tenant_of(other) is None


def test_all_hashes_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    hashes = [sha256(key.encode()).digest() for key in ("k1", "k2", "k3")]
    keys = ApiKeys(zip(("a", "b", "c"), hashes, strict=True))
    for key, tenant in (("k1", "a"), ("k3", "c"), ("k9", None)):
        compared.clear()
        assert keys.tenant_of(key) == tenant
        assert compared == hashes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# only words\n",
        "anna\n",
        "anna k1\n",
        "anna sha256:abc\n",
        "anna sha256:" + "A" * 64 + "\n",
        "an/na sha256:" + "a" * 64 + "\n",
        "sha256:" + "a" * 64 + "\n",
        "anna sha256:" + "a" * 64 + " more\n",
        "x" * 65 + " sha256:" + "a" * 64 + "\n",
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ApiKeys.from_file(write(tmp_path / "keys", text))
    assert refused.value.field == "api_keys"


def test_a_key_in_clear_is_refused_and_not_repeated(tmp_path: Path) -> None:
    text = line("anna", "k1") + "ben my-own-password\n"
    with pytest.raises(ConfigError, match="line 2") as refused:
        ApiKeys.from_file(write(tmp_path / "keys", text))
    assert "my-own-password" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="chmod go-w"):
        ApiKeys.from_file(write(tmp_path / "keys", line("anna", "k1"), mode))


def test_a_file_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "gone", tmp_path, tmp_path / "bytes"):
        with pytest.raises(ConfigError, match="api_keys"):
            ApiKeys.from_file(path)


def test_a_new_key_opens_by_its_line_and_stands_nowhere(tmp_path: Path) -> None:
    key, text = new_key("anna")
    assert key not in text
    assert ApiKeys.from_file(write(tmp_path / "keys", text + "\n")).tenant_of(key) == "anna"
    assert new_key("anna")[0] != key
    with pytest.raises(ConfigError, match="tenant"):
        new_key("an na")


def test_the_command_keeps_key_and_line_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert auth.main(["anna"]) == 0
    said = capsys.readouterr()
    keys = ApiKeys.from_file(write(tmp_path / "keys", said.out))
    assert keys.tenant_of(said.err.split()[-1]) == "anna"
    assert auth.main([]) == 2 and auth.main(["an na"]) == 2


def test_a_gate_without_keys_lets_everybody_in_as_nobody() -> None:
    assert Gate(None).admit(()) == Gate(None).admit((("authorization", "Bearer x"),)) == ""


def test_a_gate_wants_one_bearer_key() -> None:
    gate = Gate(ApiKeys([("anna", sha256(b"k1").digest())]))
    for good in ("Bearer k1", "bearer k1", "BEARER  k1 "):
        assert gate.admit((("user-agent", "x"), ("authorization", good))) == "anna"
    bad: list[tuple[tuple[str, str | bytes], ...]] = [
        (),
        (("authorization", "k1"),),
        (("authorization", "Basic k1"),),
        (("authorization", "Bearer k2"),),
        (("authorization", "Bearer "),),
        (("authorization", b"Bearer k1"),),
        (("authorization", "Bearer k1"), ("authorization", "Bearer k1")),
        (("authorization", "Bearer " + "k" * 600),),
        (("authorization-bin", "Bearer k1"),),
    ]
    for metadata in bad:
        with pytest.raises(ServiceError) as refused:
            gate.admit(metadata)
        assert refused.value.code == "UNAUTHENTICATED"


def test_salts_meet_only_within_a_tenant_and_a_secret() -> None:
    assert page_salt(SECRET, "", "") == ""
    inner = hmac.new(SECRET, b"tenant salt\0anna", sha256).digest()
    assert page_salt(SECRET, "anna", "s") == hmac.new(inner, b"s", sha256).hexdigest()
    made = [page_salt(secret, tenant, salt) for secret in (SECRET, b"t" * 32)
            for tenant in ("", "anna", "ben", "annas") for salt in ("", "s", "anna")]  # fmt: skip
    assert len(set(made)) == len(made) - 1  # nobody's pages without salt are the same under every secret
