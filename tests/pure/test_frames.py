"""Frames of sockets: whole ones, several at once, halves, and bytes that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagetable.frames import BadFrame, FrameReader, Kind, encode_frame

FRAMES = st.tuples(st.sampled_from(Kind), st.binary(max_size=40))


@given(frames=st.lists(FRAMES, max_size=6), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_frames_come_out_whole_wherever_they_are_cut(frames: list[tuple[Kind, bytes]], cuts: list[int]) -> None:
    data = b"".join(encode_frame(*frame) for frame in frames)
    reader, found, begin = FrameReader(), [], 0
    for end in sorted(min(cut, len(data)) for cut in [*cuts, len(data)]):
        piece, begin = data[begin:end], end
        lone = reader.lone(piece)
        found += [lone] if lone is not None else list(reader.feed(piece))
    assert found == frames


@given(data=st.one_of(st.binary(max_size=40), FRAMES.map(lambda frame: encode_frame(*frame))), limit=st.integers(1, 30))
def test_a_lone_frame_is_what_feeding_it_gives(data: bytes, limit: int) -> None:
    lone, reader = FrameReader(limit).lone(data), FrameReader(limit)
    try:
        found = list(reader.feed(data))
    except BadFrame:
        found = []
    is_whole = len(found) == 1 and encode_frame(*found[0]) == data
    assert lone == (found[0] if is_whole else None)


@pytest.mark.parametrize("begun", range(1, 8))
def test_the_rest_of_a_frame_is_no_lone_one(begun: int) -> None:
    """A payload may hold what looks like a frame."""
    inner = encode_frame(Kind.PLAN, b"plan")
    outer = encode_frame(Kind.RESULT, bytes(3) + inner)
    reader = FrameReader()
    assert list(reader.feed(outer[: -len(inner)])) == []
    assert reader.lone(inner) is None
    assert list(reader.feed(inner)) == [(Kind.RESULT, bytes(3) + inner)]
    assert list(reader.feed(outer[:begun])) == []
    assert reader.lone(inner) is None
