"""The grammar of the `story` model's texts: it samples stories, and gives the exact probability of any text.

A rule is a list of templates, taken with their weights. In a template
    word     stands for itself,
    @rule    for a template of that rule,
    $name    for a word of its pool that is drawn once (unlike all others drawn so far) and then kept,
    %pool    for a word drawn anew each time,
    ~form    for what agrees with the child of the story (she, he, ...),
    ^        forgets what belongs to one episode only.
Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from random import Random

MAX_EPISODES = 12
END = "</s>"

POOLS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "child": "girl boy",
        "girl": "Ada Ida Mira Nora Lena Tilda Rosa Vera Hanna Emma",
        "boy": "Tom Ben Otto Emil Paul Jonas Max Felix Hugo Karl",
        "name": "Ada Ida Mira Nora Lena Tilda Rosa Vera Hanna Emma Tom Ben Otto Emil Paul Jonas Max Felix Hugo Karl",
        "animal": "cat dog fox goat mouse horse frog duck hen crow",
        "thing": "kite lamp drum boat ball book bell key hat cup box map",
        "place": "forest river market mill harbour garden hill lake village bridge castle meadow",
        "role": "baker sailor miller farmer painter teacher tailor fisher",
        "food": "bread soup cake honey cheese apples pears nuts",
        "colour": "red blue green yellow white black golden silver",
        "trait": "kind brave clever shy cheerful curious quiet patient",
        "size": "small big tiny young grey fat",
        "feeling": "happy glad proud tired hungry surprised calm merry",
        "fear": "afraid cold wet worried sad",
        "weather": "sunny rainy windy cold warm foggy",
        "time": "morning evening day afternoon night",
        "where": "under behind near beside",
        "spot": "tree stone wall wagon fence well door bush",
        "storm": "rain snow thunder",
        "deed": "played sang danced read slept swam talked ran",
        "manner": "quietly loudly again happily slowly well",
    }.items()
}
# What is drawn once, and from which pool; `hero` is of the child's.
_KEPT = {
    "child": "child",
    "hero": "",
    "animal": "animal",
    "size": "size",
    "thing": "thing",
    "colour": "colour",
    "home": "place",
    "goal": "place",
    "other": "name",
    "food": "food",
    "find": "thing",
    "storm": "storm",
}
_EPISODE = ("goal", "other", "food", "find", "storm")
_FORMS = {
    "she": ("she", "he"),
    "She": ("She", "He"),
    "her": ("her", "his"),
    "Her": ("Her", "His"),
    "him": ("her", "him"),
}

Rule = tuple[tuple[float, tuple[str, ...]], ...]


def _rule(*templates: str, weights: tuple[float, ...] = ()) -> Rule:
    shares = weights or (1.0,) * len(templates)
    return tuple((w / sum(shares), tuple(t.split())) for w, t in zip(shares, templates, strict=True))


RULES: dict[str, Rule] = {
    "text": _rule("@story", "@request @story", weights=(2, 1)),
    "request": _rule(
        "Tell me a story .",
        "Tell me a story about a $child named $hero .",
        "Tell me a story about a $size $animal .",
        "Tell me about a $child and a $animal .",
    ),
    "story": _rule("@opening @treasure @pet @episode @more"),
    "more": _rule("@episode @more", "@ending The end . </s>", weights=(3, 2)),
    "opening": _rule(
        "Once upon a time there was a %trait $child named $hero .",
        "Long ago a %trait $child named $hero lived near the $home .",
        "In a house by the $home lived a %trait $child named $hero .",
        "There once was a %trait $child at the $home . ~Her name was $hero .",
    ),
    "treasure": _rule(
        "~She had a $colour $thing , and nobody else had such a $thing .",
        "Every %time ~she played with a $colour $thing . The $colour $thing was always near .",
        "On ~her birthday ~she got a $colour $thing , and the $thing was the best of all .",
    ),
    "pet": _rule(
        "~Her best friend was a $size $animal .",
        "A $size $animal lived with ~him and followed ~him everywhere .",
        "$hero also had a $size $animal , and they were always together .",
    ),
    "episode": _rule("^ @start @event @close", "^ @start @event", weights=(2, 1)),
    "start": _rule(
        "One %weather %time $hero took the $colour $thing and went to the $goal .",
        "The next %time $hero and the $animal walked to the $goal .",
        "On a %weather %time they set out for the $goal .",
        "Some days later $hero took the $animal and the $thing to the $goal .",
    ),
    "event": _rule("@loss", "@visit", "@weather", "@find", "@play"),
    "loss": _rule(
        "At the $goal ~she lost the $colour $thing . @search In the end the $animal found it %where a %spot .",
        "At the $goal ~she dropped the $colour $thing %where a %spot . @search But the $animal brought it back .",
    ),
    "search": _rule(
        "~She looked %where the %spot and %where the %spot , but it was gone .",
        "$hero was very %fear .",
        "~She was %fear and asked everybody at the $goal .",
    ),
    "visit": _rule(
        "At the $goal ~she met a %trait %role named $other . @gift @thanks",
        "A %trait %role named $other lived at the $goal . @gift @thanks",
    ),
    "gift": _rule(
        "$other gave ~him some $food .",
        "$other had some $food and shared it with them .",
        "$other showed them how to make $food .",
    ),
    "thanks": _rule(
        "$hero thanked $other and gave the $animal some $food too .",
        "The $animal ate all the $food , and $other laughed .",
        "They ate the $food %where a %spot and %deed .",
    ),
    "weather": _rule(
        "Suddenly there was $storm . @shelter When the $storm was over , they went home .",
        "But on the way the $storm began . @shelter After the $storm they %deed %manner .",
    ),
    "shelter": _rule(
        "The $animal was %fear , so they hid %where a %spot .",
        "They were %fear and waited %where a %spot .",
        "$hero put the $animal %where a %spot and sang a song .",
    ),
    "find": _rule(
        "%where a %spot they found a $find . @keep",
        "The $animal found a %colour $find %where a %spot . @keep",
    ),
    "keep": _rule(
        "$hero put it next to the $thing .",
        "~She gave the $find to a %role , who needed a $find .",
        "The $find was %colour and very old , and ~she took it home .",
        "$hero liked it , but the $colour $thing was still the best .",
    ),
    "play": _rule(
        "At the $goal they %deed and %deed %where a %spot .",
        "$hero %deed with the $colour $thing while the $animal %deed %manner .",
        "All %time long they %deed %manner .",
    ),
    "close": _rule(
        "$hero was %feeling .",
        "The $animal was %feeling , and so was $hero .",
        "They were %feeling and %feeling when they came home .",
        "That %time $hero dreamed of the $goal .",
        "~She put the $colour $thing away and was %feeling .",
    ),
    "ending": _rule(
        "From then on $hero and the $animal were never apart .",
        "And ~she never lost the $colour $thing again .",
        "$hero grew up and became a %role .",
        "And if they are not %feeling , they are still %feeling today .",
    ),
}

State = Mapping[str, str]


def words() -> list[str]:
    """Every word and mark of the grammar's texts, sorted."""
    found = {word for pool in POOLS.values() for word in pool} | {word for pair in _FORMS.values() for word in pair}
    found |= {
        symbol for rule in RULES.values() for _, template in rule for symbol in template if symbol[0] not in "@$%~^"
    }
    return sorted(found | {word.capitalize() for word in POOLS["where"]})


