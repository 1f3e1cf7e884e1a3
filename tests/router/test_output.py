"""Pieces of output, against the naive rule: draw every token, decode them at once, then cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import TINY_MODEL
from common.params import StoppingParams
from common.tokenization import Tokenizer
from router.output import Ending, FinishReason, Output, Piece

TOKENIZER = Tokenizer.load(TINY_MODEL)
LENGTH = Ending(FinishReason.LENGTH)
EOS = 2
# Bytes of two, three and four byte characters, some letters, and a special token.
ALPHABET = [*TOKENIZER.encode("aab é中🎉"), *TOKENIZER.encode("ab"), 1]


def _ids(text: str) -> list[int]:
    """One token for each byte, whatever the merges are."""
    return [token_id for character in text for token_id in TOKENIZER.encode(character)]


def _output(*, tokenizer=TOKENIZER, stop_ids=(EOS,), **stopping) -> Output:
    return Output(StoppingParams(**stopping), frozenset(stop_ids), tokenizer)


def _run(output: Output, chunks: list[list[int]], ending: Ending = LENGTH) -> tuple[Ending, list[Piece]]:
    pieces = []
    for chunk in chunks:
        output.push(chunk, [f"logprob {token_id}" for token_id in chunk])
        pieces.append(output.take())
    ending = output.finish(ending)
    return ending, [piece for piece in [*pieces, output.take()] if piece]


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _token_ids(pieces: list[Piece]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece.token_ids]


def _decode(ids: list[int]) -> str:
    detokenizer = TOKENIZER.detokenizer()
    return detokenizer.feed(ids) + detokenizer.flush()


def _complete(ids: list[int]) -> str:
    """The text of the characters that are complete, in order."""
    return TOKENIZER.detokenizer().feed(ids)


def _first_match(ids: list[int], stops: list[str], min_tokens: int) -> tuple[int, str, int] | None:
    """Tokens drawn, the stop string, and where it begins in the text; the naive way."""
    for count in range(1, len(ids) + 1):
        before, text = _complete(ids[: count - 1]), _complete(ids[:count])
        if count == len(ids):
            text = _decode(ids)
        for end in range(len(before) + 1, len(text) + 1):
            matched = [stop for stop in stops if text[:end].endswith(stop)]
            if matched and count >= min_tokens:
                longest = max(matched, key=len)
                return count, longest, end - len(longest)
    return None


CHUNKS = st.lists(st.lists(st.sampled_from(ALPHABET), max_size=4), max_size=10)
STOPS = st.lists(st.text("ab é中🎉�", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(deadline=None, max_examples=300)
@given(CHUNKS, STOPS, st.integers(0, 6), st.booleans())
def test_output_is_what_drawing_everything_and_cutting_would_give(chunks, stops, min_tokens, include):
    ids = [token_id for chunk in chunks for token_id in chunk]
    output = _output(stop=tuple(stops), min_tokens=min_tokens, include_stop_in_output=include)
    ending, pieces = _run(output, chunks)
    match = _first_match(ids, stops, min_tokens)
    if match is None:
        assert (ending, _text(pieces), _token_ids(pieces)) == (LENGTH, _decode(ids), ids)
        return
    num_drawn, stop, start = match
    assert ending == Ending(FinishReason.STOP, stop_string=stop)
    assert output.token_ids == ids[:num_drawn]
    if include:
        assert _text(pieces) == _decode(ids)[: start + len(stop)]
        assert _token_ids(pieces) == ids[:num_drawn]
    else:
        assert _text(pieces) == _decode(ids)[:start]
        kept = _token_ids(pieces)
        assert kept == ids[: len(kept)]
        assert len(_decode(kept)) <= start, "no emitted token reaches into the match"
        assert len(kept) == num_drawn or len(_decode(ids[: len(kept) + 1])) > start, "every token before it is emitted"


@settings(deadline=None)
@given(CHUNKS)
def test_without_stop_strings_tokens_go_out_at_once(chunks):
    output = _output()
    for chunk in chunks:
        output.push(chunk)
        piece = output.take()
        assert (piece.token_ids if piece else []) == chunk


@settings(deadline=None)
@given(CHUNKS, STOPS)
def test_logprobs_stay_beside_their_tokens(chunks, stops):
    _, pieces = _run(_output(stop=tuple(stops)), chunks)
    for piece in pieces:
        assert piece.logprobs == [f"logprob {token_id}" for token_id in piece.token_ids]


def test_a_stop_token_is_counted_but_not_put_out():
    output = _output()
    ending, pieces = _run(output, [_ids("ab"), [*_ids("c"), EOS]], Ending(FinishReason.STOP, stop_token_id=EOS))
    assert ending.stop_token_id == EOS
    assert _token_ids(pieces) == _ids("abc")
    assert _text(pieces) == "abc"
    assert len(output.token_ids) == 4


def test_a_stop_token_is_put_out_when_stops_are_included():
    period = _ids(".")[0]
    output = _output(stop_ids=[period], include_stop_in_output=True)
    _, pieces = _run(output, [_ids("ab.")], Ending(FinishReason.STOP, stop_token_id=period))
    assert _token_ids(pieces) == _ids("ab.")
    assert _text(pieces) == "ab."


def test_a_stop_token_that_decode_passes_over_is_output_like_any_other():
    _, pieces = _run(_output(min_tokens=3), [[*_ids("a"), EOS], _ids("b")])
    assert _token_ids(pieces) == [*_ids("a"), EOS, *_ids("b")]


def test_a_held_back_stop_string_comes_out_before_the_stop_token():
    output = _output(stop=("bcd",), include_stop_in_output=True)
    _, pieces = _run(output, [[*_ids("abc"), EOS]], Ending(FinishReason.STOP, stop_token_id=EOS))
    assert _token_ids(pieces) == [*_ids("abc"), EOS]
    assert _text(pieces) == "abc"


def test_prompt_logprobs_go_out_even_when_no_token_does():
    output = _output(stop=("abc",))
    output.push(_ids("a"), prompt_logprobs=["p1", "p2"])
    assert output.take() == Piece([], "", [], ["p1", "p2"])


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    _, pieces = _run(_output(tokenizer=None), [[5, 6], [7]])
    assert (_token_ids(pieces), _text(pieces)) == ([5, 6, 7], "")


@pytest.mark.parametrize(
    ("stopping", "pushed", "expected"),
    [
        ({}, "ab", None),
        ({"max_tokens": 2}, "ab", LENGTH),
        ({"stop": ("b",)}, "ab", Ending(FinishReason.STOP, stop_string="b")),
    ],
)
def test_tokens_alone_say_how_a_completion_ends(stopping, pushed, expected):
    output = _output(**stopping)
    output.push(_ids(pushed))
    assert output.ending == expected


def test_an_unconfirmed_stop_token_ends_a_completion_that_is_long_enough():
    output = _output(min_tokens=2)
    output.push([EOS])
    assert output.ending is None
    output.push([EOS])
    assert output.ending == Ending(FinishReason.STOP, stop_token_id=EOS)
