import pytest
import torch
import torch.nn.functional as F
from triton.runtime import interpreter

from common.kernels import linear as linear_module
from common.kernels.launch import INTERPRETED
from common.kernels.linear import Product, add_norm_gated, add_norm_linear, choose_plan, linear
from common.kernels.streamed_linear import Norm, ResidentPlan, VectorPlan, streamed_linear
from common.kernels.tiled_linear import TiledPlan, tiled_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# The interpreter cuts bits off where a GPU rounds to the nearest.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2 if INTERPRETED else 1e-2}
BEYOND_PLAIN = 4 if INTERPRETED else 1.5
# Rows, inputs and tokens that fill neither tiles nor chunks.
ODD = (42, 168)
VECTOR_PLANS = [VectorPlan(2, 2, 1), VectorPlan(4, 1, 2)]
RESIDENT_PLANS = [ResidentPlan(16, 2, 64), ResidentPlan(8, 4, 32)]
TILED_PLANS = [TiledPlan(64, 16, 64, 4, 3), TiledPlan(16, 8, 32, 1, 2, splits=3), TiledPlan(64, 32, 64, 4, 3, 2, 128)]
CASES = [(plan, torch.float32) for plan in VECTOR_PLANS + TILED_PLANS]
CASES += [(plan, torch.bfloat16) for plan in VECTOR_PLANS[:1] + RESIDENT_PLANS + TILED_PLANS]
if INTERPRETED:
    CASES += [(plan, torch.float32) for plan in RESIDENT_PLANS]
MODEL_SHAPES = [(4096, 1024), (1024, 3072), (6144, 4096), (4096, 12288)] if torch.cuda.is_available() else []

# The interpreter's exp warns of what is an infinity by design: exp(-gate).
pytestmark = pytest.mark.filterwarnings("ignore:overflow")


@pytest.fixture(autouse=True)
def _loops_bounded_by_device_values(monkeypatch):
    """Triton's interpreter keeps a scalar as an array of one element, which NumPy 2.4 does not take for an index."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel is given to write holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(float("nan")))


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def rows(num_tokens, width, dtype, seed):
    """Rows of quite different sizes: a norm that mixed two of them would show."""
    return (
        random(num_tokens, width, dtype=dtype, seed=seed) * torch.logspace(-1, 1, num_tokens).to(DEVICE, dtype)[:, None]
    )


def weight_of(num_rows, num_in, dtype):
    return random(num_rows, num_in, dtype=dtype, seed=7, scale=num_in**-0.5)


def norm_weight_of(width, dtype):
    return (1 + 0.3 * random(width, seed=9)).to(dtype)


def error(actual, exact):
    assert actual.isfinite().all()
    return ((actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def plain(x_TD, weight_ED, norm_weight_D=None, gated=False):
    """In x's dtype, rounded after every step."""
    if norm_weight_D is not None:
        x_TD = F.rms_norm(x_TD, norm_weight_D.shape, norm_weight_D, EPS)
    out_TE = F.linear(x_TD, weight_ED)
    if not gated:
        return out_TE
    gate, up = out_TE.chunk(2, -1)
    return F.silu(gate) * up


def check(actual, x_TD, weight_ED, norm_weight_D=None, gated=False):
    """Against float64, and against the same steps in plain PyTorch."""
    norm_weight_64 = None if norm_weight_D is None else norm_weight_D.double()
    exact = plain(x_TD.double(), weight_ED.double(), norm_weight_64, gated)
    of_plain = error(plain(x_TD, weight_ED, norm_weight_D, gated), exact)
    assert actual.shape == exact.shape
    assert error(actual, exact) <= min(LIMITS[x_TD.dtype], BEYOND_PLAIN * of_plain + 1e-6)


def assert_is_sum(actual, hidden, residual):
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        torch.testing.assert_close(actual, hidden + residual, rtol=2**-7, atol=0)
    else:
        assert torch.equal(actual, hidden + residual)


