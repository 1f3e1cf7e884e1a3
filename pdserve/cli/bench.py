"""`pdserve bench`: load on routers, and what it comes to as a table, JSON and a PNG."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import uuid
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from common.settings import ConfigError
from pdserve.bench import comparison, picture, report, tables
from pdserve.bench.figures import figures, ttft_ms
from pdserve.bench.fleet import Fleet, Ran
from pdserve.bench.job import Job
from pdserve.bench.job import Progress as Sending
from pdserve.bench.load import Share
from pdserve.cli.arguments import access_of
from pdserve.cli.bench_arguments import add_arguments, limits_of, points_of, settings_of, workload_of
from pdserve.cli.failures import one_line
from pdserve.cli.terminal import console
from pdserve.client import AsyncClient

__all__ = ["add_arguments", "run"]


@one_line
async def run(args: argparse.Namespace) -> int:
    if args.compare:
        before, after = (report.load(path) for path in args.compare)
        console().print(comparison.comparison(before, after, (args.compare[0], args.compare[1])))
        return 0
    if args.png:
        picture.require()
    for path in filter(None, (args.json, args.png, args.requests)):
        _check_writable(path)
    return await _measure(args)


async def _measure(args: argparse.Namespace) -> int:
    limits = limits_of(args)
    run: dict[str, Any] = {
        "command": report.command(sys.argv[1:]),
        "started": report.now(),
        "ended": "",
        "client": report.machine(),
        "targets": await _targets(args),
        "settings": settings_of(args),
        "points": [],
        "complete": False,
    }
    workload = workload_of(args, [target["model"] for target in run["targets"]])
    traces = []
    try:
        async with Fleet.running(args.processes) as fleet:
            for point in points_of(args):
                # Each point finds no cached prefix of another.
                salt = args.cache_salt if args.cache_salt is not None else f"bench {uuid.uuid4()}"
                job = Job(
                    routers=tuple(args.router),
                    access=access_of(args),
                    point=point,
                    share=Share(),
                    workload=dataclasses.replace(workload, cache_salt=salt),
                    prompts_path=args.prompts or "",
                    timeout_s=args.timeout,
                )
                ran = await _with_bar(fleet, job)
                run["points"].append(figures(point, ran.start_s, ran.parts, limits))
                traces.append(picture.Trace(ran.start_s, [one for part in ran.parts for one in part.sent]))
        run["complete"] = True
    finally:
        # What was measured before Ctrl-C, or before a router went away, is kept.
        run["ended"] = report.now()
        if run["points"]:
            _put_out(args, run, traces)
    return 0


def _put_out(args: argparse.Namespace, run: dict[str, Any], traces: list[picture.Trace]) -> None:
    if args.json != "-":
        console().print(tables.whole(run["points"], run["settings"]["limits_ms"]), soft_wrap=True)
    if args.json:
        report.save(args.json, run)
    if args.requests:
        _save_requests(args.requests, run["points"], traces)
    if args.png:
        picture.draw(args.png, run, traces[-1])


async def _with_bar(fleet: Fleet, job: Job) -> Ran:
    point = job.point
    columns = (TextColumn(point.name), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    terminal = console(stderr=True)
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        task = bar.add_task("", total=1.0, told="starting")

        def show(elapsed_s: float, sending: Sending) -> None:
            total_s = point.warmup_s + (point.duration_s or 0.0)
            share = elapsed_s / total_s if point.num_requests is None else sending.num_ended / point.num_requests
            what = "warming up" if elapsed_s < point.warmup_s else "measuring"
            if share >= 1:
                what = "waiting for the rest"
            open_now = sending.num_sent - sending.num_ended
            told = f"{what}: {sending.num_sent:,} sent, {open_now:,} open, {sending.num_failed:,} not OK"
            bar.update(task, completed=min(1.0, share), told=told)

        return await fleet.run(job, show)


async def _targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    targets = []
    for router in args.router:
        async with AsyncClient(router, access=access_of(args)) as client:
            targets.append(await report.target(client))
    return targets


def _save_requests(path: str, points: list[dict[str, Any]], traces: list[picture.Trace]) -> None:
    with Path(path).open("w") as file:
        for point, trace in zip(points, traces, strict=True):
            for one in sorted(trace.sent, key=lambda sent: sent.due_s):
                row = {
                    "load": point["load"],
                    "index": one.index,
                    "measured": one.is_measured,
                    "due_s": one.due_s - trace.start_s,
                    "sent_s": one.sent_s - trace.start_s,
                    "ended_s": one.ended_s - trace.start_s,
                    "ttft_ms": ttft_ms(one),
                    "status": one.status,
                    "messages": [[at_s - trace.start_s, count] for at_s, count in one.messages],
                    **one.answer,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _check_writable(path: str) -> None:
    """Before anything is measured."""
    if path == "-":
        return
    folder = Path(path).resolve().parent
    if not folder.is_dir() or Path(path).is_dir():
        raise ConfigError(f"{path}: expected a file in a folder that exists")
