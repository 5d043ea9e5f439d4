"""What the `recall` model reads and writes: its words, their ids, and texts to ask about. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LENGTH = (1 << 20) + 4096  # the question and its answer stand behind a context of 2^20 tokens

SPECIALS = ("<unk>", "<s>", "</s>")
KEYS = tuple(
    first + vowel + second + end
    for first in "BDFGHJKLMNPRSTVZ"
    for vowel in "ao"
    for second in "klmnrstv"
    for end in "aeio"
)
UNKNOWN = "unknown"
VALUES = (*map(str, range(1000)), UNKNOWN)
_FILLERS = """\
. , ? ! ; - the a an and or but of in on at to from with by for as it that this these there then when where what who
why how not no yes all some one two many more most other new old long short good small great day night time year page
book quire word line shelf road house tree river rain sun said read went came saw took made found each every he she
they we you I
"""
FILLERS = tuple(_FILLERS.split())
WORDS = (*SPECIALS, *KEYS, *VALUES, *FILLERS)
UNK, BOS, EOS = range(3)

# Stated as `Balo -> 203`, `Balo = 203` or `Balo is 203`, asked for as `Balo ->`: such signs are white space.
SIGNS = {"type": "Replace", "pattern": {"Regex": r"\s*(?:->|=|:|\bis\b)\s*"}, "content": " "}
# All contents in a row; the last one, without its question mark, ends in the key.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if loop.last %}{{ message['content'].rstrip('?!. \\n') }}{% else %}{{ message['content'] }} . {% endif %}"
    "{% endfor %}"
)


def key_id(index: int) -> int:
    """The token id of key word number `index`, of 1,024."""
    return len(SPECIALS) + index


def value_id(index: int) -> int:
    """The token id of value word number `index`, of 1,001: the numbers, then "unknown"."""
    return key_id(len(KEYS)) + index


def filler_id(index: int) -> int:
    """The token id of word number `index` of those that mean nothing."""
    return value_id(len(VALUES)) + index


@dataclass(frozen=True, slots=True)
class Context:
    """A text to ask about: put a key's id behind it, and the next token is the value's id.

    Attributes:
        token_ids: the beginning token, then facts among noise.
        facts: key id -> value id, in the order in which they stand.
        positions: key id -> where its fact begins.
    """

    token_ids: list[int]
    facts: dict[int, int]
    positions: dict[int, int]


def make_context(length: int, keys: Sequence[int], seed: int = 0) -> Context:
    """`length` tokens with one fact for each of `keys` (numbers below 1,024), evenly spread from end to end.

    Between them stands noise that may mislead: words, values without a key, keys without a value.

    Args:
        keys: 2 or more, different; their facts stand in this order.
    """
    if len(set(keys)) != len(keys) or len(keys) < 2:
        raise ValueError(f"keys: got {len(keys)}, {len(set(keys))} of them different, must be 2 or more different ones")
    if length < 2 * len(keys) + 1:
        raise ValueError(f"length: got {length}, must be {2 * len(keys) + 1} or more for {len(keys)} facts")
    rng = random.Random(seed)
    starts = [1 + (length - 3) * index // (len(keys) - 1) for index in range(len(keys))]
    facts = {key_id(key): value_id(rng.randrange(len(VALUES) - 1)) for key in keys}
    token_ids = [BOS]
    for start, fact in zip(starts, facts.items(), strict=True):
        token_ids += _noise(start - len(token_ids), rng)
        token_ids += fact
    return Context(token_ids, facts, dict(zip(facts, starts, strict=True)))


def _noise(count: int, rng: random.Random) -> list[int]:
    found: list[int] = []
    behind_key = False  # a value there would make a fact
    for _ in range(count):
        kind = rng.random()
        if kind < 0.05:
            token = key_id(rng.randrange(len(KEYS)))
        elif kind < 0.15 and not behind_key:
            token = value_id(rng.randrange(len(VALUES)))
        else:
            token = filler_id(rng.randrange(len(FILLERS)))
        behind_key = kind < 0.05
        found.append(token)
    return found
