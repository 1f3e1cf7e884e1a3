"""The KV memory of one worker: one tensor per layer, cut into blocks. Knows bytes and block ids, never sequences."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from common.engine.streams import sleep_until_done
from common.model.config import ModelConfig
from common.model.transfer import to_device


class KvCache:
    """`layers[l]` is kv_P2BKH, [num_blocks, 2, block_size, num_kv_heads, head_dim]: keys, then values, of each block.

    One block of one layer is one contiguous run of `block_bytes`. A payload is such runs laid end to end, layer by
    layer and within a layer in the order of the block ids given. Both sides of a transfer use this class: they agree.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.device = torch.device(device)
        self.num_layers = config.num_layers
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = config.kv_block_bytes(block_size, dtype)
        self.layout = config.kv_layout(block_size, dtype)
        shape = (num_blocks + 1, 2, block_size, config.num_kv_heads, config.head_dim)
        # Zeros, so that no bytes of whatever used this memory before ever leave with a block's unwritten end.
        # Behind each layer's last block lies one more, for kernels alone: rows that are not in use write there.
        self.scratch_block = num_blocks
        self.layers = [torch.zeros(shape, dtype=dtype, device=device)[:num_blocks] for _ in range(config.num_layers)]
        # Each layer as [num_blocks, block_bytes / 8] words: head_dim is even, so block_bytes is a multiple of 8.
        self._words = [layer.view(num_blocks, -1).view(torch.int64) for layer in self.layers]

    def gather(self, first_layer: int, num_layers: int, block_ids: Sequence[int], out: Tensor) -> Tensor:
        """Copies blocks into `out` (uint8, large enough) and returns the part it filled.

        From a CUDA device into memory of that device, the copy is part of the calling thread's stream; into pinned
        memory of the host, it is done when this returns.
        """
        filled = out[: self._num_bytes(first_layer, num_layers, block_ids)]
        if self.device.type == filled.device.type:
            self._gather(first_layer, num_layers, block_ids, filled)
        else:
            gathered = torch.empty(len(filled), dtype=torch.uint8, device=self.device)
            self._gather(first_layer, num_layers, block_ids, gathered)
            filled.copy_(gathered, non_blocking=True)
            sleep_until_done(self.device)
        return filled

    def view(self, first_layer: int, num_layers: int, block_ids: Sequence[int]) -> Tensor | None:
        """The bytes that `gather` gives, uncopied, where they are one run: one layer, ascending neighbouring blocks."""
        self._num_bytes(first_layer, num_layers, block_ids)
        first = block_ids[0]
        if num_layers != 1 or list(block_ids) != list(range(first, first + len(block_ids))):
            return None
        return self._words[first_layer][first : first + len(block_ids)].view(-1).view(torch.uint8)

    def scatter(self, first_layer: int, num_layers: int, block_ids: Sequence[int], payload: Tensor) -> None:
        """Writes a payload (uint8, exactly as many bytes as `gather` gives) into blocks.

        On a CUDA device it is part of the calling thread's stream; the payload may lie there, or in pinned memory.
        """
        assert payload.numel() == self._num_bytes(first_layer, num_layers, block_ids)
        if payload.device.type != self.device.type:
            payload = payload.to(self.device, non_blocking=True)
        if payload.storage_offset() % 8:
            payload = payload.clone()
        ids = _index(block_ids, self.device)
        rows = payload.view(torch.int64).view(num_layers, len(block_ids), -1)
        for row, words in zip(rows, self._words[first_layer : first_layer + num_layers], strict=True):
            if self.device.type == "cpu":
                # numpy copies whole rows; index_copy_ takes twice as long.
                words.numpy()[ids.numpy()] = row.numpy()
            else:
                words.index_copy_(0, ids, row)

    def _gather(self, first_layer: int, num_layers: int, block_ids: Sequence[int], out: Tensor) -> None:
        # A CPU copies rows whatever they are made of, and its `out` may begin at any byte.
        unit = torch.uint8 if self.device.type == "cpu" else torch.int64
        ids = _index(block_ids, self.device)
        rows = out.view(unit).view(num_layers, len(block_ids), -1)
        for row, words in zip(rows, self._words[first_layer : first_layer + num_layers], strict=True):
            torch.index_select(words.view(unit), 0, ids, out=row)

    def _num_bytes(self, first_layer: int, num_layers: int, block_ids: Sequence[int]) -> int:
        assert num_layers >= 1
        assert 0 <= first_layer <= first_layer + num_layers <= self.num_layers
        assert block_ids
        assert 0 <= min(block_ids) <= max(block_ids) < self.num_blocks
        return num_layers * len(block_ids) * self.block_bytes


def _index(block_ids: Sequence[int], device: torch.device) -> Tensor:
    ids = torch.frombuffer(array("q", block_ids), dtype=torch.int64)
    # From pinned memory, so that nobody waits for what the stream does before.
    return to_device(ids, device)
