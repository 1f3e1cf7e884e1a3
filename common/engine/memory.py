"""What a worker's device memory goes to, planned before any of it is used. Knows sizes, never tensors."""

from __future__ import annotations

from dataclasses import dataclass

from common.settings import ConfigError

GIB = 2**30
# Bytes of a captured step, nodes and kernel arguments, measured at 28 and 36 layers; activations are counted apart.
GRAPH_BYTES = 12 * 2**20
# Driver context, loaded kernels and the libraries' workspaces, measured on an H200 with PyTorch 2.11.
RUNTIME_BYTES = 1200 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes on one device. What is left of the worker's share when everything else has its part holds KV blocks."""

    device: str
    total: int
    # Used by nobody yet.
    free: int
    # Share of `total` that this worker may use.
    fraction: float
    runtime: int
    weights: int
    activations: int
    graphs: int
    # Of requests with penalties, bias or a minimum length; taken when the first of them comes.
    sampling: int
    staging: int
    # All layers of one block.
    block_bytes: int
    # Asked for by number; 0: as many as fit.
    wanted_blocks: int

    @property
    def num_blocks(self) -> int:
        """Blocks for KV, without the scratch block.

        Raises:
            ConfigError: they do not fit; says which settings would help.
        """
        room = int(self.total * self.fraction) - self.fixed
        fitting = room // self.block_bytes - 1
        if fitting < max(self.wanted_blocks, 2):
            wanted = f"{self.wanted_blocks} KV blocks" if self.wanted_blocks else "two KV blocks"
            raise ConfigError(
                f"{self.device}: {wanted} of {_size(self.block_bytes)} do not fit; {_size(self.fixed)} of the worker's "
                f"{_size(int(self.total * self.fraction))} are taken (see the table). Raise gpu_memory_fraction="
                f"{self.fraction:g}, or lower max_batch_tokens, max_num_seqs or num_blocks\n{self.table()}"
            )
        num_blocks = self.wanted_blocks or fitting
        # The weights, and most of the runtime, are in place.
        missing = self.to_be_taken + (num_blocks + 1) * self.block_bytes
        if missing > self.free:
            raise ConfigError(
                f"{self.device}: {_size(missing)} are still to be taken, and {_size(self.free)} are free: others use "
                f"the device. Lower gpu_memory_fraction={self.fraction:g} (the workers of one device add up to 1 at "
                f"most) or num_blocks, or end what else runs there\n{self.table()}"
            )
        return num_blocks

    @property
    def to_be_taken(self) -> int:
        """Beside the blocks."""
        return self.activations + self.graphs + self.sampling + self.staging

    @property
    def fixed(self) -> int:
        return self.runtime + self.weights + self.to_be_taken

    def table(self, num_blocks: int | None = None, block_size: int = 0) -> str:
        """For a person at start-up."""
        rows = [
            ("runtime and libraries", self.runtime),
            ("weights", self.weights),
            ("activations", self.activations),
            ("CUDA graphs", self.graphs),
            ("sampling tables", self.sampling),
            ("KV staging", self.staging),
        ]
        if num_blocks is not None:
            kv_bytes = (num_blocks + 1) * self.block_bytes
            rows.append((f"KV cache, {num_blocks:,} blocks, {num_blocks * block_size:,} tokens", kv_bytes))
            rows.append(("left to others", self.total - self.fixed - kv_bytes))
        rows.append((f"{self.device} in all, of which {self.fraction:.0%} for this worker", self.total))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:{width}}  {_size(size):>10}" for name, size in rows)


def activation_bytes(
    *,
    hidden_size: int,
    qkv_width: int,
    intermediate_size: int,
    vocab_size: int,
    num_tokens: int,
    num_rows: int,
    itemsize: int,
) -> int:
    """The most that one step holds at once: `num_tokens` through a layer, `num_rows` through the head and the draw."""
    layer = num_tokens * itemsize * (4 * hidden_size + 2 * qkv_width + 3 * intermediate_size)
    # float32 logits, and what is made of them where they are edited or scored.
    head = num_rows * vocab_size * 4 * 2
    return layer + head


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"
