import pytest
import torch

from common.kernels import linear as linear_module
from common.kernels.launch import INTERPRETED
from common.kernels.linear import Product, add_norm_project
from common.kernels.projected_heads import project_heads
from common.kernels.rotate_write import norm_rotate_write
from common.kernels.tiled_linear import TiledPlan
from common.model.rope import rope_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
NUM_BLOCKS, BLOCK_SIZE, CONTEXT = 6, 16, 100
# The interpreter cuts bits off where a GPU rounds to the nearest.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2 if INTERPRETED else 1e-2}
# (tokens, query heads, kv heads, D, plan): more tokens than a program's, odd numbers of both, D that fills no step.
CASES = [
    (1, 4, 2, 64, TiledPlan(32, 16, 32, 1, 2)),
    (5, 4, 2, 96, TiledPlan(32, 16, 32, 1, 2, splits=3)),
    (19, 3, 1, 96, TiledPlan(32, 16, 32, 1, 2, splits=2, prefetch=64)),
    (33, 8, 4, 72, TiledPlan(64, 16, 32, 4, 3, splits=3)),
    (7, 2, 2, 168, TiledPlan(128, 16, 64, 4, 3, splits=2, prefetch=128)),
    (40, 2, 1, 128, TiledPlan(128, 32, 128, 4, 2)),
]
if not INTERPRETED:
    CASES += [
        (num_tokens, num_heads, 8, num_in, TiledPlan(128, tokens, 64, 4, 4, splits, 512))
        for num_heads, num_in, splits in ((16, 1024, 4), (32, 4096, 3))
        for num_tokens, tokens in ((8, 16), (29, 32), (32, 16), (64, 64))
    ]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel is given to write holds NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


class Case:
    def __init__(self, num_tokens, num_heads, num_kv_heads, num_in, plan, dtype, index_dtype=torch.int64):
        generator = torch.Generator().manual_seed(num_tokens)
        num_all, self.head_dim = num_heads + 2 * num_kv_heads, plan.rows

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        def some_of(limit):
            return torch.randperm(limit, generator=generator)[:num_tokens].to(DEVICE, index_dtype)

        # Heads and tokens of quite different sizes: a norm that mixed two of them would show.
        sizes = torch.logspace(-1, 1, num_all).repeat_interleave(self.head_dim)[:, None] * num_in**-0.5
        self.x = (random(num_tokens, num_in) * torch.logspace(-1, 1, num_tokens)[:, None]).to(DEVICE, dtype)
        self.residual = (random(num_tokens, num_in)).to(DEVICE, dtype)
        self.norm = (1 + 0.3 * random(num_in)).to(DEVICE, dtype)
        self.weight = (random(num_all * self.head_dim, num_in) * sizes).to(DEVICE, dtype)
        self.qk_norm = (1 + 0.3 * random(num_heads + num_kv_heads, self.head_dim)).to(DEVICE, dtype)
        self.rope = rope_table(CONTEXT, self.head_dim, 1e6, torch.float32, torch.device(DEVICE))
        self.positions, self.slots = some_of(CONTEXT), some_of(NUM_BLOCKS * BLOCK_SIZE)
        self.cache = random(NUM_BLOCKS, 2, BLOCK_SIZE, num_kv_heads, self.head_dim).to(DEVICE, dtype)
        self.num_heads, self.plan = num_heads, plan

    def run(self):
        """(queries, cache)."""
        cache = self.cache.clone()
        where = self.rope, self.positions, self.slots, cache, self.num_heads
        return project_heads(self.x, self.weight, self.qk_norm, EPS, *where, self.plan), cache

    def by_steps(self):
        """The same by a product of PyTorch's and the kernel for what follows it."""
        cache = self.cache.clone()
        qkv = torch.nn.functional.linear(self.x, self.weight).view(len(self.x), -1, self.head_dim)
        where = self.rope, self.positions, self.slots, cache, self.num_heads
        return norm_rotate_write(qkv, self.qk_norm, EPS, *where), cache


