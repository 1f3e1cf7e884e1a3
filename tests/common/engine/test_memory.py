from __future__ import annotations

import pytest

from common.engine.memory import GIB, MemoryPlan
from common.engine.sampling_state import SamplingState, table_bytes
from common.settings import ConfigError


def plan(**changes) -> MemoryPlan:
    """Of a share of 40 GiB, 20 are left to blocks of 1 GiB."""
    sizes = {
        "device": "cuda:0",
        "total": 80 * GIB,
        "free": 60 * GIB,
        "fraction": 0.5,
        "runtime": 1 * GIB,
        "weights": 15 * GIB,
        "activations": 2 * GIB,
        "graphs": 1 * GIB,
        "sampling": 0,
        "staging": 1 * GIB,
        "block_bytes": GIB,
        "wanted_blocks": 0,
    }
    return MemoryPlan(**{**sizes, **changes})


def test_what_is_left_of_the_share_holds_blocks_and_the_scratch_block():
    assert plan().num_blocks == 19


def test_as_many_blocks_as_asked_for_are_made():
    assert plan(wanted_blocks=7).num_blocks == 7


@pytest.mark.parametrize("changes", [{"wanted_blocks": 20}, {"weights": 33 * GIB}])
def test_a_share_that_is_too_small_names_what_would_help(changes):
    with pytest.raises(ConfigError, match=r"Raise gpu_memory_fraction=0\.5, or lower max_batch_tokens"):
        _ = plan(**changes).num_blocks


def test_memory_that_others_use_is_told_before_it_is_asked_for():
    with pytest.raises(ConfigError, match=r"24\.00 GiB are still to be taken, and 20\.00 GiB are free: others use"):
        _ = plan(free=20 * GIB).num_blocks


def test_sampling_tables_come_out_of_the_share_as_large_as_they_get():
    state = SamplingState(3, 100, "cpu")
    tables = (state.in_prompt_NV, state.output_counts_NV, state.bias_NV, state.stops_NV)
    assert table_bytes(3, 100) == sum(table.nbytes for table in tables)
    assert plan(sampling=2 * GIB).num_blocks == 17
