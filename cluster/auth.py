"""Who calls: API keys, their tenants, and what keeps tenants' pages apart.

    python -m cluster.auth TENANT >> keys.txt         makes a key: the line for the file on stdout, the key on stderr

A line of a keys file is `tenant sha256:HEX`; the key itself stands nowhere. Keys are 32 random bytes, so a plain hash
can't be guessed back. A tenant may have many keys. Blank lines and lines that begin with # are passed over.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from pagetable.errors import ConfigError, ServiceError

MAX_FILE_BYTES = 16 << 20
MAX_KEY_CHARS = 512
_TENANT = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_BEARER = "bearer "


class ApiKeys:
    """The keys of a service, as hashes.

    Args:
        entries: (tenant, SHA-256 of the key).
    """

    def __init__(self, entries: Iterable[tuple[str, bytes]]) -> None:
        self._entries = list(entries)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> ApiKeys:
        """Raises ConfigError where the file can't be read, others may write it, a line is none or there is no key."""
        try:
            mode = os.stat(path).st_mode
            if os.stat(path).st_size > MAX_FILE_BYTES:
                raise ConfigError("api_keys", str(path), f"have at most {MAX_FILE_BYTES} bytes")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api_keys", str(path), f"be a file of text ({type(error).__name__})") from None
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError("api_keys", str(path), "be writable by its owner only", "chmod go-w it")
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                entries.append(_read_line(number, line))
        if not entries:
            cure = "make one: python -m cluster.auth TENANT >> FILE"
            raise ConfigError("api_keys", str(path), "hold at least one key", cure)
        return cls(entries)

    def tenant_of(self, key: str) -> str | None:
        """Whose key it is, or None. All hashes are compared, each in constant time, whichever key it is."""
        digest = _hash(key)
        found = None
        for tenant, known in self._entries:
            if hmac.compare_digest(digest, known):
                found = tenant
        return found


class Gate:
    """Decides from a call's metadata which tenant calls.

    Args:
        keys: None lets everybody in as tenant "".
    """

    def __init__(self, keys: ApiKeys | None) -> None:
        self._keys = keys

    @property
    def is_open(self) -> bool:
        return self._keys is None

    def admit(self, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The tenant. Raises ServiceError UNAUTHENTICATED; its text does not say what was wrong with the key."""
        if self._keys is None:
            return ""
        given = [value for name, value in metadata if name == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str) or not given[0].lower().startswith(_BEARER):
            raise ServiceError("UNAUTHENTICATED", "authorization: must be given once in the metadata, as `Bearer KEY`")
        key = given[0][len(_BEARER) :].strip()
        tenant = self._keys.tenant_of(key) if len(key) <= MAX_KEY_CHARS else None
        if tenant is None:
            raise ServiceError("UNAUTHENTICATED", "authorization: this API key is not known here")
        return tenant


def page_salt(secret: bytes, tenant: str, salt: str) -> str:
    """What a shard gets as cache_salt: pages are shared under an equal one only. "" for nobody's pages without salt.

    A tenant's part is an HMAC of the cluster's secret, so no salt that a user can send reaches another tenant's pages,
    and a user's own salt goes no further than this hash.
    """
    if not tenant and not salt:
        return ""
    tenant_salt = hmac.new(secret, b"tenant salt\0" + tenant.encode(), sha256).digest()
    return hmac.new(tenant_salt, salt.encode(), sha256).hexdigest()


def new_key(tenant: str) -> tuple[str, str]:
    """(a fresh key, its line for the keys file). Raises ConfigError where the name can't be a tenant's."""
    if not _TENANT.fullmatch(tenant):
        raise ConfigError("tenant", tenant, "be 1 to 64 characters out of A-Z a-z 0-9 _ . -")
    key = "quire-" + secrets.token_urlsafe(32)
    return key, f"{tenant} sha256:{_hash(key).hex()}"


def _read_line(number: int, line: str) -> tuple[str, bytes]:
    words = line.split()
    found = _HASH.fullmatch(words[1]) if len(words) == 2 else None
    if found is None or not _TENANT.fullmatch(words[0]):
        # the line itself is not shown: somebody may have put a key there
        limit = "be `tenant sha256:HEX`, the hash of a key"
        raise ConfigError("api_keys", f"line {number}", limit, "make one: python -m cluster.auth TENANT")
    return words[0], bytes.fromhex(found[1])


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m cluster.auth TENANT >> FILE", file=sys.stderr)
        return 2
    try:
        key, line = new_key(arguments[0])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(line)
    print(f"the key, which is written nowhere: {key}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
