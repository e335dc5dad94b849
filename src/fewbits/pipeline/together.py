"""Several jobs on one model in one walk: the calibration pass is made once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from fewbits.errors import RequestError
from fewbits.pipeline.job import Job, Result, cleaned
from fewbits.pipeline.lane import share


def together(jobs: Sequence[Job], outs: Sequence[Path], resume: bool = False) -> tuple[list[Result], float]:
    """Carry out ``jobs``, one output each; the results and the seconds that they shared.

    Each output has the bytes that :meth:`Job.run` gives it alone. A result's ``seconds`` is what its lane cost and all
    of what was shared: about what it takes alone. ``resume`` goes on with outputs that were interrupted. Raises
    RequestError for jobs that do not calibrate on the same inputs.
    """
    if any(not alike(jobs[0], job) for job in jobs):
        raise RequestError(
            "jobs that share a walk need one model, stream 'original', the same calibration rows and one precision"
        )
    with ExitStack() as stack:
        works = [job.begin(out, resume) for job, out in zip(jobs, outs, strict=True)]
        for work in works:
            stack.enter_context(cleaned(work))
        began = time.perf_counter()
        acts, waiting = jobs[0].acts(works[0].path)
        lanes = [job.lane(work, True, waiting) for job, work in zip(jobs, works, strict=True)]
        shared = time.perf_counter() - began
        if acts is None:
            raise RequestError("jobs without calibration have nothing to share; run each alone")
        shared += share(lanes, acts)
        results = []
        for job, lane in zip(jobs, lanes, strict=True):
            began = time.perf_counter()

            def seconds(lane_seconds: float = lane.seconds, began: float = began) -> float:
                return shared + lane_seconds + time.perf_counter() - began

            results.append(job.finish(lane, acts, seconds))
        return results, shared


def alike(a: Job, b: Job) -> bool:
    """Whether two jobs see the same inputs of every layer, computed in the same way."""
    rows = a.rows is not None and b.rows is not None and torch.equal(a.rows, b.rows)
    streams = {a.plan.stream, b.plan.stream} == {"original"}
    return rows and streams and a.plan.compute == b.plan.compute and a.source.path == b.source.path
