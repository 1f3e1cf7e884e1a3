"""In which order workers are shown."""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.top.cluster import WorkerRow

ORDERS = ("name", "busy", "tokens", "blocks")


def in_order(rows: Iterable[WorkerRow], order: str) -> list[WorkerRow]:
    """By name; or first those that have most sequences, most tokens a second, or the largest share of blocks in use."""
    by_name = sorted(rows, key=lambda row: (row.worker.instance_id, row.worker.address))
    if order == "busy":
        return sorted(by_name, key=lambda row: -(row.worker.num_running + row.worker.num_waiting))
    if order == "tokens":
        return sorted(by_name, key=lambda row: -(row.role_per_s or 0.0))
    if order == "blocks":
        return sorted(by_name, key=lambda row: -used_share(row))
    assert order == "name", order
    return by_name


def used_share(row: WorkerRow) -> float:
    """Of its blocks, 0 to 1: held by sequences."""
    total = row.worker.num_total_blocks
    return (total - row.worker.num_free_blocks) / total if total else 0.0


def next_order(order: str) -> str:
    return ORDERS[(ORDERS.index(order) + 1) % len(ORDERS)]
