"""Tokenizer, detokenizer, stop strings and chat template, against the libraries that others use for them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from cluster.chat_template import MAX_TEMPLATE_CHARS, ChatTemplate, check_messages
from cluster.detokenizer import Detokenizer, StopStrings
from cluster.tokenizer import Tokenizer, byte_alphabet
from pagetable.errors import InvalidRequest, ModelError, NotSupported

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and then the dog sleeps",
    "naïve café, 你好世界 🤗🤗 مرحبا",
    "  def f(x):\n\t    return x * 2\n",
]


def byte_level_library() -> tokenizers.Tokenizer:
    """Like Llama 3 and Qwen: every byte is a token, a few merges, special tokens at the end."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(CORPUS * 3, trainer)
    library.add_special_tokens(["<|begin|>", "<|end|>"])
    library.add_tokens([AddedToken("<think é>", normalized=False)])
    return library


def sentencepiece_library(metaspace: bool = False) -> tokenizers.Tokenizer:
    """Like Llama 2: spaces are U+2581, unknown characters fall back to <0xNN> tokens, the first space is stripped."""
    words = ["▁", "▁the", "▁dog", "a", "b", "é", "你", "s", "▁▁", ".", "th", "e", "\ufffd"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "t", "h", "▁t"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("t", "h"), ("▁", "t")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fallback = [decoders.ByteFallback(), decoders.Fuse()]
    if metaspace:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        library.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), *fallback])
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback, decoders.Strip(" ", 1, 0)])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def word_library() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "dog": 1, "##s": 2, "the": 3, "\ufffd": 4, ".": 5}))
    library.decoder = decoders.WordPiece()
    return library


BYTE_LEVEL = Tokenizer(byte_level_library(), {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}})
SENTENCEPIECE = Tokenizer(sentencepiece_library(), {"bos_token": "<s>", "eos_token": "</s>"})
METASPACE = Tokenizer(sentencepiece_library(metaspace=True), {})
WORDS = Tokenizer(word_library(), {})
ALL = {"byte_level": BYTE_LEVEL, "sentencepiece": SENTENCEPIECE, "metaspace": METASPACE, "wordpiece": WORDS}


def stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool = True) -> list[str]:
    """The pushes' texts, where `cuts` are the sizes of the pushes (then the rest at once), and the last flush."""
    detokenizer, texts, at = Detokenizer(tokenizer, skip), [], 0
    for size in [*cuts, len(ids)]:
        texts.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*texts, detokenizer.finish()]


def test_byte_alphabet_is_the_librarys() -> None:
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pushes_join_to_the_decoded_whole(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    # two ids past the vocabulary: a model's can be larger than its tokenizer's
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 1), max_size=40))
    cuts = data.draw(st.lists(st.integers(0, 3), max_size=50))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, cuts, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pushes_join_where_bytes_and_spaces_are_dense(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    space, the, special = 3 + 256, 3 + 257, 2
    euro = [3 + byte for byte in "€".encode()]
    unit = st.sampled_from([[space], [space, space], [the], [special], euro, euro[:2], [3 + 0xFF], [3 + 0x20], [0]])
    ids = [i for each in data.draw(st.lists(unit, max_size=15)) for i in each]
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, [1] * len(ids), skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_text_survives_both_kinds_token_by_token(text: str) -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids, [1] * len(ids))) == tokenizer.decode(ids)
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text)) == text


def test_a_code_point_is_never_split() -> None:
    ids = [_byte_id(byte) for byte in "a🤗b".encode()]
    assert stream(BYTE_LEVEL, ids, [1] * 6) == ["a", "", "", "", "🤗", "b", "", ""]


def test_bytes_left_open_become_one_replacement_at_the_end() -> None:
    assert stream(BYTE_LEVEL, [_byte_id(x) for x in b"a\xf0\x9f"], [1] * 3) == ["a", "", "", "", "\ufffd"]
    # a broken beginning is settled by the byte that can't follow it
    assert stream(BYTE_LEVEL, [_byte_id(x) for x in b"\xf0\x9fa"], [1] * 3) == ["", "", "\ufffda", "", ""]


def test_byte_fallback_waits_for_the_end_of_the_run() -> None:
    euro = [3 + byte for byte in "€".encode()]
    a = 3 + 256 + 3
    assert stream(SENTENCEPIECE, [a, *euro, a], [1] * 5) == ["a", "", "", "", "€a", "", ""]
    assert stream(SENTENCEPIECE, [a, *euro], [4]) == ["a", "", "€"]
    # one bad byte spoils the whole run, as in the library
    assert stream(SENTENCEPIECE, [*euro, 3 + 0xFF, a], [1] * 5) == ["", "", "", "", "\ufffd" * 4 + "a", "", ""]


