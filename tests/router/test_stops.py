"""Stop strings, whole or over several tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorafleet.router.stops import StopStrings

pieces = st.lists(st.text("abc", max_size=3), max_size=12)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def run(stops: list[str], texts: list[str], *, keep: bool) -> tuple[list[str], bool]:
    matcher = StopStrings(stops, keep=keep)
    passed = []
    for text in texts:
        passed.append(matcher.push(text))
        if matcher.found:
            return passed, True
    return [*passed, matcher.flush()], False


def first_end(stops: list[str], text: str) -> tuple[int, int] | None:
    """Reading character by character: the first place where a stop string is complete."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None


@given(stop_lists, pieces)
def test_kept_stops_end_the_text(stops: list[str], texts: list[str]) -> None:
    whole = "".join(texts)
    match = first_end(stops, whole)
    passed, found = run(stops, texts, keep=True)
    assert found == (match is not None)
    assert "".join(passed) == (whole[: match[1]] if match else whole)
    if not found:
        assert passed == [*texts, ""], "nothing is held back"


@given(stop_lists, pieces)
def test_cut_stops_leave_the_text_before(stops: list[str], texts: list[str]) -> None:
    whole = "".join(texts)
    match = first_end(stops, whole)
    passed, found = run(stops, texts, keep=False)
    assert found == (match is not None)
    assert "".join(passed) == (whole[: match[0]] if match else whole)


def test_only_the_beginning_of_a_stop_is_held() -> None:
    matcher = StopStrings(["END", "STOP"], keep=False)
    assert matcher.push("an EN") == "an "
    assert matcher.push("T or S") == "ENT or "
    assert matcher.push("TO") == ""
    assert matcher.push("P it") == ""
    assert matcher.found


def test_without_stops_text_passes() -> None:
    matcher = StopStrings([], keep=False)
    assert matcher.push("END") == "END"
    assert matcher.flush() == ""
    assert not matcher.found
