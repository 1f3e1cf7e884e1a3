"""Every Prometheus metric of the three services, declared once. `docs/metrics.md` is this file as a table.

Each service makes one instance, with a registry of its own, and changes the metrics directly, as in
`metrics.aborts.labels(cause="DEADLINE_EXCEEDED").inc()`. A gauge that mirrors a value kept elsewhere uses
`set_function`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from common.address import Address
from common.pipeline_metrics import PipelineCollector

WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2)
COUNT = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """A registry, and how its metrics are named: pdserve_<group>_<name>. Counters get `_total` appended."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

    def _declaring(self, group: str) -> _Declaring:
        return _Declaring(self.registry, f"pdserve_{group}_")


class _Declaring:
    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        self._registry = registry
        self._prefix = prefix

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(self._prefix + name, help, labels, registry=self._registry)

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        return Gauge(self._prefix + name, help, labels, registry=self._registry)

    def histogram(self, name: str, help: str, *labels: str, buckets: tuple[float, ...] = WAIT_S) -> Histogram:
        return Histogram(self._prefix + name, help, labels, buckets=buckets, registry=self._registry)


class RouterMetrics(Metrics):
    """What users feel, and what the router sees of its workers."""

    def __init__(self) -> None:
        super().__init__()
        new = self._declaring("router")
        self.requests = new.counter("requests", "Finished requests, by gRPC status.", "code")
        self.good_requests = new.counter("good_requests", "Completions within both limits of goodput (settings).")
        self.http_replies = new.counter(
            "http_replies", "Replies over HTTP, whatever was asked, by status; 499: the caller left before.", "status"
        )
        self.completions = new.counter("completions", "Completions, by the way their KV came.", "kv_path")
        self.retries = new.counter("retries", "Attempts given up and begun again, by cause.", "cause")
        self.resumptions = new.counter("resumptions", "Streams that went on on another worker, by cause.", "cause")
        self.prompt_tokens = new.counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.output_tokens = new.counter("output_tokens", "Tokens put out.")
        self.running_requests = new.gauge("running_requests", "Requests placed on workers.")
        self.replacing_requests = new.gauge(
            "replacing_requests", "Requests that lost their decode worker and wait for one to go on at."
        )
        self.queue_requests = new.gauge("queue_requests", "Requests waiting to be placed.")
        self.queue_tokens = new.gauge("queue_tokens", "Prompt tokens waiting to be placed.")
        self.queue_clients = new.gauge("queue_clients", "Clients whose requests wait to be placed.")
        self.turned_away = new.counter(
            "turned_away", "Requests that the queue refused or gave up, by reason.", "reason"
        )
        self.workers = new.gauge("workers", "Workers as this router sees them.", "role", "state")
        self.degraded = new.gauge("degraded", "1 while no prefill worker is alive: decode workers prefill locally.")
        self.prefill_ways = new.counter(
            "prefill_ways",
            "Prompts given to prefill (remote) or decode workers (local) to compute: degraded, or by choice.",
            "way",
            "reason",
        )
        self.local_crossover_tokens = new.gauge(
            "local_crossover_tokens", "Uncached prompts shorter than this are computed by decode, at the latest load."
        )
        self.queue_s = new.histogram("queue_seconds", "Received until placed.")
        self.held_requests = new.gauge("held_requests", "Of the queue, those held back by pressure on decode alone.")
        self.held_s = new.histogram("held_seconds", "For how long each request that was held back was.")
        self.first_token_s = new.histogram("time_to_first_token_seconds", "Received until the first token was sent.")
        self.inter_token_s = new.histogram("inter_token_seconds", "From token to token of a stream.", buckets=STEP_S)
        self.request_s = new.histogram("request_seconds", "Received until the stream ended.")
        self.stage_s = new.histogram("stage_seconds", "A request's queue, prefill, kv_transfer, first_decode.", "stage")


