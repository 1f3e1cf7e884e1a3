import pytest
import torch

from tests.support.models import make_request

pytest.importorskip("triton")

from decode_service.rows import DecodeRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCRATCH_SLOT = 99 * 4


def make_rows() -> DecodeRows:
    return DecodeRows(6, table_width=8, block_size=4, scratch_block=99, device=DEVICE)


def make_sequence(num_tokens, first_block, *, stop_ids=(), **fields):
    sequence = make_request(range(10, 10 + num_tokens), **fields)
    sequence.stop_token_ids = frozenset(stop_ids)
    sequence.block_table = list(range(first_block, first_block + -(-num_tokens // 4)))
    sequence.num_computed = num_tokens - 1
    return sequence


def state(rows, row):
    columns = (rows.token_ids_S, rows.positions_S, rows.kv_len_S, rows.slot_mapping_S)
    return tuple(int(column[row]) for column in columns)


def drawn(*tokens):
    return torch.tensor(tokens, device=DEVICE, dtype=torch.int32)


def test_a_sequence_is_put_with_its_newest_token_where_its_kv_goes():
    rows, sequence = make_rows(), make_sequence(6, first_block=20, temperature=0.5, top_p=0.9, top_k=7, seed=3 << 40)
    rows.put(2, sequence, position=5, stops_here=True)
    rows.flush()
    assert state(rows, 2) == (15, 5, 6, 21 * 4 + 1)
    assert rows.block_table_SP[2, :2].tolist() == [20, 21]
    sampling = rows.sampling(slice(3))
    assert sampling.temperature_S[2] == 0.5
    assert sampling.top_p_S[2] == 0.9
    assert sampling.top_k_S[2] == 7
    low, high = sampling.seed_words_S2[2].tolist()
    assert (high & 0xFFFFFFFF) << 32 | low & 0xFFFFFFFF == 3 << 40


def test_rows_out_of_use_have_no_length_and_write_to_the_scratch_block():
    rows = make_rows()
    assert state(rows, 0) == (0, 0, 0, SCRATCH_SLOT)
    rows.put(0, make_sequence(6, first_block=20), position=5, stops_here=True)
    rows.flush()
    rows.clear(0)
    rows.flush()
    assert state(rows, 0)[1:] == (0, 0, SCRATCH_SLOT)


def test_a_step_moves_a_row_to_its_drawn_tokens_position():
    rows = make_rows()
    rows.put(0, make_sequence(6, first_block=20), position=5, stops_here=True)
    rows.flush()
    rows.advance(drawn(42, 7))
    assert state(rows, 0) == (42, 6, 7, 21 * 4 + 2)
    assert state(rows, 1)[1:] == (0, 0, SCRATCH_SLOT)


def test_a_stop_token_takes_its_row_out_of_use():
    rows = make_rows()
    rows.put(0, make_sequence(6, first_block=20, stop_ids=[3, 42]), position=5, stops_here=True)
    rows.put(1, make_sequence(6, first_block=30, stop_ids=[3, 42]), position=5, stops_here=False)
    rows.flush()
    rows.advance(drawn(42, 42))
    assert state(rows, 0)[1:] == (0, 0, SCRATCH_SLOT)
    assert state(rows, 1) == (42, 6, 7, 31 * 4 + 2)
    rows.advance(drawn(1, 1))
    assert state(rows, 0)[1:] == (0, 0, SCRATCH_SLOT)


def test_a_stop_token_counts_once_enough_tokens_are_out():
    rows = make_rows()
    sequence = make_sequence(6, first_block=20, stop_ids=[42], min_tokens=3)
    rows.put(0, sequence, position=5, stops_here=True)
    rows.flush()
    for _ in range(2):
        rows.advance(drawn(42))
        assert state(rows, 0)[2] > 0
    rows.advance(drawn(42))
    assert state(rows, 0)[2] == 0


def test_a_new_block_reaches_the_table_and_the_slot_of_the_step_that_needs_it():
    rows, sequence = make_rows(), make_sequence(8, first_block=20)
    rows.put(0, sequence, position=7, stops_here=True)
    rows.flush()
    rows.advance(drawn(42))
    sequence.block_table.append(50)
    rows.grow(0, sequence.block_table, 2, 8)
    rows.flush()
    assert state(rows, 0) == (42, 8, 9, 50 * 4)
    rows.advance(drawn(43))
    assert state(rows, 0) == (43, 9, 10, 50 * 4 + 1)


def test_a_spare_block_beyond_the_context_stays_out_of_the_next_rows_table():
    rows, longest = make_rows(), make_sequence(31, first_block=20)
    longest.block_table.append(70)
    rows.put(3, make_sequence(6, first_block=50), position=5, stops_here=True)
    rows.put(2, longest, position=30, stops_here=True)
    rows.flush()
    assert rows.block_table_SP[2].tolist() == longest.block_table[:8]
    assert rows.block_table_SP[3, :2].tolist() == [50, 51]


def test_a_moved_row_keeps_the_token_that_only_the_device_knows():
    rows, sequences = make_rows(), [make_sequence(6, first_block=20 + 10 * row) for row in range(4)]
    for row, sequence in enumerate(sequences):
        rows.put(row, sequence, position=5, stops_here=True)
    rows.flush()
    rows.advance(drawn(40, 41, 42, 43))
    # Rows 2 and 0 leave: the last row closes the first hole, and from there the second.
    rows.move(rows.token_of(3), 2, sequences[3], position=6, stops_here=True)
    rows.clear(3)
    rows.move(rows.token_of(2), 0, sequences[3], position=6, stops_here=True)
    rows.clear(2)
    rows.flush()
    assert state(rows, 0) == (43, 6, 7, 51 * 4 + 2)
    assert rows.block_table_SP[0, :2].tolist() == [50, 51]
    assert state(rows, 1)[0] == 41
    assert state(rows, 2)[2] == 0


def test_two_rows_exchange_their_places_with_tokens_that_only_the_device_knows():
    rows, sequences = make_rows(), [make_sequence(6, first_block=20 + 10 * row) for row in range(2)]
    for row, sequence in enumerate(sequences):
        rows.put(row, sequence, position=5, stops_here=True)
    rows.flush()
    rows.advance(drawn(40, 41))
    tokens = [rows.token_of(row) for row in (0, 1)]
    rows.move(tokens[0], 1, sequences[0], position=6, stops_here=True)
    rows.move(tokens[1], 0, sequences[1], position=6, stops_here=True)
    rows.flush()
    assert [state(rows, row)[0] for row in (0, 1)] == [41, 40]
    assert rows.block_table_SP[:2, 0].tolist() == [30, 20]


def test_of_several_edits_of_a_row_the_last_counts():
    rows = make_rows()
    rows.put(0, make_sequence(6, first_block=20), position=5, stops_here=True)
    rows.clear(0)
    rows.put(0, make_sequence(3, first_block=30), position=2, stops_here=True)
    rows.flush()
    assert state(rows, 0) == (12, 2, 3, 30 * 4 + 2)
