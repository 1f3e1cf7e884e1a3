"""The sampler as its documentation reads, in plain Python and float64: one row, no tensors, no cleverness."""

import itertools
import math
from collections import Counter

from common.params import SamplingParams


def philox_4x32(counter, key):
    """Ten rounds on Python integers, as the paper writes them."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def gumbel(seed, position, token_id):
    counter = (token_id // 4, 0, position & 0xFFFFFFFF, position >> 32)
    word = philox_4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[token_id % 4]
    v = min((word + 0.5) / 2**32, 1 - 2**-24)
    return -math.log(-math.log1p(-v))


def edited(logits, params: SamplingParams, prompt_ids=(), output_ids=(), forbidden=()):
    """Logits after penalties, bias and the stop tokens that may not come yet."""
    counts = Counter(output_ids)
    seen = set(prompt_ids) | set(output_ids)
    result = []
    for token_id, x in enumerate(logits):
        if token_id in seen:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        x -= params.presence_penalty * (counts[token_id] > 0)
        x -= params.frequency_penalty * counts[token_id]
        x += params.logit_bias.get(token_id, 0.0)
        result.append(-math.inf if token_id in forbidden else x)
    return result


def kept(z, params: SamplingParams):
    """Token ids that top-k, top-p and min-p leave, the most probable first. `z` is less its maximum."""
    order = sorted(range(len(z)), key=lambda token_id: (-z[token_id], token_id))
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        weights = [math.exp(z[token_id]) for token_id in order]
        share = params.top_p * math.fsum(weights)
        before = itertools.accumulate(weights, initial=0.0)
        order = [token_id for token_id, weight in zip(order, before, strict=False) if weight < share]
    return [token_id for token_id in order if math.exp(z[token_id]) >= params.min_p]


def scaled(logits, params: SamplingParams):
    best = max(logits)
    return [(x - best) / params.temperature for x in logits]


def distribution(logits, params: SamplingParams):
    """The probability of each token, given its edited logits."""
    z = scaled(logits, params)
    tokens = kept(z, params)
    total = math.fsum(math.exp(z[token_id]) for token_id in tokens)
    return [math.exp(z[token_id]) / total if token_id in tokens else 0.0 for token_id in range(len(z))]


def draw(logits, params: SamplingParams, position):
    """The token drawn at `position`, given its edited logits."""
    if params.temperature == 0:
        return logits.index(max(logits))
    z = scaled(logits, params)
    return max(kept(z, params), key=lambda token_id: z[token_id] + gumbel(params.seed, position, token_id))
