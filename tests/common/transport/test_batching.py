from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.transport.batching import MIN_DIRECT_BYTES, Span, SpanQueue


def drain(spans: SpanQueue) -> list[Span]:
    popped = []
    while spans:
        popped.append(spans.pop())
    return popped


def test_a_lone_slice_goes_as_it_is() -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=100)
    spans.push(3, 7, [4, 9])
    assert drain(spans) == [Span(3, 1, 7, (4, 9))]


def test_consecutive_layers_of_the_same_blocks_share_a_chunk_as_far_as_it_reaches() -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=75)
    for layer in range(5):
        spans.push(layer, 0, [4, 9, 2])
    assert drain(spans) == [Span(0, 2, 0, (4, 9, 2)), Span(2, 2, 0, (4, 9, 2)), Span(4, 1, 0, (4, 9, 2))]


class Layer:
    """Computed or not."""

    def __init__(self, computed: bool) -> None:
        self.computed = computed

    def query(self) -> bool:
        return self.computed

    def wait(self) -> None:
        raise AssertionError("the queue never waits")


def test_layers_that_are_still_computed_keep_nobody_back() -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=100)
    layers = [Layer(True), Layer(True), Layer(False), Layer(False)]
    for number, ready in enumerate(layers):
        spans.push(number, 0, [4, 9], ready)
    assert spans.pop() == Span(0, 2, 0, (4, 9), layers[1])
    assert spans.pop() == Span(2, 1, 0, (4, 9), layers[2])
    layers[3].computed = True
    assert spans.pop() == Span(3, 1, 0, (4, 9), layers[3])


def test_parts_of_one_layer_become_ready_together() -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=40)
    ready = Layer(False)
    spans.push(0, 0, [1, 2, 3, 4, 5], ready)
    assert [span.ready for span in drain(spans)] == [ready, ready]


def test_large_runs_are_merged_too_where_nothing_is_sent_from_the_cache() -> None:
    spans = SpanQueue(block_bytes=MIN_DIRECT_BYTES, max_chunk_bytes=10 * MIN_DIRECT_BYTES, direct=False)
    spans.push(0, 0, [1, 2])
    spans.push(1, 0, [1, 2])
    assert drain(spans) == [Span(0, 2, 0, (1, 2))]


def test_other_blocks_or_a_layer_in_between_start_a_new_chunk() -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=1000)
    for layer, first, ids in ((0, 0, [1]), (1, 0, [1]), (3, 0, [1]), (4, 1, [1]), (5, 1, [2])):
        spans.push(layer, first, ids)
    assert [(span.first_layer, span.num_layers) for span in drain(spans)] == [(0, 2), (3, 1), (4, 1), (5, 1)]


def test_a_slice_larger_than_a_chunk_is_cut_between_blocks() -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=25)
    spans.push(0, 3, [5, 6, 8, 1, 0])
    assert drain(spans) == [Span(0, 1, 3, (5, 6)), Span(0, 1, 5, (8, 1)), Span(0, 1, 7, (0,))]


def test_a_large_run_is_left_alone_so_that_it_needs_no_copy() -> None:
    spans = SpanQueue(block_bytes=MIN_DIRECT_BYTES // 2, max_chunk_bytes=MIN_DIRECT_BYTES * 8)
    for layer in range(2):
        spans.push(layer, 0, [5, 6])
    for layer in range(2, 4):
        spans.push(layer, 0, [6, 5])
    assert [span.num_layers for span in drain(spans)] == [1, 1, 2]


@given(
    slices=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.lists(st.integers(0, 20), min_size=1, max_size=9)),
        max_size=12,
    ),
    max_blocks=st.integers(1, 8),
)
def test_everything_that_goes_in_comes_out_in_order_and_no_chunk_is_too_large(slices, max_blocks) -> None:
    spans = SpanQueue(block_bytes=10, max_chunk_bytes=max_blocks * 10 + 9)
    for layer, first, ids in slices:
        spans.push(layer, first, ids)
    popped = drain(spans)
    assert all(1 <= span.num_layers * len(span.block_ids) <= max_blocks for span in popped)
    went_in = [(layer, first + place, block) for layer, first, ids in slices for place, block in enumerate(ids)]
    came_out = [
        (layer, span.first_block + place, block)
        for span in popped
        for layer in range(span.first_layer, span.first_layer + span.num_layers)
        for place, block in enumerate(span.block_ids)
    ]
    assert came_out == went_in
