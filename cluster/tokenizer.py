"""A model folder's tokenizer: text to token ids and back, on the `tokenizers` library. No code of the folder is run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models

from pagetable.errors import ModelError

MAX_TOKENIZER_BYTES = 256 << 20
MAX_CONFIG_BYTES = 16 << 20

# Normalisers and pre-tokenisers that can't lose text, and by how much they can shrink its bytes. NFC composes at most
# three bytes into one (the Kelvin sign becomes K); four leaves a margin.
_SHRINK = {"NFC": 4, "Prepend": 1, "Replace": 1, "ByteLevel": 1, "Metaspace": 1, "Split": 1, "Digits": 1}


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and up, in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _parts(component: Any, plural: str) -> list[dict[str, Any]]:
    """A normaliser, pre-tokeniser or decoder of the library as JSON, sequences flattened."""
    if component is None:
        return []

    def flat(node: dict[str, Any]) -> list[dict[str, Any]]:
        return [x for child in node[plural] for x in flat(child)] if node["type"] == "Sequence" else [node]

    return flat(json.loads(component.__getstate__()))


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """A JSON object from a file of the model folder; ModelError by the file's name where it is not one."""
    try:
        if path.stat().st_size > max_bytes:
            raise ModelError(f"{path.name}: is larger than {max_bytes} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: can't be read as JSON ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.name}: must be a JSON object, is a {type(found).__name__}")
    return found


def _content(config: Mapping[str, Any], key: str) -> str | None:
    """A special token of tokenizer_config.json: a string, or an AddedToken as a mapping."""
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and (not isinstance(value, str) or _has_surrogate(value)):
        raise ModelError(f"tokenizer_config.json: {key} must be a string that UTF-8 can hold, or hold one as content")
    return value


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _find_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else `chat_template` of the config: a string, or a list of named ones with a default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            if file.stat().st_size > MAX_CONFIG_BYTES:
                raise ModelError(f"{file.name}: is larger than {MAX_CONFIG_BYTES} bytes")
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{file.name}: can't be read as text ({type(error).__name__})") from error
    given = config.get("chat_template")
    if isinstance(given, list):
        try:
            given = {each["name"]: each["template"] for each in given}.get("default")
        except (TypeError, KeyError):
            raise ModelError("tokenizer_config.json: chat_template must be a list of {name, template}") from None
    if given is not None and not isinstance(given, str):
        raise ModelError("tokenizer_config.json: chat_template must be a string or a list of {name, template}")
    return given


class Tokenizer:
    """Encodes and decodes as transformers does for the same folder: tokenizer.json decides, also on bos and eos.

    Attributes:
        special_ids: ids that `skip_special_tokens` leaves out.
        special_tokens: text by the config's key (`bos_token`, `pad_token`, ...), for chat templates.
        bos_token, eos_token: as text; None where the folder names none.
        bos_id, eos_id: their ids.
        chat_template: jinja source, or None.
        max_token_bytes: no token stands for more bytes of a prompt; None where the tokenizer can drop text.
        byte_level: whether decoding is bytes behind the byte-level alphabet.
        byte_fallback: whether decoding joins `<0xNN>` tokens.
    """

    def __init__(self, library: tokenizers.Tokenizer, config: Mapping[str, Any], template: str | None = None) -> None:
        self._library = library
        library.no_truncation()
        library.no_padding()
        self.bos_token, self.eos_token = _content(config, "bos_token"), _content(config, "eos_token")
        self.bos_id, self.eos_id = self._id(self.bos_token), self._id(self.eos_token)
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        named = [key for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)]
        self.special_tokens = {key: text for key in named if (text := _content(config, key)) is not None}
        self.chat_template = template
        decoder = [part["type"] for part in _parts(library.decoder, "decoders")]
        self.byte_level = decoder == ["ByteLevel"]
        self.byte_fallback = "ByteFallback" in decoder
        self.max_token_bytes = self._longest()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The folder's tokenizer, or None where it holds no tokenizer.json (such a model serves token ids).

        Raises:
            ModelError: a file is corrupt, too large, or wants code of the folder to be run.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(f"tokenizer.json: is larger than {MAX_TOKENIZER_BYTES} bytes")
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path, MAX_CONFIG_BYTES) if config_path.is_file() else {}
        if config.get("auto_map"):
            raise ModelError("tokenizer_config.json: auto_map asks for code of the model folder, which is never run")
        try:
            library = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are not Exceptions
            raise ModelError(f"tokenizer.json: the tokenizers library refuses it ({str(error)[:200]})") from error
        return cls(library, config, _find_template(folder, config))

    @property
    def vocab_size(self) -> int:
        return self._library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of text. The text must hold no lone surrogate."""
        return self._library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know (a model's vocabulary may be larger) are nothing."""
        return self._library.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token: int) -> str | None:
        """A token as the tokenizer spells it, or None where it does not know the id."""
        return self._library.id_to_token(token)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._library.token_to_id(token)

    def _longest(self) -> int | None:
        """Bytes of prompt that one token can stand for, or None where that has no bound."""
        library = self._library
        parts = _parts(library.normalizer, "normalizers") + _parts(library.pre_tokenizer, "pretokenizers")
        shrink = 1
        for part in parts:
            if part["type"] not in _SHRINK or part.get("behavior") == "Removed":
                return None
            if part["type"] == "Replace":
                pattern = part["pattern"].get("String")
                if pattern is None or len(part["content"].encode()) < len(pattern.encode()):
                    return None
            shrink *= _SHRINK[part["type"]]
        added = library.get_added_tokens_decoder().values()
        if not isinstance(library.model, models.BPE) or any(x.lstrip or x.rstrip for x in added):
            return None
        vocabulary = library.get_vocab(with_added_tokens=True)
        if any(part["type"] == "ByteLevel" for part in parts):
            bytes_known = byte_alphabet().keys() <= vocabulary.keys()
        else:
            bytes_known = library.model.byte_fallback and all(f"<0x{x:02X}>" in vocabulary for x in range(256))
        # where a byte has no token, an unknown run of any length may become one token, or none
        return shrink * max(len(token.encode()) for token in vocabulary) if bytes_known else None
