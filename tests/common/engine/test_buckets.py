from __future__ import annotations

import pytest

from common.engine.buckets import batch_buckets
from common.engine.prefill_graphs import MOST_TOKENS, token_buckets


@pytest.mark.parametrize("limit", [1, 8, 16, 17, 100, 2048, 4000, 4096, 5000, 8192])
@pytest.mark.parametrize("buckets", [batch_buckets, token_buckets])
def test_sizes_ascend_to_the_largest_step_and_none_comes_twice(buckets, limit):
    sizes = buckets(limit)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(limit, MOST_TOKENS if buckets is token_buckets else limit)
