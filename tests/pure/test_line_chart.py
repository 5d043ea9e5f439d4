"""The benchmarks' chart: where points lie, what the axes say, what is refused."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.line_chart import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_points_lie_at_equal_distances_for_equal_factors() -> None:
    chart = ElementTree.fromstring(line_chart("t", "x", "y", {"a": [(1024, 1), (4096, 10)], "b": [(2048, 100)]}))
    first, second = chart.findall(f"{SVG}polyline")
    assert first.get("points") == "64.0,352.0 704.0,196.0"
    assert second.get("points") == "384.0,40.0"


def test_axes_have_marks_at_powers_and_texts_are_escaped() -> None:
    text = line_chart("a < b", "tokens", "ms", {"one & two": [(1000, 0.3), (1 << 20, 7)]})
    found = [each.text for each in ElementTree.fromstring(text).findall(f"{SVG}text")]
    assert found[:3] == ["a < b", "tokens", "ms"] and found[-1] == "one & two"
    assert found[3:14] == [f"{1 << power}K" for power in range(10)] + ["1M"]
    assert found[14:-1] == ["0.5", "1", "2", "5"]


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([(0, 1), (1, 2)], "all above zero"),
        ([], "must have points"),
        ([(1, 1), (1, 2)], "all points are at 1, an axis needs two different values"),
    ],
)
def test_what_no_logarithmic_axis_can_show_is_refused(points: list[tuple[float, float]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        line_chart("t", "x", "y", {"a": points})
