import pytest
import torch

from common.kernels.checksum import BLOCK, mixed_sum
from common.transport.checksum import mixed_sum as plain_mixed_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17]


def words(count):
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(count)).to(DEVICE)


def exact(values):
    """In Python's integers."""
    total = 0
    for index, value in enumerate(values.tolist()):
        x = (value ^ ((index + 1) * 0x9E3779B97F4A7C15)) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        total += x ^ (x >> 31)
    return total % 2**64


@pytest.mark.parametrize("count", SIZES)
def test_kernel_and_plain_pytorch_give_the_checksum_that_is_specified(count):
    values = words(count)
    expected = exact(values)
    assert mixed_sum(values).item() % 2**64 == expected
    assert plain_mixed_sum(values).item() % 2**64 == expected


def test_every_bit_and_every_place_counts():
    values = words(64)
    sums = {mixed_sum(values).item()}
    for bit in range(64):
        flipped = values.clone()
        flipped[bit] ^= torch.tensor(1 << bit if bit < 63 else -(2**63))
        sums.add(mixed_sum(flipped).item())
    swapped = values.clone()
    swapped[[3, 9]] = swapped[[9, 3]]
    sums.add(mixed_sum(swapped).item())
    sums.add(mixed_sum(values.roll(1)).item())
    assert len(sums) == 67


def test_what_lies_behind_the_payload_does_not_count():
    memory = words(3 * BLOCK)
    before = mixed_sum(memory[: BLOCK + 5]).item()
    memory[BLOCK + 5 :] = 7
    assert mixed_sum(memory[: BLOCK + 5]).item() == before
    assert mixed_sum(torch.zeros(8, dtype=torch.int64, device=DEVICE)).item() != 0
