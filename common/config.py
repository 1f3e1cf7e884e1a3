"""Every setting of the three services, one frozen dataclass each. Every default works on one machine.

`load(RouterConfig, argv)` reads a TOML file and flags (`common.settings` says how). Constructing one checks it too.
"""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from common.address import Address
from common.settings import ConfigError, load, setting, validate

__all__ = ["ConfigError", "DecodeConfig", "PrefillConfig", "RouterConfig", "ServiceConfig", "WorkerConfig", "load"]

TINY_MODEL = str(Path(__file__).resolve().parent.parent / "models" / "tiny")
# Ways of KV from one worker to another, best first; `common.transport.transports` describes them.
KV_TRANSPORTS = ("cuda-ipc", "nccl", "gloo")
MAX_STAGING_CHUNKS = 1024
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What all services have."""

    role: ClassVar[str]

    listen: str = setting("127.0.0.1:0", "where gRPC listens; port 0 takes any free one", form="listen")
    metrics_listen: str = setting(
        "", "where Prometheus metrics are served over HTTP; empty: nowhere", form="listen or empty"
    )
    health_listen: str = setting(
        "", "where health alone is served as well, for probes; empty: nowhere", form="listen or empty"
    )
    tls_certificate: str = setting(
        "", "PEM file of the certificate (and its chain) that this process shows; empty: gRPC is plaintext"
    )
    tls_key: str = setting("", "PEM file of the certificate's key, without a password")
    tls_ca: str = setting("", "PEM file of the authorities whose certificates are believed")
    tls_client_certificates: bool = setting(
        True, "with TLS: only who shows a certificate of tls_ca gets through (mTLS)"
    )
    tls_server_name: str = setting(
        "", "name that the certificates of those that are dialled are made out to; empty: the host that is dialled"
    )
    identities: str = setting(
        "", "TOML file of who may call what, by token or certificate; empty: whoever reaches the port may call it"
    )
    instance_id: str = setting(
        "", "stable name of this instance, unique in the cluster; empty: role-hostname-port of `listen`"
    )
    log_level: str = setting("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", "form of a log line, on stderr", choices=("text", "json"))
    trace_endpoint: str = setting(
        "",
        "URL of an OpenTelemetry collector, such as http://127.0.0.1:4317, that traces are sent to; empty: no traces",
    )
    trace_protocol: str = setting(
        "grpc",
        "form of OTLP that the collector takes there; usually grpc at port 4317 and http at 4318",
        choices=("grpc", "http"),
    )
    trace_sample_ratio: float = setting(
        1.0, "share of requests that are traced, of those whose client does not say", minimum=0, maximum=1
    )

    def __post_init__(self) -> None:
        validate(self)
        self._check_tls()
        self._check_trace_endpoint()
        if not self.instance_id:
            name = f"{self.role}-{socket.gethostname()}-{Address.parse(self.listen).port}"
            object.__setattr__(self, "instance_id", name)

    def _check_tls(self) -> None:
        """All of it or none: half of it would leave some channel in plaintext that nobody thought of."""
        files = {name: getattr(self, name) for name in ("tls_certificate", "tls_key", "tls_ca")}
        given = [name for name, path in files.items() if path]
        missing = [name for name, path in files.items() if not path]
        if given and missing:
            raise ConfigError(
                f"{missing[0]}: expected a PEM file, since {given[0]} is set; TLS needs all of {', '.join(files)}"
            )
        if self.tls_server_name and not given:
            raise ConfigError("tls_server_name: expected to be empty without TLS; set tls_certificate, tls_key, tls_ca")

    def _check_trace_endpoint(self) -> None:
        try:
            url = urlsplit(self.trace_endpoint)
            is_url = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            is_url = False
        if self.trace_endpoint and not is_url:
            raise ConfigError(
                f"trace_endpoint={self.trace_endpoint!r}: expected a URL such as http://127.0.0.1:4317, or https://…"
            )


@dataclass(frozen=True, kw_only=True)
class RouterConfig(ServiceConfig):
    """The router: takes prompts, places them on workers, streams text back."""

    role = "router"

    listen: str = setting("127.0.0.1:50051", "where gRPC listens; port 0 takes any free one", form="listen")
    metrics_listen: str = setting(
        "127.0.0.1:9101", "where Prometheus metrics are served over HTTP; empty: nowhere", form="listen or empty"
    )
    http_listen: str = setting(
        "", "where the OpenAI API is served over HTTP, with the extra `http`; empty: nowhere", form="listen or empty"
    )
    tls_client_certificates: bool = setting(
        False, "with TLS: only who shows a certificate of tls_ca gets through (mTLS)"
    )
    reuse_port: bool = setting(
        False, "several routers of one machine share `listen` and `http_listen`; give each its own instance_id"
    )
    max_connection_age_s: float = setting(
        0.0,
        "age, in seconds, give or take a tenth, at which a connection takes no new request, so that its client makes "
        "another; what runs on it goes on; 0: no limit",
        minimum=0,
    )
    model: str = setting(TINY_MODEL, "folder with the tokenizer (and the chat template) of the served model")
    model_id: str = setting("", "what GetModel answers and requests may ask for; empty: the folder's name")
    prefill: tuple[str, ...] = setting(
        ("127.0.0.1:50052",), "prefill workers; a name may lead to any number of them", form="target"
    )
    decode: tuple[str, ...] = setting(
        ("127.0.0.1:50053",), "decode workers; a name may lead to any number of them", form="target"
    )
    resolve_s: float = setting(5.0, "how often names of workers are looked up again, in seconds", above=0)
    min_watched: int = setting(
        64,
        "workers of one role up to which a router watches all; of more, as many as give each worker 12 to 24 routers",
        minimum=1,
    )
    local_prefill: str = setting(
        "auto",
        "prompts that decode computes itself while prefill workers are alive; auto: those for which all users together "
        "wait less, as measured",
        choices=("auto", "never", "always"),
    )
    max_request_s: float = setting(600.0, "deadline of a request whose client sets none, in seconds", above=0)
    max_queue_requests: int = setting(1024, "requests that may queue; one more is RESOURCE_EXHAUSTED", minimum=1)
    max_queue_tokens: int = setting(1_000_000, "prompt tokens that may queue; more is RESOURCE_EXHAUSTED", minimum=1)
    max_requests_per_client: int = setting(512, "requests that one client host may have in flight", minimum=1)
    max_prompt_tokens: int = setting(0, "longest prompt, in tokens; 0: what the model's context allows", minimum=0)
    heartbeat_timeout_s: float = setting(2.0, "silence, in seconds, after which a worker is UNREACHABLE", above=0.5)
    replace_wait_s: float = setting(
        30.0,
        "how long a request that lost its decode worker, or waits in the queue, waits for a worker while none takes "
        "new work, in seconds",
        minimum=0,
    )
    drain_s: float = setting(120.0, "how long a drain waits for running requests, in seconds", minimum=0)
    startup_grace_s: float = setting(
        10.0, "how long a starting router waits to meet every worker before it is ready without some", minimum=0
    )
    access_log: bool = setting(True, "one line for each finished request")
    goodput_first_token_ms: float = setting(
        1000.0, "latest first token, in ms, of a request that counts as goodput in the metrics", above=0
    )
    goodput_inter_token_ms: float = setting(
        100.0, "largest mean time from token to token, in ms, of a request that counts as goodput", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_id:
            object.__setattr__(self, "model_id", Path(self.model).resolve().name)


@dataclass(frozen=True, kw_only=True)
class WorkerConfig(ServiceConfig):
    """What both kinds of worker have."""

    model: str = setting(TINY_MODEL, "Hugging Face folder of the model")
    load_format: str = setting(
        "auto", "auto: weights from the folder; dummy: seeded random weights", choices=("auto", "dummy")
    )
    seed: int = setting(0, "seed of dummy weights; equal on every worker", minimum=0)
    device: str = setting("auto", "cpu, cuda or cuda:N; auto: cuda:0 where there is one, else cpu")
    dtype: str = setting(
        "auto",
        "of weights and KV; auto: the model's own on cuda, float32 on cpu",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    deterministic: bool = setting(False, "on cuda: kernels whose results do not depend on the batch")
    enforce_eager: bool = setting(False, "on cuda: no CUDA graphs")
    num_threads: int = setting(
        0, "torch threads; 0: half of the cores, since prefill and decode share them on one machine", minimum=0
    )

    block_size: int = setting(16, "token positions in one KV block; equal on every worker", minimum=1, maximum=256)
    num_blocks: int = setting(0, "KV blocks; 0: as many as fit kv_cache_gib or gpu_memory_fraction", minimum=0)
    kv_cache_gib: float = setting(1.0, "on cpu: memory for KV blocks in GiB, when num_blocks is 0", above=0)
    gpu_memory_fraction: float = setting(
        0.45,
        "on cuda: share of the device's memory for all of this worker; two workers fit on one device",
        above=0,
        maximum=1,
    )
    prefix_cache: bool = setting(True, "keep the blocks of finished sequences for prompts that begin alike")

    max_batch_tokens: int = setting(2048, "prompt tokens computed in one step, over all prompts", minimum=1)
    max_num_seqs: int = setting(64, "sequences in one step", minimum=1)
    max_waiting_requests: int = setting(1024, "requests that may wait; one more is RESOURCE_EXHAUSTED", minimum=1)

    kv_interface: str = setting("127.0.0.1", "address or host name of the one interface that KV transfer binds")
    kv_transports: tuple[str, ...] = setting(
        KV_TRANSPORTS,
        "ways that KV may take between workers; a pair takes the first of prefill's that works between the two",
        choices=KV_TRANSPORTS,
    )
    max_chunk_bytes: int = setting(
        0,
        "largest KV payload shipped at once, in bytes, at least 4096; 0: 4 MiB over gloo, which never takes more, and "
        "16 MiB over the others",
        minimum=0,
        maximum=256 * 2**20,
    )
    staging_chunks: int = setting(8, "chunks that one pair may have under way", minimum=1, maximum=MAX_STAGING_CHUNKS)
    max_pairs: int = setting(
        64,
        "workers of the other role that this one is paired with; one more ends the pair that has been idle for "
        "longest, or is refused while all are in use",
        minimum=1,
    )

    drain_s: float = setting(30.0, "how long a drain waits for running requests, in seconds", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device={self.device!r}: expected auto, cpu, cuda or cuda:N")
        if 0 < self.max_chunk_bytes < 4096:
            raise ConfigError(f"max_chunk_bytes={self.max_chunk_bytes}: expected 0 or at least 4096")
        if not self.block_size <= self.max_batch_tokens:
            raise ConfigError(
                f"max_batch_tokens={self.max_batch_tokens}: expected at least block_size={self.block_size}"
            )


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(WorkerConfig):
    """The prefill worker: computes prompts and ships their KV."""

    role = "prefill"

    listen: str = setting("127.0.0.1:50052", "where gRPC listens; port 0 takes any free one", form="listen")
    metrics_listen: str = setting(
        "127.0.0.1:9102", "where Prometheus metrics are served over HTTP; empty: nowhere", form="listen or empty"
    )
    pair_connect_s: float = setting(5.0, "how long connecting to a decode worker may take, in seconds", above=0)
    pair_idle_s: float = setting(300.0, "a pair without work for this many seconds is closed", above=0)


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(WorkerConfig):
    """The decode worker: holds reservations, receives KV, puts out tokens."""

    role = "decode"

    listen: str = setting("127.0.0.1:50053", "where gRPC listens; port 0 takes any free one", form="listen")
    metrics_listen: str = setting(
        "127.0.0.1:9103", "where Prometheus metrics are served over HTTP; empty: nowhere", form="listen or empty"
    )
    pair_endpoint: str = setting(
        "", "address that prefill workers dial; empty: the one that the router dialled", form="target or empty"
    )
    max_num_seqs: int = setting(256, "sequences in one step", minimum=1)
    max_batch_tokens: int = setting(512, "prompt tokens of local prefill in one step", minimum=1)
    stream_interval_ms: float = setting(
        10.0, "tokens of running streams are sent at most this often, in ms; 0: after every step", minimum=0
    )
    stream_messages_per_s: float = setting(
        5000.0, "and in at most so many messages a second: with more streams, tokens gather for longer", above=0
    )
    reservation_wait_s: float = setting(30.0, "how long a reservation waits for blocks, in seconds", above=0)

    pressure_enter_waiting: int = setting(
        4,
        "so many reservations waiting for blocks put this worker under pressure, and routers hold new prompts back; "
        "0: no limit",
        minimum=0,
    )
    pressure_leave_waiting: int = setting(0, "so few waiting reservations end the pressure", minimum=0)
    pressure_enter_free_share: float = setting(
        0.05, "free share of the KV blocks below which there is pressure; 0: no limit", minimum=0, maximum=1
    )
    pressure_leave_free_share: float = setting(
        0.1, "free share of the KV blocks from which on it ends", minimum=0, maximum=1
    )
    pressure_enter_step_ms: float = setting(
        0.0, "mean step time, in ms, above which there is pressure; 0: no limit", minimum=0
    )
    pressure_leave_step_ms: float = setting(
        0.0, "mean step time, in ms, down to which it ends; 0: four fifths of pressure_enter_step_ms", minimum=0
    )
    pressure_min_ms: float = setting(100.0, "least time under pressure, in ms, of a worker that has work", minimum=0)

    decode_pipeline: str = setting(
        "auto",
        "attention/FFN pipeline on SM partitions; auto: where it measures faster; static: the split below",
        choices=("auto", "static", "disabled"),
    )
    decode_pipeline_cut: str = setting(
        "layer",
        "what attention's side computes when static: all of a layer but its FFN, or attention proper",
        choices=("layer", "attention-core"),
    )
    decode_attention_sm: int = setting(16, "SMs for attention when static", minimum=1)
    decode_ffn_sm: int = setting(16, "SMs for the FFN when static", minimum=1)
    decode_pipeline_profiling: bool = setting(False, "time the stages of one step in 32")
    decode_pipeline_folder: str = setting(
        "", "where auto keeps what it measured of stages; empty: pdserve in XDG_CACHE_HOME or ~/.cache"
    )
    decode_pipeline_graphs_gib: float = setting(
        1.0, "on cuda: memory for CUDA graphs of pipelined steps, of what the KV cache leaves free", minimum=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pressure_leave_step_ms:
            object.__setattr__(self, "pressure_leave_step_ms", 0.8 * self.pressure_enter_step_ms)
        if self.pressure_leave_waiting >= self.pressure_enter_waiting > 0:
            raise ConfigError(
                f"pressure_leave_waiting={self.pressure_leave_waiting}: expected less than "
                f"pressure_enter_waiting={self.pressure_enter_waiting}"
            )
        if self.pressure_leave_free_share < self.pressure_enter_free_share:
            raise ConfigError(
                f"pressure_leave_free_share={self.pressure_leave_free_share}: expected at least "
                f"pressure_enter_free_share={self.pressure_enter_free_share}"
            )
        if self.pressure_leave_step_ms > self.pressure_enter_step_ms:
            raise ConfigError(
                f"pressure_leave_step_ms={self.pressure_leave_step_ms}: expected at most "
                f"pressure_enter_step_ms={self.pressure_enter_step_ms}"
            )
