"""The decode batch as it lives on the device: one row a running sequence, edited by the host in few words.

A row holds what a step reads and advances (newest token, its position and slot, length, block table) and how its token
is drawn. The kernels advance rows from step to step; the host writes only what changes otherwise: a sequence joins,
moves to another row, gets a block, leaves. Rows [0, number of sequences) are in use, without holes, so that a step over
the first S rows is a step over the batch. A row out of use has length 0 and writes to the scratch block.

Shapes: S rows, P blocks of a block table.
"""

from __future__ import annotations

from array import array
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.engine.device_sampling import log_min_p_of, temperature_of
from common.kernels.rows import advance, apply_edits
from common.kernels.sampling import DeviceSampling
from common.model.batch import ForwardBatch
from common.model.transfer import to_device
from common.sequence import Sequence

# Stop ids that a row can hold; the host alone looks for those of a sequence that has more.
NUM_STOP_IDS = 8
# Matches no token.
NO_TOKEN = -1


class TokenSource(NamedTuple):
    """A token, or the word that has it once all edits so far are flushed."""

    number: int
    is_word: bool


class DecodeRows:
    """All rows are one int32 tensor, so that every edit is a word at an offset and a step's edits are one copy."""

    def __init__(
        self, num_rows: int, *, table_width: int, block_size: int, scratch_block: int, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self.device = device
        self._block_size = block_size
        self._scratch_slot = scratch_block * block_size
        widths = {
            # First, since it has to lie on a multiple of 8 bytes.
            "top_p": 2,
            "token_ids": 1,
            "positions": 1,
            "kv_len": 1,
            "slot_mapping": 1,
            "temperature": 1,
            "log_min_p": 1,
            "top_k": 1,
            "seed_words": 2,
            "first_stop_position": 1,
            "stop_ids": NUM_STOP_IDS,
            "block_table": table_width,
        }
        self._widths = widths
        self._words = torch.zeros(num_rows * sum(widths.values()), dtype=torch.int32, device=device)
        self._first: dict[str, int] = {}
        fields: dict[str, Tensor] = {}
        first = 0
        for name, width in widths.items():
            self._first[name] = first
            fields[name] = self._words[first : first + num_rows * width].view(num_rows, width)
            first += num_rows * width
        self.token_ids_S = fields["token_ids"].view(-1)
        self.positions_S = fields["positions"].view(-1)
        self.kv_len_S = fields["kv_len"].view(-1)
        self.slot_mapping_S = fields["slot_mapping"].view(-1)
        self.block_table_SP = fields["block_table"]
        self.first_stop_position_S = fields["first_stop_position"].view(-1)
        self.stop_ids_SI = fields["stop_ids"]
        self._temperature_S = fields["temperature"].view(-1).view(torch.float32)
        self._log_min_p_S = fields["log_min_p"].view(-1).view(torch.float32)
        self._top_k_S = fields["top_k"].view(-1)
        self._top_p_S = fields["top_p"].view(-1).view(torch.float64)
        self._seed_words_S2 = fields["seed_words"]
        self.slot_mapping_S.fill_(self._scratch_slot)
        # Word to write, and its value; or the word that has the value.
        self._edits: dict[int, int] = {}
        self._copies: dict[int, int] = {}

    def batch(self, num_rows: int) -> ForwardBatch:
        """The first rows as a step's input."""
        return ForwardBatch(
            token_ids_T=self.token_ids_S[:num_rows],
            positions_T=self.positions_S[:num_rows],
            slot_mapping_T=self.slot_mapping_S[:num_rows],
            query_starts=None,
            query_start_S1=None,
            kv_lens=None,
            kv_len_S=self.kv_len_S[:num_rows],
            block_table_SP=self.block_table_SP[:num_rows],
            logit_rows=None,
        )

    def sampling(self, rows: slice) -> DeviceSampling:
        """How these rows' tokens are drawn."""
        return DeviceSampling(
            temperature_S=self._temperature_S[rows],
            seed_words_S2=self._seed_words_S2[rows],
            top_k_S=self._top_k_S[rows],
            top_p_S=self._top_p_S[rows],
            log_min_p_S=self._log_min_p_S[rows],
        )

    def advance(self, drawn_S: Tensor) -> None:
        """Makes the drawn tokens of the first rows the next step's input."""
        rows = slice(len(drawn_S))
        advance(
            drawn_S,
            self.token_ids_S[rows],
            self.positions_S[rows],
            self.kv_len_S[rows],
            self.slot_mapping_S[rows],
            self.block_table_SP[rows],
            self.first_stop_position_S[rows],
            self.stop_ids_SI[rows],
            block_size=self._block_size,
            scratch_slot=self._scratch_slot,
        )

    # Edits gather on the host until `flush`; of several to one word, the last counts.

    def put(self, row: int, sequence: Sequence, *, position: int, stops_here: bool) -> None:
        """A sequence takes a row. `position` is that of its newest token, which the host knows.

        `stops_here`: the device looks for its stop ids.
        """
        self._copies.pop(self._first["token_ids"] + row, None)
        self._set("token_ids", row, 0, sequence.token_ids[-1])
        self._put_rest(row, sequence, position, stops_here)

    def token_of(self, row: int) -> TokenSource:
        """Where a row's newest token is, for `move`, whatever becomes of the row."""
        word = self._first["token_ids"] + row
        if word in self._edits:
            return TokenSource(self._edits[word], is_word=False)
        # It may have moved there itself since the last flush.
        return TokenSource(self._copies.get(word, word), is_word=True)

    def move(self, token: TokenSource, row: int, sequence: Sequence, *, position: int, stops_here: bool) -> None:
        """Like `put`, for a sequence that another row held, and with it the newest token."""
        word = self._first["token_ids"] + row
        if token.is_word:
            self._copies[word] = token.number
            self._edits.pop(word, None)
        else:
            self._edits[word] = token.number
            self._copies.pop(word, None)
        self._put_rest(row, sequence, position, stops_here)

    def grow(self, row: int, block_table: list[int], first_new: int, position: int) -> None:
        """Blocks from index `first_new` on are new; the row's next step computes `position`."""
        for index in range(first_new, len(block_table)):
            self._set("block_table", row, index, block_table[index])
        # The kernel that advanced to this position did not know the block yet.
        if position // self._block_size >= first_new:
            self._set_slot(row, block_table, position)

    def clear(self, row: int) -> None:
        """Takes a row out of use."""
        self._copies.pop(self._first["token_ids"] + row, None)
        self._edits.pop(self._first["token_ids"] + row, None)
        self._set("kv_len", row, 0, 0)
        self._set("positions", row, 0, 0)
        self._set("slot_mapping", row, 0, self._scratch_slot)

    def flush(self) -> None:
        """Enqueues all edits. Without any, nothing is copied."""
        if not self._edits and not self._copies:
            return
        parts = (self._copies.keys(), self._copies.values(), self._edits.keys(), self._edits.values())
        host = torch.frombuffer(array("i", chain(*parts)), dtype=torch.int32)
        copies, sources, targets, values = to_device(host, self.device).split([len(part) for part in parts])
        copied = self._words.index_select(0, sources) if len(sources) else None
        if len(targets):
            apply_edits(self._words, targets, values)
        if copied is not None:
            apply_edits(self._words, copies, copied)
        self._edits, self._copies = {}, {}

    def _put_rest(self, row: int, sequence: Sequence, position: int, stops_here: bool) -> None:
        params = sequence.request.sampling
        self._set("positions", row, 0, position)
        self._set("kv_len", row, 0, position + 1)
        self._set_slot(row, sequence.block_table, position)
        self._set_float("temperature", row, temperature_of(params))
        self._set_float("log_min_p", row, log_min_p_of(params))
        self._set("top_k", row, 0, min(params.top_k, 2**31 - 1))
        for column, word in enumerate(np.array([params.top_p]).view(np.int32).tolist()):
            self._set("top_p", row, column, word)
        for column, word in enumerate(np.array([params.seed], dtype=np.uint64).view(np.int32).tolist()):
            self._set("seed_words", row, column, word)
        self._set_stops(row, sequence, stops_here)
        width = self._widths["block_table"]
        # A reservation's spare block may lie beyond the context, where no step goes, and where the next row begins.
        self._edits.update(enumerate(sequence.block_table[:width], self._first["block_table"] + row * width))

    def _set_slot(self, row: int, block_table: list[int], position: int) -> None:
        block = block_table[position // self._block_size]
        self._set("slot_mapping", row, 0, block * self._block_size + position % self._block_size)

    def _set_stops(self, row: int, sequence: Sequence, stops_here: bool) -> None:
        fits = len(sequence.stop_token_ids) <= NUM_STOP_IDS
        stops = sorted(sequence.stop_token_ids) if fits and stops_here else []
        for column in range(NUM_STOP_IDS):
            self._set("stop_ids", row, column, stops[column] if column < len(stops) else NO_TOKEN)
        first = sequence.request.num_prompt_tokens + max(sequence.request.stopping.min_tokens, 1) - 1
        self._set("first_stop_position", row, 0, first)

    def _set(self, name: str, row: int, column: int, value: int) -> None:
        self._edits[self._first[name] + row * self._widths[name] + column] = value

    def _set_float(self, name: str, row: int, value: float) -> None:
        self._set(name, row, 0, int(np.float32(value).view(np.int32)))
