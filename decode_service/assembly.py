"""Puts a decode engine together from a worker's parts, and prepares it for serving."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from common.clock import Clock, monotonic
from common.config import DecodeConfig
from common.engine.buckets import batch_buckets
from common.engine.preparation import capturing, prepare_prefill, preparing
from common.engine.setup import WorkerParts
from common.load import Load
from common.metrics import DecodeMetrics
from decode_service.engine import DecodeEngine
from decode_service.events import OnEvents
from decode_service.pipeline.calibrating import calibrate, cells_to_measure
from decode_service.pipeline.calibration import Calibration
from decode_service.pipeline.calibration_file import CalibrationKey, default_folder, load, save
from decode_service.pipeline.decisions import Mode
from decode_service.pipeline.order import Cut
from decode_service.pipeline.scheduler import Ask, PipelineScheduler
from decode_service.pipeline.stage_measuring import StageMeasuring
from decode_service.pipeline.step_runner import StepRunner
from decode_service.runner import DecodeRunner, HostRunner
from decode_service.scheduler import DecodeScheduler
from decode_service.sm.green_manager import GreenManager

log = logging.getLogger(__name__)

# Counts up with whatever changes what stages take: kernels, cuts.
CALIBRATED_CODE = 4


def make_engine(
    config: DecodeConfig,
    parts: WorkerParts,
    *,
    metrics: DecodeMetrics,
    on_events: OnEvents,
    on_load: Callable[[Load], None],
    on_crash: Callable[[BaseException], None],
    clock: Clock = monotonic,
) -> DecodeEngine:
    """The engine of one worker, not started yet."""
    pipeline = make_pipeline(config, parts, GreenManager.of(parts.device))
    scheduler = DecodeScheduler(
        parts.pool,
        parts.prefix,
        max_num_seqs=config.max_num_seqs,
        max_batch_tokens=config.max_batch_tokens,
        max_waiting=config.max_waiting_requests,
        reservation_wait_s=config.reservation_wait_s,
        context_length=parts.identity.context_length,
        clock=clock,
    )
    return DecodeEngine(
        scheduler,
        parts.prefiller,
        pipeline,
        make_runner(config, parts, pipeline),
        parts.cache,
        config=parts.model.config,
        stream_interval_s=config.stream_interval_ms / 1e3,
        stream_messages_per_s=config.stream_messages_per_s,
        clock=clock,
        metrics=metrics,
        on_events=on_events,
        on_load=on_load,
        on_crash=on_crash,
    )


def make_pipeline(config: DecodeConfig, parts: WorkerParts, partitions: GreenManager) -> PipelineScheduler:
    """How steps are computed, with what `partitions` can give."""
    has_plain_kernels = parts.device.type == "cuda" and not parts.model.operations.replayable
    buckets = batch_buckets(config.max_num_seqs)
    key = calibration_key(parts, partitions)
    folder = Path(config.decode_pipeline_folder).expanduser() if config.decode_pipeline_folder else default_folder()
    calibration = load(key, folder) if partitions.splits else None
    cells = cells_to_measure(buckets, parts.identity.context_length, parts.cache.num_blocks * parts.cache.block_size)

    def keep(measured: Calibration) -> None:
        try:
            log.info("the pipeline is calibrated; kept in %s", save(measured, key, folder))
        except OSError as error:
            log.warning("the pipeline's calibration cannot be kept, the next start makes it again: %s", error)

    return PipelineScheduler(
        StepRunner(
            parts.model, parts.cache, partitions, max_graph_bytes=int(config.decode_pipeline_graphs_gib * 2**30)
        ),
        partitions,
        Ask(
            Mode(config.decode_pipeline),
            Cut(config.decode_pipeline_cut),
            config.decode_attention_sm,
            config.decode_ffn_sm,
        ),
        num_layers=parts.model.config.num_layers,
        batch_buckets=buckets,
        profiling=config.decode_pipeline_profiling,
        obstacle="PLAIN_KERNELS" if has_plain_kernels else "",
        calibration=calibration,
        calibrating=calibrate(StageMeasuring(parts.model, parts.cache), partitions, cells)
        if cells and not calibration
        else None,
        on_calibrated=keep,
    )


def calibration_key(parts: WorkerParts, partitions: GreenManager) -> CalibrationKey:
    """What stage times hold for."""
    is_cuda = parts.device.type == "cuda"
    return CalibrationKey(
        gpu_name=torch.cuda.get_device_name(parts.device) if is_cuda else "",
        num_sm=partitions.num_sms,
        driver=partitions.driver_version,
        model=f"{parts.identity.model_fingerprint} {parts.model.dtype} {parts.model.operations.name}",
        code=f"{CALIBRATED_CODE}, torch {torch.__version__}",
    )


def prepare(config: DecodeConfig, parts: WorkerParts, engine: DecodeEngine) -> None:
    """Compiles, allocates and captures what serving needs, before the engine starts. Takes seconds."""
    with preparing(parts.device):
        prepare_prefill(config, parts)
        if parts.device.type == "cuda" and parts.model.operations.replayable:
            from decode_service.device_runner import DeviceRunner

            assert isinstance(engine.runner, DeviceRunner)
            if config.enforce_eager:
                engine.runner.warm_up()
                return
            with capturing("decode", parts.device) as progress:
                engine.runner.capture(progress)


def make_runner(config: DecodeConfig, parts: WorkerParts, pipeline: PipelineScheduler) -> DecodeRunner:
    """What runs the steps on this device."""
    max_num_seqs, vocab_size = config.max_num_seqs, parts.model.config.vocab_size
    if not parts.model.operations.replayable:
        return HostRunner(pipeline, parts.cache, max_num_seqs=max_num_seqs, vocab_size=vocab_size)
    # Its kernels need Triton, which a machine without a GPU need not have.
    from decode_service.device_runner import DeviceRunner

    return DeviceRunner(
        pipeline,
        parts.cache,
        max_num_seqs=max_num_seqs,
        vocab_size=vocab_size,
        context_length=parts.identity.context_length,
    )
