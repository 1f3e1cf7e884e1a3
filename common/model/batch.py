"""What one forward pass works on: tokens of several sequences, laid end to end, and where their KV lives.

Shapes: T tokens, S sequences, P blocks of the longest block table, R rows whose logits are wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBatch:
    """A step's input. Prompt chunks and single decode tokens mix freely; each sequence's tokens are consecutive.

    A token's KV goes to slot `block * block_size + offset`, and it attends to its sequence's positions up to its own.
    Tensors are int64 on the model's device; the tuples are the host's copies, so that no stage ever asks the device.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slot_mapping_T: Tensor
    # Where each sequence's tokens start, then T.
    query_start_S1: tuple[int, ...]
    # Positions in the cache once this batch is written: those before it and its own.
    kv_lens: tuple[int, ...]
    kv_len_S: Tensor
    # Rows are padded at the end with block 0, which is never read through them.
    block_table_SP: Tensor
    # Rows of T whose logits are wanted; None stands for all.
    logit_rows: Tensor | None
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        *,
        token_ids: Sequence[int],
        positions: Sequence[int],
        slot_mapping: Sequence[int],
        query_lens: Sequence[int],
        kv_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
        device: torch.device,
    ) -> ForwardBatch:
        """A batch from the host's numbers, in one copy to `device`."""
        num_tokens, num_seqs = len(token_ids), len(query_lens)
        assert num_tokens == len(positions) == len(slot_mapping) == sum(query_lens)
        assert num_seqs == len(kv_lens) == len(block_tables)
        assert min(query_lens) >= 1
        table_width = max(map(len, block_tables))
        flat = [*token_ids, *positions, *slot_mapping, *kv_lens, *logit_rows]
        for table in block_tables:
            flat += table
            flat += [0] * (table_width - len(table))
        # Through a buffer: torch.tensor() looks at each number of a list, ten times slower.
        parts = torch.frombuffer(array("q", flat), dtype=torch.int64).to(device)
        sizes = [num_tokens] * 3 + [num_seqs, len(logit_rows), num_seqs * table_width]
        token_ids_T, positions_T, slot_mapping_T, kv_len_S, rows_R, table = parts.split(sizes)
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slot_mapping_T=slot_mapping_T,
            query_start_S1=tuple(accumulate(query_lens, initial=0)),
            kv_lens=tuple(kv_lens),
            kv_len_S=kv_len_S,
            block_table_SP=table.view(num_seqs, table_width),
            logit_rows=None if list(logit_rows) == list(range(num_tokens)) else rows_R,
        )

    @property
    def num_seqs(self) -> int:
        return len(self.kv_lens)

    @property
    def decode_only(self) -> bool:
        """Every sequence has exactly one query token."""
        return self.query_start_S1[-1] == len(self.kv_lens)

    def once(self, derive: Callable[..., Result], *args: Hashable) -> Result:
        """`derive(self, *args)`, computed for the first layer that asks and remembered for the others.

        Not for a batch whose tensors are overwritten in place between steps: what was derived would be the old step's.
        """
        key = (derive, *args)
        if key not in self._derived:
            self._derived[key] = derive(self, *args)
        return self._derived[key]
