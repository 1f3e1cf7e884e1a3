from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.engine.kv_cache import KvCache
from common.model.config import ModelConfig

CONFIG = ModelConfig(
    model_id="test",
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=48,
    vocab_size=100,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    context_length=256,
    dtype="float32",
    eos_token_ids=(2,),
)
BLOCK_SIZE, NUM_BLOCKS = 4, 8


def filled_cache(dtype: torch.dtype = torch.float32) -> KvCache:
    cache = KvCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, dtype, "cpu")
    for kv_P2BKH in cache.layers:
        kv_P2BKH.normal_()
    return cache


def staging(cache: KvCache, num_runs: int) -> Tensor:
    return torch.empty(num_runs * cache.block_bytes + 100, dtype=torch.uint8)


def expected_bytes(cache: KvCache, layers: range, block_ids: list[int]) -> bytes:
    runs = [cache.layers[layer][block].contiguous().view(torch.uint8) for layer in layers for block in block_ids]
    return b"".join(run.numpy().tobytes() for run in runs)


def test_layers_are_blocks_of_keys_then_values() -> None:
    cache = filled_cache()
    assert [tuple(kv_P2BKH.shape) for kv_P2BKH in cache.layers] == [(NUM_BLOCKS, 2, BLOCK_SIZE, 2, 6)] * 3
    assert cache.block_bytes == 2 * BLOCK_SIZE * 2 * 6 * 4 == cache.layers[0][0].nbytes
    assert cache.layout == "layers=3 kv_heads=2 head_dim=6 block_size=4 dtype=float32"


def test_a_new_cache_holds_no_bytes_of_anybody_else() -> None:
    cache = KvCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, torch.float32, "cpu")
    assert not any(kv_P2BKH.any() for kv_P2BKH in cache.layers)


def test_a_payload_is_layer_major_then_block_in_the_order_given() -> None:
    cache = filled_cache()
    payload = cache.gather(1, 2, [5, 0, 3], staging(cache, 6))
    assert payload.numpy().tobytes() == expected_bytes(cache, range(1, 3), [5, 0, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 3])
def test_what_is_gathered_here_and_scattered_there_is_the_same_kv(dtype: torch.dtype, offset: int) -> None:
    """Also when staging begins at an odd byte, and into blocks of other ids."""
    source, target = filled_cache(dtype), filled_cache(dtype)
    before = [kv_P2BKH.clone() for kv_P2BKH in target.layers]
    payload = source.gather(0, 2, [6, 1, 2], staging(source, 6)[offset:])
    target.scatter(0, 2, [7, 0, 4], payload)
    for layer in range(2):
        assert torch.equal(target.layers[layer][[7, 0, 4]], source.layers[layer][[6, 1, 2]])
        others = [1, 2, 3, 5, 6]
        assert torch.equal(target.layers[layer][others], before[layer][others])
    assert torch.equal(target.layers[2], before[2])


def test_view_shares_memory_where_the_bytes_are_one_run() -> None:
    cache = filled_cache()
    view = cache.view(1, 1, [2, 3, 4])
    assert view is not None
    assert view.data_ptr() == cache.layers[1][2].data_ptr()
    assert torch.equal(view, cache.gather(1, 1, [2, 3, 4], staging(cache, 3)))
    cache.layers[1].zero_()
    assert not view.any()


@pytest.mark.parametrize(
    ("num_layers", "block_ids"),
    [
        pytest.param(2, [2], id="two-layers"),
        pytest.param(1, [3, 2], id="descending"),
        pytest.param(1, [2, 4], id="gap"),
    ],
)
def test_there_is_no_view_of_bytes_that_are_apart(num_layers: int, block_ids: list[int]) -> None:
    assert filled_cache().view(0, num_layers, block_ids) is None


@pytest.mark.parametrize(
    ("first_layer", "num_layers", "block_ids"),
    [(0, 1, [NUM_BLOCKS]), (0, 1, [-1]), (2, 2, [0]), (0, 0, [0]), (0, 1, [])],
)
def test_blocks_and_layers_that_do_not_exist_are_refused(
    first_layer: int, num_layers: int, block_ids: list[int]
) -> None:
    cache = filled_cache()
    with pytest.raises(AssertionError):
        cache.gather(first_layer, num_layers, block_ids, staging(cache, 4))
    with pytest.raises(AssertionError):
        cache.scatter(first_layer, num_layers, block_ids, staging(cache, 1)[: cache.block_bytes])


def test_a_payload_of_another_size_is_refused() -> None:
    cache = filled_cache()
    with pytest.raises(AssertionError):
        cache.scatter(0, 1, [0, 1], staging(cache, 1)[: cache.block_bytes])
