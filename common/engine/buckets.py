"""The batch sizes that steps are captured for. Knows numbers only."""

from __future__ import annotations


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Ascending batch sizes to capture: a batch is padded by at most an eighth beyond 64 rows, less than 8 below."""
    sizes = [1, 2, 4]
    while sizes[-1] < max_num_seqs:
        last = sizes[-1]
        sizes.append(last + (4 if last < 8 else 8 if last < 64 else 16 if last < 256 else 32 if last < 512 else 64))
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]
