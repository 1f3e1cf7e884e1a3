import pytest
import torch
from triton.runtime import interpreter

from common.kernels.invariant_linear import invariant_linear, invariant_plan
from common.kernels.launch import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts bits off where a GPU rounds to the nearest.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = [(40, 72), (130, 64)]
if torch.cuda.is_available():
    SHAPES += [(512, 192), (1024, 3072), (4096, 1024), (24576, 4096)]


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
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("num_rows", "num_in"), SHAPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_product_is_that_of_plain_pytorch(num_rows, num_in, num_tokens, dtype):
    x, weight = random(num_tokens, num_in, dtype=dtype, seed=1), random(num_rows, num_in, dtype=dtype, seed=2)
    exact = x.double() @ weight.double().t()
    out = invariant_linear(x, weight)
    assert out.dtype == dtype
    assert ((out.double() - exact).norm() / exact.norm()).item() < LIMITS[dtype]


def test_float32_results_of_bfloat16_are_not_rounded_to_it():
    x, weight = random(2, 64, dtype=torch.bfloat16, seed=1), random(24, 64, dtype=torch.bfloat16, seed=2)
    out, exact = invariant_linear(x, weight, out_dtype=torch.float32), x.double() @ weight.double().t()
    assert out.dtype == torch.float32
    assert ((out - exact).norm() / exact.norm()).item() < 1e-5


def test_no_tokens_give_no_rows():
    x, weight = random(0, 64, dtype=torch.bfloat16, seed=1), random(24, 64, dtype=torch.bfloat16, seed=2)
    assert invariant_linear(x, weight).shape == (0, 24)


def test_weight_may_be_stored_by_columns():
    x, weight = random(3, 64, dtype=torch.float32, seed=1), random(24, 64, dtype=torch.float32, seed=2)
    assert torch.equal(invariant_linear(x, weight.t().contiguous().t()), invariant_linear(x, weight))


@pytest.mark.parametrize("dtype", LIMITS)
def test_depth_is_never_split(dtype):
    for num_rows, num_in in ((512, 192), (1024, 3072), (24576, 4096), (4096, 12288), (151936, 4096)):
        assert invariant_plan(num_rows, num_in, dtype).splits == 1


@pytest.mark.skipif(INTERPRETED, reason="numpy's products may sum in another order at another place of a tile")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("num_rows", "num_in"), SHAPES)
def test_row_has_the_same_bits_in_any_batch_at_any_position(num_rows, num_in, dtype):
    x, weight = random(4100, num_in, dtype=dtype, seed=1), random(num_rows, num_in, dtype=dtype, seed=2)
    whole = invariant_linear(x, weight)
    for row in (0, 1, 63, 64, 127, 1000, 4099):
        assert torch.equal(invariant_linear(x[row : row + 1], weight)[0], whole[row])
    for num_tokens in (2, 7, 16, 33, 64, 65, 128, 300, 1024):
        assert torch.equal(invariant_linear(x[:num_tokens], weight), whole[:num_tokens])
        first = 4100 - num_tokens
        assert torch.equal(invariant_linear(x[first:], weight), whole[first:])
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    assert torch.equal(invariant_linear(x[shuffled], weight), whole[shuffled])