def sample(rng: Random) -> tuple[list[str], float]:
    """A text that ends in `END`, and the natural log of the probability of its derivation."""
    found: list[str] = []
    state: dict[str, str] = {}
    total = 0.0
    stack = ["@text"]
    while stack:
        symbol = stack.pop()
        options = list(_expand(symbol, state, at_start=not found or found[-1] == "."))
        picked = rng.choices(options, [option[0] for option in options])[0] if len(options) > 1 else options[0]
        share, symbols, word, changes = picked
        total += math.log(share)
        state = {**state, **changes}
        stack.extend(reversed(symbols))
        if word is not None:
            found.append(word)
    return found, total


def log_probability(text: list[str]) -> float | None:
    """Natural log of the probability that `sample` gives exactly these words, over all derivations; None if never."""
    total = sum(share for share in _derivations(text, 0, ("@text",), {}))
    return math.log(total) if total else None


Option = tuple[float, tuple[str, ...], str | None, Mapping[str, str]]


def _expand(symbol: str, state: State, at_start: bool) -> Iterator[Option]:
    """What a symbol can become: (probability, symbols to expand, or the word that it is, changes to the state)."""
    kind, name = symbol[0], symbol[1:]
    if kind == "@":
        rule = RULES[name]
        if name == "more":
            if int(state.get("@episodes", "1")) >= MAX_EPISODES:
                rule = ((1.0, rule[1][1]),)
        for share, template in rule:
            changes = {"@episodes": str(int(state.get("@episodes", "0")) + 1)} if name == "episode" else {}
            yield share, template, None, changes
    elif kind == "^":
        yield 1.0, (), None, dict.fromkeys(_EPISODE, "")
    elif kind == "~":
        yield 1.0, (), _FORMS[name][state["child"] == "boy"], {}
    elif kind == "%" or (kind == "$" and not state.get(name)):
        pool = POOLS[name] if kind == "%" else POOLS[_KEPT[name] or state["child"]]
        taken = set() if kind == "%" else {state.get(other) for other in _KEPT}
        fresh = [word for word in pool if word not in taken]
        for word in fresh:
            shown = word.capitalize() if at_start and name == "where" else word
            yield 1.0 / len(fresh), (), shown, {} if kind == "%" else {name: word}
    else:
        yield 1.0, (), state[name] if kind == "$" else symbol, {}


def _derivations(text: list[str], at: int, symbols: tuple[str, ...], state: State) -> Iterator[float]:
    """Probabilities of the ways in which `symbols` become text[at:]."""
    share = 1.0
    while symbols:
        symbol, symbols = symbols[0], symbols[1:]
        options = list(_expand(symbol, state, at_start=at == 0 or text[at - 1] == "."))
        fitting = [o for o in options if o[2] is None or (at < len(text) and o[2] == text[at])]
        if symbol[0] == "@" and len(fitting) > 1:
            for part, inner, _, changes in fitting:
                for rest in _derivations(text, at, inner + symbols, {**state, **changes}):
                    yield share * part * rest
            return
        if not fitting:
            return
        part, inner, word, changes = fitting[0]
        share, symbols, state = share * part, inner + symbols, {**state, **changes}
        at += word is not None
    if at == len(text):
        yield share
