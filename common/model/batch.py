"""What one forward pass works on: tokens of several sequences, laid end to end, and where their KV lives.

Shapes: T tokens, S sequences, P blocks of the longest block table, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.model.transfer import to_device

Result = TypeVar("Result")
Numbers = Sequence[int] | np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBatch:
    """A step's input. Prompt chunks and single decode tokens mix freely; each sequence's tokens are consecutive.

    A token's KV goes to slot `block * block_size + offset`, and it attends to its sequence's positions up to its own.
    Tensors are integers on the model's device; the tuples are the host's copies, so that no stage ever asks the device.
    A batch that lives on the device alone has no tuples: a CUDA graph replays it. Without `query_start_S1` it has one
    token a sequence; with it, tokens past the last sequence's are padding, and sequences may have no tokens at all.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    slot_mapping_T: Tensor
    # Where each sequence's tokens start, then T.
    query_starts: tuple[int, ...] | None
    query_start_S1: Tensor | None
    # Positions in the cache once this batch is written: those before it and its own; 0 for a row that is not in use.
    kv_lens: tuple[int, ...] | None
    kv_len_S: Tensor
    # Rows are padded at the end with block 0, which is never read through them.
    block_table_SP: Tensor
    # Rows of T whose logits are wanted; None stands for all.
    logit_rows: Tensor | None
    # How many of the device's SMs attention may fill; None: all.
    attention_sm: int | None = None
    _derived: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        *,
        token_ids: Numbers,
        positions: Numbers,
        slot_mapping: Numbers,
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
        query_starts = tuple(accumulate(map(int, query_lens), initial=0))
        parts: tuple[Numbers, ...] = (token_ids, positions, slot_mapping, query_starts, kv_lens, logit_rows)
        # Every part begins on 16 bytes: kernels are compiled anew for pointers that do not.
        sizes = [len(part) + len(part) % 2 for part in parts]
        host = torch.zeros(sum(sizes) + num_seqs * table_width, dtype=torch.int64)
        flat, first = host.numpy(), 0
        for part, size in zip(parts, sizes, strict=True):
            flat[first : first + len(part)] = part
            first += size
        table_SP = flat[first:].reshape(num_seqs, table_width)
        for row, table in zip(table_SP, block_tables, strict=True):
            row[: len(table)] = table
        *columns, table = to_device(host, device).split([*sizes, num_seqs * table_width])
        token_ids_T, positions_T, slot_mapping_T, query_start_S1, kv_len_S, rows_R = (
            column[: len(part)] for column, part in zip(columns, parts, strict=True)
        )
        every_row = len(logit_rows) == num_tokens and list(logit_rows) == list(range(num_tokens))
        return cls(
            token_ids_T=token_ids_T,
            positions_T=positions_T,
            slot_mapping_T=slot_mapping_T,
            query_starts=query_starts,
            query_start_S1=query_start_S1,
            kv_lens=tuple(map(int, kv_lens)),
            kv_len_S=kv_len_S,
            block_table_SP=table.view(num_seqs, table_width),
            logit_rows=None if every_row else rows_R,
        )

    @property
    def num_seqs(self) -> int:
        return len(self.kv_len_S)

    @property
    def decode_only(self) -> bool:
        """Every sequence has exactly one query token."""
        if self.query_starts is None:
            return self.query_start_S1 is None
        return len(self.token_ids_T) == len(self.kv_len_S)

    def part(self, first: int, end: int, *, attention_sm: int | None = None) -> ForwardBatch:
        """Sequences [first, end) of a batch of one token each, over the same memory: a micro-batch."""
        assert self.decode_only
        assert self.logit_rows is None
        count = end - first
        return ForwardBatch(
            token_ids_T=self.token_ids_T[first:end],
            positions_T=self.positions_T[first:end],
            slot_mapping_T=self.slot_mapping_T[first:end],
            query_starts=None if self.query_starts is None else self.query_starts[: count + 1],
            query_start_S1=None if self.query_start_S1 is None else self.query_start_S1[: count + 1],
            kv_lens=None if self.kv_lens is None else self.kv_lens[first:end],
            kv_len_S=self.kv_len_S[first:end],
            block_table_SP=self.block_table_SP[first:end],
            logit_rows=None,
            attention_sm=attention_sm,
        )

    def once(self, derive: Callable[..., Result], *args: Hashable) -> Result:
        """`derive(self, *args)`, computed for the first layer that asks and remembered for the others.

        A batch whose tensors are overwritten between steps is for one capture of a CUDA graph: the graph replays what
        was derived along with the rest.
        """
        key = (derive, *args)
        if key not in self._derived:
            self._derived[key] = derive(self, *args)
        return self._derived[key]

    def has_derived(self, derive: Callable[..., object], *args: Hashable) -> bool:
        """Whether `once` has the result already, from a layer before this one."""
        return (derive, *args) in self._derived