@pytest.mark.parametrize("name", ALL)
def test_work_per_token_does_not_grow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, seen = ALL[name], []
    original = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        seen.append(len(ids))
        return original(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    space = 3 + 256
    patterns = {"wordpiece": [1, 2, 4, 4, 4], "byte_level": [5, 200]}
    pattern = patterns.get(name, [space, space, space, space + 1, 3 + 0xFF, 3 + 0x41])
    detokenizer = Detokenizer(tokenizer)
    for at in range(3000):
        detokenizer.push([pattern[at % len(pattern)]])
    assert max(seen, default=0) <= 16
    for _ in range(3000):
        detokenizer.push([space if name in ("sentencepiece", "metaspace") else 1])
    assert max(seen, default=0) <= 16


def _byte_id(byte: int) -> int:
    char = next(char for char, value in byte_alphabet().items() if value == byte)
    found = BYTE_LEVEL._library.token_to_id(char)
    assert found is not None
    return int(found)


# stop strings


def feed(stop: tuple[str, ...], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    found, out = StopStrings(stop, include), ""
    for piece in pieces:
        out += found.push(piece)[0]
    return out + found.finish(), found.matched


@settings(max_examples=500)
@given(
    text=st.text("ab", max_size=14),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple),
    cuts=st.lists(st.integers(1, 4), max_size=14),
    include=st.booleans(),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_chopped(
    text: str, stop: tuple[str, ...], cuts: list[int], include: bool
) -> None:
    pieces, rest = [], text
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    # the definition, letter by letter: the first end at which some stop string stands; the longest of those there
    expected: tuple[str, str | None] = (text, None)
    for end in range(1, len(text) + 1):
        here = sorted((each for each in stop if text[:end].endswith(each)), key=len)
        if here:
            expected = (text[:end] if include else text[: end - len(here[-1])], here[-1])
            break
    assert feed(stop, [*pieces, rest], include) == expected
    assert feed(stop, [text], include) == expected


def test_stop_strings_hold_back_only_what_may_become_one() -> None:
    found = StopStrings(("END", "\n\n"))
    assert found.push("the E") == ("the ", None)
    assert found.push("N") == ("", None)
    assert found.push("d\n") == ("ENd", None)
    assert found.push("x\n") == ("\nx", None)
    assert found.push("\nEND") == ("", "\n\n")
    assert found.push("more") == ("", "\n\n")
    assert found.finish() == ""


def test_no_stop_strings_hold_nothing() -> None:
    found = StopStrings(())
    assert (found.push("abc"), found.finish(), found.matched) == (("abc", None), "", None)


# tokenizer folders


def write_folder(folder: Path, library: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


def test_special_tokens_from_strings_and_added_token_mappings(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<|begin|>", "lstrip": False},
        "eos_token": "<|end|>",
        "pad_token": None,
        "add_prefix_space": False,
        "chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}],
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "m", byte_level_library(), config))
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_id) == (320, 321)
    assert tokenizer.special_ids == {320, 321}
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert tokenizer.chat_template == "D"
    (tmp_path / "m" / "chat_template.jinja").write_text("J", encoding="utf-8")
    again = Tokenizer.from_folder(tmp_path / "m")
    assert again is not None and again.chat_template == "J"


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_encodes_and_decodes_as_transformers_does(tmp_path: Path, flags: dict[str, bool], kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    library = byte_level_library() if kind == "byte_level" else sentencepiece_library()
    bos, eos = ("<|begin|>", "<|end|>") if kind == "byte_level" else ("<s>", "</s>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, **flags}
    folder = write_folder(tmp_path / "m", library, config)
    ours, theirs = Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours is not None
    for text in (*CORPUS, "", " ", "x" + eos + " y", "\x00\uffff\u202e"):
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"]
            for skip in (True, False):
                theirs_text = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == theirs_text


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    library = byte_level_library()
    library.enable_truncation(3)
    library.enable_padding(length=8)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path / "m", library))
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("a longer text")) == "a longer text"


def test_no_token_stands_for_more_bytes_than_the_bound() -> None:
    assert WORDS.max_token_bytes is None  # [UNK] may be any word
    assert SENTENCEPIECE.max_token_bytes == len("</s>") + 2  # <0xNN> has six
    assert BYTE_LEVEL.max_token_bytes is not None
    for text in (*CORPUS, "🤗" * 50, "dog" * 30):
        for tokenizer in (BYTE_LEVEL, SENTENCEPIECE, METASPACE):
            assert tokenizer.max_token_bytes is not None
            assert len(tokenizer.encode(text)) * tokenizer.max_token_bytes >= len(text.encode())