def multiply(plan, x_TD, weight_ED, **options):
    if isinstance(plan, TiledPlan):
        return tiled_linear(x_TD, weight_ED, plan, **options)
    return streamed_linear(x_TD, weight_ED, plan, **options)[0]


@pytest.mark.parametrize(("plan", "dtype"), CASES)
@pytest.mark.parametrize("gated", [False, True])
def test_product_is_that_of_plain_pytorch(plan, dtype, gated):
    x, weight = rows(3, ODD[1], dtype, 1), weight_of(*ODD, dtype)
    out = multiply(plan, x, weight, gated=gated)
    assert out.dtype == dtype
    check(out, x, weight, gated=gated)


@pytest.mark.parametrize(("plan", "dtype"), [case for case in CASES if not isinstance(case[0], TiledPlan)])
@pytest.mark.parametrize("gated", [False, True])
def test_residual_is_added_and_the_sum_normalised_before_a_product(plan, dtype, gated):
    hidden, residual = rows(3, ODD[1], dtype, 1), rows(3, ODD[1], dtype, 2)
    weight, norm_weight = weight_of(*ODD, dtype), norm_weight_of(ODD[1], dtype)
    before = hidden.clone(), residual.clone()
    out, total = streamed_linear(hidden, weight, plan, norm=Norm(residual, norm_weight, EPS), gated=gated)
    assert_is_sum(total, *before)
    assert torch.equal(hidden, before[0])
    assert torch.equal(residual, before[1])
    check(out, total, weight, norm_weight, gated)


@pytest.mark.parametrize("plan", [VECTOR_PLANS[0], RESIDENT_PLANS[0]])
def test_first_norm_has_no_residual_and_copies_nothing(plan):
    hidden, weight, norm_weight = (
        rows(2, 64, torch.bfloat16, 1),
        weight_of(32, 64, torch.bfloat16),
        norm_weight_of(64, torch.bfloat16),
    )
    before = hidden.clone()
    out, total = streamed_linear(hidden, weight, plan, norm=Norm(None, norm_weight, EPS))
    assert total is hidden
    assert torch.equal(hidden, before)
    check(out, hidden, weight, norm_weight)


@pytest.mark.parametrize("plan", [VECTOR_PLANS[0], RESIDENT_PLANS[0], RESIDENT_PLANS[1], *TILED_PLANS[:2]])
def test_float32_results_of_bfloat16_are_not_rounded_to_it(plan):
    x, weight = rows(2, 64, torch.bfloat16, 1), weight_of(24, 64, torch.bfloat16)
    out = multiply(plan, x, weight, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert error(out, plain(x.double(), weight.double())) < 1e-5


@pytest.mark.parametrize("plan", [VectorPlan(1, 1, 1), ResidentPlan(8, 1, 32), TiledPlan(16, 8, 16, 1, 2)])
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_any_number_of_tokens(plan, num_tokens):
    x, weight = rows(num_tokens, 32, torch.bfloat16, 1), weight_of(8, 32, torch.bfloat16)
    check(multiply(plan, x, weight), x, weight)


def test_tokens_and_rows_of_more_than_one_group_of_tiles():
    x, weight = rows(75, 32, torch.float32, 1), weight_of(40, 32, torch.float32)
    check(tiled_linear(x, weight, TiledPlan(16, 8, 16, 1, 2)), x, weight)


def test_split_product_repeats_its_bits_and_is_near_the_whole_one():
    x, weight = rows(9, 192, torch.float32, 1), weight_of(40, 192, torch.float32)
    split = TiledPlan(16, 16, 32, 1, 2, splits=4)
    first, *others = (tiled_linear(x, weight, split) for _ in range(3))
    check(first, x, weight)
    assert all(torch.equal(first, other) for other in others)


def test_extreme_gates_close_or_pass_without_nan():
    x = torch.eye(8, device=DEVICE)[:1].contiguous()
    weight = torch.zeros(14, 8, device=DEVICE)
    gate = torch.tensor([-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38], device=DEVICE)
    weight[:, 0] = torch.cat((gate, torch.ones_like(gate)))
    for plan in (VECTOR_PLANS[0], TiledPlan(16, 8, 16, 1, 2)):
        torch.testing.assert_close(multiply(plan, x, weight, gated=True)[0], F.silu(gate), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 17, 70])
