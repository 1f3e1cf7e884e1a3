"""Whatever joins, leaves, stops, is preempted or grows, and however late tokens come: no row sees another's KV."""

import random

import pytest
import torch

pytest.importorskip("triton")

from common.errors import PdserveError
from decode_service.events import Completed, Lost, Token
from tests.support.imitation import NUM_TOKENS, ImitatedEngine, token_at
from tests.support.models import make_request

BLOCK, CONTEXT = 4, 40


def random_sequence(draw, opening, num_blocks):
    length = draw.randrange(1, draw.choice([8, min(CONTEXT, (num_blocks - 1) * BLOCK)]))
    alike = opening[: draw.randrange(length + 1)]
    token_ids = (alike + [draw.randrange(NUM_TOKENS) for _ in range(length)])[:length]
    max_tokens = max(1, min(draw.randrange(1, 30), num_blocks * BLOCK - length))
    sequence = make_request(
        token_ids,
        max_tokens=max_tokens,
        seed=draw.randrange(2**64),
        temperature=1.0,
        min_tokens=draw.choice([0, 0, 0, min(2, max_tokens)]),
        presence_penalty=draw.choice([0.0, 0.0, 0.5]),
    )
    stops = (
        token_at(sequence.request.sampling.seed, length + draw.randrange(25)) for _ in range(draw.choice([0, 1, 9]))
    )
    sequence.stop_token_ids = frozenset(stops)
    return sequence


def expected_tokens(sequence, context_length):
    stopping, length = sequence.request.stopping, sequence.request.num_prompt_tokens
    tokens = []
    while True:
        tokens.append(token_at(sequence.request.sampling.seed, length + len(tokens)))
        if tokens[-1] in sequence.stop_token_ids and len(tokens) >= max(stopping.min_tokens, 1):
            return tokens
        if len(tokens) >= stopping.max_tokens or length + len(tokens) >= context_length:
            return tokens


@pytest.mark.promise(11)
@pytest.mark.parametrize("trial", range(6))
def test_no_sequence_ever_sees_or_loses_a_position(trial, monkeypatch):
    draw = random.Random(trial)
    num_blocks = draw.choice([8, 12, 40, 60])
    engine = ImitatedEngine(
        monkeypatch,
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_seqs=draw.choice([2, 5, 12]),
        max_batch_tokens=draw.choice([8, 64]),
        context_length=CONTEXT,
    )
    opening = [draw.randrange(NUM_TOKENS) for _ in range(CONTEXT)]
    live, answered, num_made, num_completed = [], {}, 0, 0
    with torch.inference_mode():
        while num_completed < 30:
            chance = draw.random()
            if chance < 0.4 and len(live) < 20:
                live.append(random_sequence(draw, opening, num_blocks))
                answered[live[-1]] = 0
                engine.open(live[-1], local=True)
                num_made += 1
            elif chance < 0.5 and live:
                for _ in range(draw.randrange(1, min(4, 1 + len(live)))):
                    engine.close(live.pop(draw.randrange(len(live))))
            elif chance < 0.53 and live:
                # Given up at any moment, which changes nothing once it runs.
                if reservation := engine._reservation_of.get(draw.choice(live)):
                    engine.retry(reservation.sequence, reservation.attempt, local=True)
            elif chance < 0.8:
                kinds = [steps for steps in (engine.kept.decodes, engine.kept.prefills) if steps]
                engine.land(draw.choice(kinds) if kinds else None)
            if draw.random() < 0.8:
                engine.turn()
            engine.check()
            for sequence in list(live):
                happened = engine.happened.get(sequence, [])
                lost = [event for event in happened if isinstance(event, Lost)]
                if len(lost) > answered[sequence] and draw.random() < 0.5:
                    answered[sequence] = len(lost)
                    engine.retry(sequence, lost[-1].attempt, local=True)
                if happened and isinstance(happened[-1], Completed | PdserveError):
                    assert isinstance(happened[-1], Completed)
                    tokens = [event.token_id for event in happened if isinstance(event, Token)]
                    assert tokens == expected_tokens(sequence, engine.scheduler.context_length)
                    live.remove(sequence)
                    num_completed += 1
            assert num_made < 1000
