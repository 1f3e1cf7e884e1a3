import pytest
import torch
import torch.nn.functional as F

from common.kernels.elementwise import add_norm, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# The interpreter cuts bits off where a GPU rounds to the nearest.
TRUNCATES = DEVICE == "cpu"
BEYOND_PLAIN = 3.5 if TRUNCATES else 1.5
SIZES = [(1, 192), (3, 100), (7, 1024), (40, 64)]
if torch.cuda.is_available():
    SIZES += [(t, d) for t in (1, 8, 1024, 4097) for d in (1024, 4096, 8192)]


def rows(num_tokens, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    # Rows of quite different sizes: a norm that mixed two of them would show.
    sizes = torch.logspace(-2, 2, num_tokens)[:, None]
    return (torch.randn(num_tokens, width, generator=generator) * sizes).to(DEVICE, dtype)


def weight_of(width, dtype):
    return (1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(9))).to(DEVICE, dtype)


def error(actual, exact):
    assert actual.isfinite().all()
    return ((actual.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


# The interpreter's exp warns of what is an infinity by design: exp(-gate).
pytestmark = pytest.mark.filterwarnings("ignore:overflow")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel is given to write holds NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: empty_like(x, **options).fill_(float("nan")))


def exact_norm(x_TD, weight_D):
    return F.rms_norm(x_TD.double(), weight_D.shape, weight_D.double(), EPS)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("num_tokens", "width"), SIZES)
def test_sum_is_rounded_once_and_normalised_from_its_rounded_value(num_tokens, width, dtype):
    hidden, residual = (rows(num_tokens, width, dtype, seed) for seed in (1, 2))
    hidden_before, residual_before = hidden.clone(), residual.clone()
    weight = weight_of(width, dtype)
    normed, total = add_norm(hidden, residual, weight, EPS)
    if TRUNCATES and dtype == torch.bfloat16:
        torch.testing.assert_close(total, hidden_before + residual_before, rtol=2**-7, atol=0)
    else:
        assert torch.equal(total, hidden_before + residual_before)
    assert torch.equal(hidden, hidden_before)
    assert torch.equal(residual, residual_before)
    exact = exact_norm(total, weight)
    limit = min(LIMITS[dtype], BEYOND_PLAIN * error(F.rms_norm(total, weight.shape, weight, EPS), exact) + 1e-6)
    assert normed.dtype == dtype
    assert error(normed, exact) <= limit


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("num_tokens", "width"), SIZES)
def test_first_norm_has_no_residual_and_copies_nothing(num_tokens, width, dtype):
    hidden, weight = rows(num_tokens, width, dtype, 1), weight_of(width, dtype)
    before = hidden.clone()
    normed, total = add_norm(hidden, None, weight, EPS)
    assert total is hidden
    assert torch.equal(hidden, before)
    assert error(normed, exact_norm(hidden, weight)) <= LIMITS[dtype]


def test_row_of_zeros_is_normalised_to_zeros():
    hidden = torch.zeros(2, 192, device=DEVICE)
    assert add_norm(hidden, hidden.clone(), weight_of(192, torch.float32), EPS)[0].eq(0).all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 512), (5, 100), (33, 1028)])
def test_gate_is_applied_to_its_own_column(num_tokens, width, dtype):
    gate_up = rows(num_tokens, 2 * width, dtype, 3)
    gate, up = gate_up.chunk(2, -1)
    exact = F.silu(gate.double()) * up.double()
    limit = min(LIMITS[dtype], BEYOND_PLAIN * error(F.silu(gate) * up, exact) + 1e-6)
    out = silu_mul(gate_up)
    assert out.shape == gate.shape
    assert out.dtype == dtype
    assert error(out, exact) <= limit


def test_extreme_gates_close_or_pass_without_nan():
    gate = torch.tensor([[-3e38, -1e4, -100.0, 0.0, 100.0, 1e4, 3e38]], device=DEVICE)
    out = silu_mul(torch.cat((gate, torch.ones_like(gate)), -1))
    torch.testing.assert_close(out, F.silu(gate), rtol=1e-5, atol=1e-30)


def test_row_has_the_same_bits_alone_and_in_a_batch():
    num_tokens = 40 if DEVICE == "cpu" else 5000
    hidden, residual = (rows(num_tokens, 192, torch.bfloat16, seed) for seed in (1, 2))
    weight = weight_of(192, torch.bfloat16)
    together, alone = (add_norm(hidden[:n], residual[:n], weight, EPS)[0] for n in (num_tokens, 1))
    assert torch.equal(together[:1], alone)
    assert torch.equal(silu_mul(hidden)[:1], silu_mul(hidden[:1]))