def test_entry_points_for_any_number_of_tokens(num_tokens, dtype):
    width, num_rows = 64, 48
    hidden, residual = rows(num_tokens, width, dtype, 1), rows(num_tokens, width, dtype, 2)
    weight, norm_weight = weight_of(num_rows, width, dtype), norm_weight_of(width, dtype)
    if num_tokens == 0:
        assert linear(hidden, weight).shape == (0, num_rows)
        return
    check(linear(hidden, weight), hidden, weight)
    assert linear(hidden, weight, out_dtype=torch.float32).dtype == torch.float32
    for entry, gated in ((add_norm_linear, False), (add_norm_gated, True)):
        out, total = entry(hidden, residual, norm_weight, EPS, weight)
        assert_is_sum(total, hidden, residual)
        check(out, total, weight, norm_weight, gated)
        assert entry(hidden, None, norm_weight, EPS, weight)[1] is hidden


def test_weight_stored_by_columns_is_left_to_the_library(monkeypatch):
    monkeypatch.setattr(linear_module, "choose_plan", None)
    x, weight = rows(1, 64, torch.float32, 1), weight_of(64, 48, torch.float32).t()
    check(linear(x, weight), x, weight)


def test_every_chosen_plan_fits_its_product():
    for (product, num_rows, num_in), measured in linear_module._MEASURED.items():
        limits = [up_to for up_to, _ in measured]
        assert limits == sorted(limits)
        for up_to, plan in measured:
            assert choose_plan(product, up_to, num_rows, num_in, torch.bfloat16) == plan
            if isinstance(plan, VectorPlan):
                assert product is not Product.GATED or plan.rows % 2 == 0
            elif isinstance(plan, ResidentPlan):
                assert up_to <= 16


@pytest.mark.parametrize(("num_rows", "num_in"), MODEL_SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 13, 16, 32, 64, 200])
def test_products_of_real_models(num_rows, num_in, num_tokens):
    hidden, residual = (rows(num_tokens, num_in, torch.bfloat16, seed) for seed in (1, 2))
    weight, norm_weight = weight_of(num_rows, num_in, torch.bfloat16), norm_weight_of(num_in, torch.bfloat16)
    check(linear(hidden, weight), hidden, weight)
    out, total = add_norm_linear(hidden, residual, norm_weight, EPS, weight)
    assert torch.equal(total, hidden + residual)
    check(out, total, weight, norm_weight)
    out, _ = add_norm_gated(hidden, residual, norm_weight, EPS, weight)
    check(out, total, weight, norm_weight, gated=True)


@pytest.mark.skipif(INTERPRETED, reason="graphs are CUDA's")
@pytest.mark.parametrize("num_tokens", [1, 8, 32])
def test_replayed_chain_has_the_bits_of_single_calls(num_tokens):
    weights = [weight_of(3072 if i % 2 else 2048, 1024, torch.bfloat16) for i in range(8)]
    down = weight_of(1024, 1024, torch.bfloat16)
    norm_weight, x = norm_weight_of(1024, torch.bfloat16), rows(num_tokens, 1024, torch.bfloat16, 1)
    split = TiledPlan(64, max(16, num_tokens), 128, 4, 4, splits=4)

    def chain():
        hidden, residual = x, None
        for weight in weights:
            gated, residual = add_norm_gated(hidden, residual, norm_weight, EPS, weight)
            gated = gated[:, :1024].contiguous()
            hidden = tiled_linear(linear(gated, down), down, split)
        return hidden

    torch.cuda.synchronize()
    eager = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, eager)
