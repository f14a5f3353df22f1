"""The same evaluation on Ray: one model per GPU or CPU slot, on this machine or on a cluster.

Ray restarts an actor that dies and asks it again; what we add is that questions are streamed and that one which keeps
killing actors becomes a failed question.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hide.evaluation.data import Sample
from hide.evaluation.runner import answer
from hide.evaluation.store import blank_record
from hide.methods.base import Method

RETRIES = 2  # of a question whose actor died


class _Answerer:
    """An actor: ways of answering with one model, and the questions that it is sent."""

    def __init__(self, load: Callable[[], Mapping[str, Method[Any]]]) -> None:
        self.ways = load()

    def answer(self, sample: Sample) -> dict[str, Any]:
        return {**answer(self.ways, sample), "worker": os.getpid()}


def ask_on_ray(
    load: Callable[[], Mapping[str, Method[Any]]],
    samples: Iterable[Sample],
    *,
    address: str = "local",
    actors: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Records of all samples, in the order in which they are done; see `hide.evaluation.runner.evaluate`.

    Args:
        load: makes the ways (`hide.evaluation.runner.answers`) with their model, in each actor once; picklable.
        samples: read as actors become free. Pictures in files are read by the actor, from the same path.
        address: "local" starts Ray here; else the address of a running cluster ("auto", "host:6379", "ray://...").
        actors: how many models; default one per GPU of the cluster, without GPUs one per CPU.

    Raises:
        ValueError: Ray is not installed, or the cluster cannot be reached or has no room.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("ray: it is not installed; pip install 'hide-kernels[ray]'") from None
    try:
        ray.init(
            address,
            num_cpus=actors if address == "local" else None,
            log_to_driver=False,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"ray: no cluster at {address!r}: {error}") from None
    try:
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        count = actors or gpus or max(1, int(found.get("CPU", 1)))
        if count > (gpus or found.get("CPU", 0)):
            raise ValueError(f"actors: got {count}, but the cluster has {gpus} GPUs and {found.get('CPU', 0):g} CPUs")
        actor: Any = ray.remote(_Answerer).options(
            num_gpus=1 if gpus else 0, num_cpus=1, max_restarts=-1, max_task_retries=RETRIES
        )
        workers = [actor.remote(load) for _ in range(count)]
        pending: dict[Any, tuple[Sample, Any]] = {}

        def done() -> dict[str, Any]:
            (reference,), _ = ray.wait(list(pending))
            sample, worker = pending.pop(reference)
            free.append(worker)
            try:
                return ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[0]
                return blank_record(sample, f"{type(error).__name__}: {reason}")

        # One question at a time: a second one would fail with the actor that the first one kills.
        free = list(workers)
        for sample in samples:
            while not free:
                yield done()
            worker = free.pop(0)
            pending[worker.answer.remote(sample)] = sample, worker
        while pending:
            yield done()
    finally:
        ray.shutdown()
