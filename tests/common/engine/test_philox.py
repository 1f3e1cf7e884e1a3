import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.engine.philox import WORD, gumbel_noise, gumbel_of_words, philox_4x32
from tests.common.engine import reference_sampler as reference

WORDS = st.integers(0, WORD)


def words(counter, key):
    def tensors(values):
        return tuple(torch.tensor([value]) for value in values)

    return tuple(philox_4x32(tensors(counter), tensors(key))[0].tolist())


def noise(seeds, positions, vocab_size):
    seed_words = torch.tensor([[seed & WORD, seed >> 32] for seed in seeds])
    return gumbel_noise(seed_words, torch.tensor(positions), vocab_size)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_known_answers_of_random123(counter, key, expected):
    assert words(counter, key) == expected
    assert reference.philox_4x32(counter, key) == expected


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_words_are_those_of_the_paper(counter, key):
    assert words(counter, key) == reference.philox_4x32(counter, key)


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 5, 2**32 - 1, 2**32 + 3])
def test_noise_is_keyed_by_seed_position_and_token(seed, position):
    row = noise([seed], [position], 11)[0]
    expected = [reference.gumbel(seed, position, token_id) for token_id in range(11)]
    torch.testing.assert_close(row.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 5, 2048])
def test_noise_of_a_token_does_not_depend_on_the_batch_or_the_vocabulary(vocab_size):
    seeds, positions = [11, 2**40, 3], [5, 6, 2**33]
    together = noise(seeds, positions, 2048)[:, :vocab_size]
    for row in range(3):
        alone = noise(seeds[row : row + 1], positions[row : row + 1], vocab_size)[0]
        assert torch.equal(alone, together[row])


def test_every_word_gives_finite_noise_that_falls_as_the_word_grows():
    edges = torch.tensor([0, 1, 2, 2**23, 2**24, 2**24 + 1, 2**31, WORD - 256, WORD - 128, WORD - 1, WORD])
    values = gumbel_of_words(edges)
    assert values.isfinite().all()
    assert (values.diff() <= 0).all()
    assert values[0] < 22.88
    assert values[-1] > -2.82


def test_noise_follows_the_gumbel_distribution():
    values = noise(range(50), range(1000, 1050), 2048).flatten().double().numpy()
    assert stats.kstest(values, stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("lane", range(4))
def test_words_of_each_lane_fill_all_values_evenly(lane):
    blocks, positions = torch.arange(512)[None], torch.arange(64)[:, None]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    values = philox_4x32((blocks, zero, positions, zero), (zero + 1, zero))[..., lane].flatten().numpy()
    for shift in (0, 24):
        counts = np.bincount((values >> shift) & 0xFF, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("neighbour", ["token", "position", "seed", "high seed word"])
def test_neighbouring_noise_is_uncorrelated(neighbour):
    num = 20_000
    seeds, positions, vocab_size = {
        "token": ([1], [9], num),
        "position": ([1] * num, list(range(num)), 1),
        "seed": (list(range(num)), [9] * num, 1),
        "high seed word": ([seed << 32 for seed in range(num)], [9] * num, 1),
    }[neighbour]
    values = noise(seeds, positions, vocab_size).flatten().double().numpy()
    for lag in (1, 2, 3, 4, 8):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert abs(correlation) < 4 / num**0.5