class WorkerMetrics(Metrics):
    """What both kinds of worker do."""

    def __init__(self) -> None:
        super().__init__()
        new = self._declaring("worker")
        self.info = new.gauge(
            "info", "1; to be joined on the target, for who it is.", "role", "worker", "model_fingerprint"
        )
        self.requests = new.counter("requests", "Finished requests, by gRPC status.", "code")
        self.aborts = new.counter("aborts", "Requests ended before their time, by cause.", "cause")
        self.prefix_hit_tokens = new.counter("prefix_cache_hit_tokens", "Prompt tokens whose KV was cached.")
        self.prefix_miss_tokens = new.counter("prefix_cache_miss_tokens", "Prompt tokens whose KV was not cached.")
        self.computed_tokens = new.counter("computed_prompt_tokens", "Prompt tokens computed here.")
        self.output_tokens = new.counter("output_tokens", "Tokens drawn here.")
        self.running = new.gauge("running_sequences", "Sequences being computed.")
        self.waiting = new.gauge("waiting_requests", "Requests waiting for room.")
        self.free_blocks = new.gauge("free_blocks", "KV blocks free, those with a reusable prefix included.")
        self.cached_blocks = new.gauge("cached_blocks", "Free KV blocks that hold a reusable prefix.")
        self.total_blocks = new.gauge("total_blocks", "KV blocks in all.")
        self.pairs = new.gauge("pairs", "Live prefill/decode pairs.")
        self.watchers = new.gauge("watchers", "Routers that watch this worker; the others send it nothing.")
        self.plain_kernels = new.gauge("plain_kernels", "1 while a GPU computes with PyTorch's own, slow kernels.")
        self.kv_bytes = new.counter("kv_bytes", "KV payload shipped (prefill) or received (decode).", "transport")
        self.queue_s = new.histogram("queue_seconds", "Received until scheduled (prefill) or reserved (decode).")
        self.step_s = new.histogram("step_seconds", "One step of the engine.", buckets=STEP_S)
        self.batch_size = new.histogram("batch_size", "Sequences in one step.", buckets=COUNT)


class PrefillMetrics(WorkerMetrics):
    """What a prefill worker does."""

    def __init__(self) -> None:
        super().__init__()
        new = self._declaring("prefill")
        self.compute_s = new.histogram("compute_seconds", "First chunk scheduled until the first token was known.")
        self.handover_s = new.histogram("handover_seconds", "First token known until the last acknowledgement.")


class DecodeMetrics(WorkerMetrics):
    """What a decode worker does."""

    def __init__(self) -> None:
        super().__init__()
        new = self._declaring("decode")
        self.reservations = new.gauge("reservations", "Reservations promised and not committed.")
        self.attempts_fenced = new.counter("attempts_fenced", "Attempts cut off by a newer one or by the stream's end.")
        self.kv_chunks = new.counter("kv_chunks", "KV chunks that arrived whole: OK, FENCED or INVALID.", "status")
        self.attempts_lost = new.counter("attempts_lost", "Attempts whose pair ended before all of their KV had come.")
        self.pairs_ended = new.counter("pairs_ended", "Pairs that have ended, for whatever reason.")
        self.preemptions = new.counter("preemptions", "Running sequences whose blocks went to older ones.")
        self.local_prefills = new.counter("local_prefills", "Prompts computed here, not by a prefill worker.")
        self.first_step_s = new.histogram("first_step_seconds", "KV committed until the second token was known.")
        self.pressure = new.gauge("pressure", "1 while this is why routers hold new prompts back.", "reason")
        self.pressure_s = new.counter("pressure_seconds", "Time for which that was so.", "reason")
        self.pipeline = PipelineCollector()
        self.registry.register(self.pipeline)


def totals(counter: Counter) -> dict[tuple[str, ...], int]:
    """How far a counter of whole things has come, by the values of its labels; by () when it has none."""
    [family] = counter.collect()
    counted = [sample for sample in family.samples if sample.name.endswith("_total")]
    return {tuple(sample.labels.values()): int(sample.value) for sample in counted}


@contextlib.contextmanager
def exposed(metrics: Metrics, address: str) -> Iterator[None]:
    """Serves `metrics` over HTTP on HOST:PORT meanwhile; nowhere when `address` is empty.

    Raises OSError naming the address when it cannot listen there.
    """
    if not address:
        yield
        return
    where = Address.parse(address)
    where.check_free()
    server, thread = start_http_server(where.port, where.host, registry=metrics.registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
