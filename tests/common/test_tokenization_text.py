"""Token ids to text and text to token ids, against the tokenizers library itself."""

import itertools
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from common.config import TINY_MODEL
from common.errors import FailedPrecondition
from common.tokenization import Tokenizer

LIBRARY = tokenizers.Tokenizer.from_file(f"{TINY_MODEL}/tokenizer.json")
TOKENIZER = Tokenizer.load(TINY_MODEL)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def _streamed(pieces: list[list[int]]) -> list[str]:
    detokenizer = TOKENIZER.detokenizer()
    return [*(detokenizer.feed(piece) for piece in pieces), detokenizer.flush()]


def _cut(ids: list[int], places: list[int]) -> list[list[int]]:
    edges = [0, *sorted(place % (len(ids) + 1) for place in places), len(ids)]
    return [ids[start:end] for start, end in itertools.pairwise(edges)]


@settings(deadline=None)
@given(TEXT, st.lists(st.integers(0, 1000), max_size=8))
def test_any_text_streams_back_exactly_however_it_is_cut(text, places):
    pieces = _streamed(_cut(TOKENIZER.encode(text), places))
    assert "".join(pieces) == text
    assert "�" in text or not any("�" in piece for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, LIBRARY.get_vocab_size() + 50), max_size=40), st.lists(st.integers(0, 1000), max_size=8))
def test_any_tokens_stream_to_what_the_library_decodes_at_once(ids, places):
    known = [token_id for token_id in ids if token_id < LIBRARY.get_vocab_size()]
    assert "".join(_streamed(_cut(ids, places))) == LIBRARY.decode(known, skip_special_tokens=True)


def test_a_character_comes_out_with_the_token_that_completes_it():
    ids = TOKENIZER.encode("é🎉")
    assert len(ids) == 6, "the tiny vocabulary spells both byte by byte"
    assert _streamed([[token_id] for token_id in ids]) == ["", "é", "", "", "", "🎉", ""]


def test_a_character_left_incomplete_is_a_replacement_character_at_the_end_alone():
    assert _streamed([TOKENIZER.encode("a🎉")[:-1]]) == ["a", "�"]


def test_added_tokens_have_text_unless_they_are_special():
    library = tokenizers.Tokenizer.from_str(LIBRARY.to_str())
    library.add_tokens([AddedToken("<a b é>", normalized=False)])
    library.add_special_tokens([AddedToken("<hidden>")])
    ids = library.encode("x<a b é><hidden>y").ids
    assert Tokenizer(library).detokenizer().feed(ids) == "x<a b é>y" == library.decode(ids)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert Tokenizer.load(tmp_path) is None


def test_a_broken_tokenizer_file_is_refused_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"tokenizer\.json cannot be used"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_does_not_decode_bytes_is_refused():
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    with pytest.raises(FailedPrecondition, match="Metaspace"):
        Tokenizer(library)


def test_limits_that_the_folder_carries_do_not_cut_prompts(tmp_path):
    data = json.loads(LIBRARY.to_str())
    data["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert len(Tokenizer.load(tmp_path).encode("one two three four")) > 2