def test_a_tokenizer_that_drops_text_has_no_bound() -> None:
    stripping = byte_level_library()
    stripping.add_special_tokens([AddedToken("<wide>", lstrip=True)])
    missing = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    missing.pre_tokenizer = pre_tokenizers.ByteLevel()
    splitting = byte_level_library()
    splitting.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), splitting.pre_tokenizer])
    shrinking = byte_level_library()
    shrinking.normalizer = normalizers.Replace("aaaa", "a")
    lowering = byte_level_library()
    lowering.normalizer = normalizers.Lowercase()
    for library in (stripping, missing, splitting, shrinking, lowering):
        assert Tokenizer(library, {}).max_token_bytes is None
    composing = byte_level_library()
    composing.normalizer = normalizers.NFC()
    assert Tokenizer(composing, {}).max_token_bytes == 4 * (BYTE_LEVEL.max_token_bytes or 0)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", b"", "tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json"),
        ("tokenizer.json", b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}', "tokenizer.json"),
        ("tokenizer_config.json", b"[1]", "must be a JSON object"),
        ("tokenizer_config.json", b'{"bos_token"', "JSONDecodeError"),
        ("tokenizer_config.json", b"[" * 100_000, "RecursionError"),
        ("tokenizer_config.json", b"\xff", "UnicodeDecodeError"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "bos_token"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', "auto_map"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja"),
    ],
)
def test_bad_folders_are_refused_by_file(tmp_path: Path, file: str, content: bytes, words: str) -> None:
    folder = write_folder(tmp_path / "m", byte_level_library(), {})
    (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=words) as caught:
        Tokenizer.from_folder(folder)
    assert str(tmp_path) not in str(caught.value)


# chat templates

NOW = datetime(2026, 3, 4, 5, 6, 7)
LLAMA_LIKE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = 'none' %}
{%- endif %}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' + system | trim }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message.content == 'skip' %}{% continue %}{% endif %}
    {{- '<' + message.role + '>' + message.content | tojson + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {% generation %}
<assistant>
    {% endgeneration %}
{% endif %}
"""
CHAT = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": 'a <b> "q" é'},
    {"role": "assistant", "content": "skip"},
]


def test_renders_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as theirs

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return NOW

    monkeypatch.setattr(theirs, "datetime", Fixed)
    ours = ChatTemplate(LLAMA_LIKE, {"bos_token": "<s>"}, lambda: NOW)
    for messages in (CHAT, CHAT[1:], CHAT[1:2]):
        for prompt in (True, False):
            rendered, _ = theirs.render_jinja_template(
                [messages], chat_template=LLAMA_LIKE, add_generation_prompt=prompt, bos_token="<s>"
            )
            assert ours.render(messages, add_generation_prompt=prompt) == rendered[0]
    assert ours.render(CHAT[1:2]).startswith("<s>Today: 04 Mar 2026\nnone")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ messages[5].content }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 'a' * 10000000 }}", "SecurityError"),
        ("{{ 10 ** 10000000 }}", "SecurityError"),
        ("{% for i in range(100001) %}x{% endfor %}", "OverflowError"),
        ("{% for i in range(1000) %}{{ 'a' * 1000 }}{% endfor %}", "at most 100000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "TypeError"),
    ],
)
def test_a_failing_template_is_the_requests_error(source: str, words: str) -> None:
    template = ChatTemplate(source, {}, lambda: NOW, max_chars=100_000)
    with pytest.raises(InvalidRequest, match=words) as caught:
        template.render(CHAT)
    assert caught.value.field == "messages"
    assert " 0x" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ a", "{% unknown %}", "x" * (MAX_TEMPLATE_CHARS + 1), "{{ " + "(" * 5000]
)
def test_a_template_that_is_none_is_refused_at_load(source: str) -> None:
    with pytest.raises(ModelError, match="chat_template"):
        ChatTemplate(source, {}, lambda: NOW)


def test_messages_are_plain_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    raw = [{"role": "user", "content": parts, "name": "Mira"}, {"role": "assistant", "content": "", "tool_calls": None}]
    assert check_messages(raw) == [
        {"role": "user", "content": "a\nb", "name": "Mira"},
        {"role": "assistant", "content": ""},
    ]


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([], InvalidRequest, "messages: "),
        ("hi", InvalidRequest, "messages: "),
        ([{"role": "user", "content": "x"}] * 4097, InvalidRequest, "4097 messages"),
        (["hi"], InvalidRequest, r"messages\[0\]: "),
        ([{"content": "x"}], InvalidRequest, r"messages\[0\].role"),
        ([{"role": "", "content": "x"}], InvalidRequest, r"messages\[0\].role"),
        ([{"role": "user"}], InvalidRequest, r"messages\[0\].content"),
        ([{"role": "user", "content": None}], InvalidRequest, r"messages\[0\].content"),
        ([{"role": "user", "content": 3}], InvalidRequest, r"messages\[0\].content"),
        ([{"role": "user", "content": [3]}], InvalidRequest, r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], InvalidRequest, r"messages\[0\].content\[0\]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], NotSupported, "image_url"),
        ([{"role": "user", "content": "x", "tool_calls": []}], NotSupported, "tool_calls"),
        ([{"role": "user", "content": "x", "contnet": "y"}], InvalidRequest, "contnet"),
    ],
)
def test_bad_messages_are_refused_by_place(messages: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check_messages(messages)
