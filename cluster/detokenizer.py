"""Token ids to text as they come, and the strings that end it.

`Detokenizer` gives, over all its pushes, the text that `Tokenizer.decode` gives for all ids at once, and never half
a code point. What is given is final, so it holds back what a later token may still change:

* Byte-level tokenizers (Llama 3, Qwen): the bytes of a code point that is not complete.
* Byte-fallback tokenizers (Llama 2, Mistral): a run of `<0xNN>` tokens, until it ends; the library takes the run as
  text only if all of it is valid, so even its whole code points may turn into U+FFFD.
* Others: text that ends in U+FFFD, for a few tokens.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence

from cluster.tokenizer import Tokenizer, byte_alphabet

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT = "\ufffd"
# A code point has at most four bytes: U+FFFD that stands after so many tokens stays.
_MAX_HELD = 4


class Detokenizer:
    """One sequence's text, incrementally; the work per token does not grow with the sequence.

    Args:
        skip_special_tokens: leave out the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # The window: ids[:read], given as text by the last push, are the context of what follows, since decoders treat
        # the very first token in another way (its space is cut). The last `_run` ids are an open run of byte tokens.
        self._ids: list[int] = []
        self._read = self._run = 0

    def push(self, ids: Iterable[int]) -> str:
        """The text that is final with these further tokens."""
        # the library drops such tokens before it decodes, so they must not stand between two windows either
        kept = [i for i in ids if i not in self._skipped and self._tokenizer.piece(i) is not None]
        if self._tokenizer.byte_level:
            return self._bytes.decode(b"".join(map(self._token_bytes, kept)))
        self._ids += kept
        fallback = self._tokenizer.byte_fallback
        for token in kept if fallback else ():
            self._run = self._run + 1 if _BYTE_PIECE.fullmatch(self._tokenizer.piece(token) or "") else 0
        return self._advance(len(self._ids) - self._run, hold=not fallback)

    def finish(self) -> str:
        """What was held back, as it is; nothing may be pushed afterwards."""
        if self._tokenizer.byte_level:
            return self._bytes.decode(b"", final=True)
        return self._advance(len(self._ids), hold=False)

    def _token_bytes(self, token: int) -> bytes:
        piece, table = self._tokenizer.piece(token) or "", byte_alphabet()
        try:
            return bytes(table[char] for char in piece)
        except KeyError:  # an added token with characters outside the alphabet is itself
            return piece.encode()

    def _advance(self, end: int, hold: bool) -> str:
        """The text of ids[read:end]; nothing yet where it may be the beginning of a code point and `hold`."""
        if end == self._read:
            return ""
        decode = self._tokenizer.decode
        before = decode(self._ids[: self._read], skip_special_tokens=False)
        whole = decode(self._ids[:end], skip_special_tokens=False)
        if hold and whole.endswith(_REPLACEMENT) and end - self._read < _MAX_HELD:
            return ""
        del self._ids[: self._read]
        self._read = end - self._read
        return whole[len(before) :]


class StopStrings:
    """Cuts text at the first stop string, however the text is chopped.

    Of several matches the one that ends first wins, and of those that end together the one that starts first.
    A caller that wants `min_tokens` outputs first does not push the text of those.

    Args:
        include: whether the stop string is part of the text.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop, self._include = tuple(stop), include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is final, the stop string that ended it or None); after a match there is no further text."""
        if self.matched is not None or not text:
            return "", self.matched
        if not self._stop:
            return text, None
        text = self._held + text
        found = [(at + len(each), at, each) for each in self._stop if (at := text.find(each)) >= 0]
        if found:
            end, start, self.matched = min(found)
            self._held = ""
            return text[: end if self._include else start], self.matched
        keep = max(_overlap(text, each) for each in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What was held back as the possible start of a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
