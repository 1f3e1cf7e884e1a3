import pytest
import torch

from common.kernels.rotate_write import norm_rotate_write
from common.model.rope import RopeRows, norm_and_rotate_, rope_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# The interpreter cuts bits off where a GPU rounds to the nearest.
BEYOND_PLAIN = 1.5 if DEVICE == "cuda" else 3.5
NUM_BLOCKS, BLOCK_SIZE, CONTEXT = 7, 16, 300
# (tokens, query heads, kv heads, head dim)
SIZES = [(1, 8, 4, 32), (1, 3, 1, 64), (7, 8, 4, 32), (5, 4, 2, 128), (40, 5, 3, 16), (3, 2, 1, 256)]
if torch.cuda.is_available():
    SIZES += [(t, n, 8, 128) for t in (1, 33, 100) for n in (16, 32)]


class Case:
    def __init__(self, num_tokens, num_heads, num_kv_heads, head_dim, dtype, index_dtype=torch.int64):
        generator = torch.Generator().manual_seed(num_tokens)
        num_rotated = num_heads + num_kv_heads

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        def some_of(limit):
            return torch.randperm(limit, generator=generator)[:num_tokens].to(DEVICE, index_dtype)

        # Heads of quite different sizes: a norm that mixed two of them would show.
        sizes = torch.logspace(-1, 2, num_rotated + num_kv_heads)[:, None]
        self.qkv = (random(num_tokens, num_rotated + num_kv_heads, head_dim) * sizes).to(DEVICE, dtype)
        self.weight = (1 + 0.3 * random(num_rotated, head_dim)).to(DEVICE, dtype)
        self.positions, self.slots = some_of(CONTEXT), some_of(NUM_BLOCKS * BLOCK_SIZE)
        self.rope = rope_table(CONTEXT, head_dim, 1e6, torch.float32, torch.device(DEVICE))
        self.cache = random(NUM_BLOCKS, 2, BLOCK_SIZE, num_kv_heads, head_dim).to(DEVICE, dtype)
        self.num_heads, self.num_rotated = num_heads, num_rotated

    def run(self):
        cache = self.cache.clone()
        q = norm_rotate_write(self.qkv, self.weight, EPS, self.rope, self.positions, self.slots, cache, self.num_heads)
        return q, cache

    def reference(self, dtype):
        """(queries, cache) by the plain functions in `dtype`."""
        qkv, cache = self.qkv.to(dtype, copy=True), self.cache.to(dtype, copy=True)
        rope = RopeRows(*self.rope.to(dtype)[self.positions.long()].unsqueeze(2).unbind(1))
        norm_and_rotate_(qkv[:, : self.num_rotated], self.weight.to(dtype), EPS, rope)
        blocks, offsets = self.slots.long() // BLOCK_SIZE, self.slots.long() % BLOCK_SIZE
        cache[blocks, 0, offsets] = qkv[:, self.num_heads : self.num_rotated]
        cache[blocks, 1, offsets] = qkv[:, self.num_rotated :]
        return qkv[:, : self.num_heads], cache


def error(actual, exact):
    assert actual.isfinite().all()
    return ((actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel is given to write holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", SIZES)
def test_queries_and_cache_are_those_of_the_plain_functions(size, dtype):
    case = Case(*size, dtype)
    plain, exact = case.reference(dtype), case.reference(torch.float64)
    for actual, plain_part, exact_part in zip(case.run(), plain, exact, strict=True):
        assert actual.dtype == dtype
        assert actual.shape == exact_part.shape
        assert error(actual, exact_part) <= min(LIMITS[dtype], BEYOND_PLAIN * error(plain_part, exact_part) + 1e-6)


@pytest.mark.parametrize("dtype", LIMITS)
def test_values_and_other_slots_keep_their_bits(dtype):
    case = Case(7, 8, 4, 32, dtype)
    _, cache = case.run()
    blocks, offsets = case.slots // BLOCK_SIZE, case.slots % BLOCK_SIZE
    assert torch.equal(cache[blocks, 1, offsets], case.qkv[:, case.num_rotated :])
    cache[blocks, :, offsets] = case.cache[blocks, :, offsets]
    assert torch.equal(cache, case.cache)


def test_queries_are_contiguous_and_the_projection_is_left_as_it_is():
    case = Case(3, 8, 4, 32, torch.bfloat16)
    before = case.qkv.clone()
    q, _ = case.run()
    assert q.is_contiguous()
    assert torch.equal(case.qkv, before)


def test_int32_positions_and_slots_do_as_well():
    wide, narrow = (Case(5, 8, 4, 32, torch.float32, dtype).run() for dtype in (torch.int64, torch.int32))
    for wide_part, narrow_part in zip(wide, narrow, strict=True):
        assert torch.equal(wide_part, narrow_part)


def test_token_has_the_same_bits_alone_and_in_a_batch():
    case = Case(40, 8, 4, 32, torch.bfloat16)
    together, _ = case.run()
    case.qkv, case.positions, case.slots = case.qkv[:1], case.positions[:1], case.slots[:1]
    assert torch.equal(case.run()[0], together[:1])
