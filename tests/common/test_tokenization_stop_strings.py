"""Stop strings against the naive rule: read everything, then cut at the first match that is completed."""

from hypothesis import given, settings
from hypothesis import strategies as st

from common.tokenization import StopMatch, StopMatcher, StopStrings

# Few letters, so that texts and stop strings overlap in every way.
TEXTS = st.lists(st.text("abc", max_size=6), max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def _naive(text: str, stops: list[str], first_end: int = 0) -> StopMatch | None:
    for end in range(first_end + 1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            longest = max(matched, key=len)
            return StopMatch(longest, end - len(longest), end)
    return None


def _match(pieces: list[str], stops: list[str], may_match_from: int = 0) -> StopMatch | None:
    matcher = StopMatcher(StopStrings(stops))
    for place, piece in enumerate(pieces):
        match = matcher.feed(piece, may_match=place >= may_match_from)
        if match:
            return match
    return None


@settings(deadline=None)
@given(TEXTS, STOPS)
def test_the_match_is_the_naive_one_however_the_text_is_cut(pieces, stops):
    assert _match(pieces, stops) == _naive("".join(pieces), stops)


@settings(deadline=None)
@given(TEXTS, STOPS, st.integers(0, 12))
def test_matches_that_end_too_early_are_passed_over(pieces, stops, first):
    assert _match(pieces, stops, first) == _naive("".join(pieces), stops, len("".join(pieces[:first])))


@settings(deadline=None)
@given(TEXTS, STOPS)
def test_text_is_settled_exactly_when_no_stop_string_can_reach_it(pieces, stops):
    matcher, text = StopMatcher(StopStrings(stops)), ""
    for piece in pieces:
        if matcher.feed(piece):
            return
        text += piece
        beginnings = [length for stop in stops for length in range(1, len(stop)) if text.endswith(stop[:length])]
        assert matcher.num_settled == len(text) - max(beginnings, default=0)


def test_characters_that_mean_something_to_regular_expressions_are_plain():
    assert _match(["x^", "-]", "\\y"], ["]\\", "^^"]) == StopMatch("]\\", 3, 5)