def error(actual, expected):
    assert actual.isfinite().all()
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).max().item()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("case", CASES)
def test_heads_are_those_of_separate_kernels(case, dtype):
    case = Case(*case, dtype)
    for actual, expected in zip(case.run(), case.by_steps(), strict=True):
        assert error(actual, expected) <= LIMITS[dtype]


@pytest.mark.parametrize("case", CASES[1:4])
def test_slots_of_no_token_keep_their_bits(case):
    case = Case(*case, torch.bfloat16)
    _, cache = case.run()
    blocks, offsets = case.slots // BLOCK_SIZE, case.slots % BLOCK_SIZE
    assert not torch.equal(cache, case.cache)
    cache[blocks, :, offsets] = case.cache[blocks, :, offsets]
    assert torch.equal(cache, case.cache)


def test_int32_positions_and_slots_do_as_well():
    wide, narrow = (Case(*CASES[2], torch.float32, dtype).run() for dtype in (torch.int64, torch.int32))
    for wide_part, narrow_part in zip(wide, narrow, strict=True):
        assert torch.equal(wide_part, narrow_part)


def test_split_product_repeats_its_bits():
    case = Case(*CASES[3], torch.float32)
    first, *others = (case.run() for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def test_no_tokens_give_no_queries():
    case = Case(0, *CASES[0][1:], torch.float32)
    q, cache = case.run()
    assert q.shape == (0, 4, 32)
    assert torch.equal(cache, case.cache)


def entry(case, residual):
    cache = case.cache.clone()
    where = case.rope, case.positions, case.slots, cache
    q, total = add_norm_project(case.x, residual, case.norm, EPS, case.weight, case.qk_norm, *where)
    return q, cache, total


@pytest.mark.parametrize("with_residual", [False, True])
def test_entry_point_gives_the_same_by_one_kernel_and_by_several(monkeypatch, with_residual):
    case = Case(*CASES[4], torch.bfloat16)
    residual = case.residual if with_residual else None
    several = entry(case, residual)
    calls = []

    def counted(*args):
        calls.append(args)
        return project_heads(*args)

    monkeypatch.setattr(linear_module, "project_heads", counted)
    key = Product.PROJECTED, *case.weight.shape
    monkeypatch.setitem(linear_module._MEASURED, key, ((len(case.x), case.plan),))
    linear_module.choose_plan.cache_clear()
    try:
        one = entry(case, residual)
    finally:
        linear_module.choose_plan.cache_clear()
    assert len(calls) == 1
    assert torch.equal(one[2], several[2])
    assert all(error(*pair) <= LIMITS[torch.bfloat16] for pair in zip(one[:2], several[:2], strict=True))


def test_plan_for_other_heads_is_left_alone(monkeypatch):
    case = Case(*CASES[4], torch.bfloat16)
    monkeypatch.setattr(linear_module, "project_heads", None)
    key = Product.PROJECTED, *case.weight.shape
    monkeypatch.setitem(linear_module._MEASURED, key, ((len(case.x), case.plan._replace(rows=64)),))
    linear_module.choose_plan.cache_clear()
    try:
        entry(case, None)
    finally:
        linear_module.choose_plan.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
@pytest.mark.parametrize("case", CASES[-4:])
def test_replayed_chain_has_the_bits_of_single_calls(case):
    case = Case(*case, torch.bfloat16)
    torch.cuda.synchronize()
    caches = [case.cache.clone() for _ in range(8)]

    def chain():
        where = [(case.rope, case.positions, case.slots, cache) for cache in caches]
        return [project_heads(case.x, case.weight, case.qk_norm, EPS, *w, case.num_heads, case.plan) for w in where]

    expected, cache = case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        for tensor in captured + caches:
            tensor.copy_(case.cache if tensor.ndim == 5 else torch.zeros_like(tensor))
        graph.replay()
        assert all(torch.equal(q, expected) for q in captured)
        assert all(torch.equal(kv, cache) for kv in caches)
