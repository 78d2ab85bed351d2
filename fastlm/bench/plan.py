"""What is to be measured, as jobs: a title and a function that measures and adds to the results."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..cli.errors import CommandError
from . import growth, models, peaks, registry, sweep
from .measure import Row, measured
from .options import Options
from .workload import Workload, sides

Jobs = list[tuple[str, Callable[[], None]]]


def table(options: Options, found: dict) -> Jobs:
    """The workloads and models that the options choose. Raises: CommandError where they choose none."""
    jobs: Jobs = [
        (w.title, partial(_op, w, dtype, way, options, found)) for w, dtype, way in _chosen(options)
    ]
    wanted = options.model or ([] if options.op or options.cases else models.MODEL_NAMES)
    for gpt in models.MODELS:
        if gpt.name in wanted and options.workload in gpt.title:
            jobs.append((gpt.title, partial(_model, gpt, options, found)))
    if "stress" in wanted and options.workload in models.STRESS_TITLE:
        jobs.append((models.STRESS_TITLE, partial(_stress, options, found)))
    if not jobs:
        raise CommandError(f"no workload's title holds {options.workload!r}; see `fastlm bench --list`")
    return jobs


def _chosen(options: Options) -> Iterator[tuple[Workload, str, str]]:
    if options.model and not options.op:
        return
    for workload in registry.chosen(options.op, options.workload, options.cases):
        for dtype in options.dtype or workload.dtypes:
            for way in workload.directions:
                if not options.direction or way in options.direction:
                    yield workload, dtype, way


def _add(found: dict, options: Options, *rows: dict) -> None:
    found["rows"] += [row | {"memory": options.memory} for row in rows]


@contextmanager
def _refusals(title: str) -> Iterator[None]:
    torch._dynamo.reset()  # else one function's compiled versions add up to torch's limit
    try:
        yield
    except NotImplementedError as error:
        raise CommandError(f"{title}: {error}") from error


def _op(workload: Workload, dtype: str, direction: str, options: Options, found: dict) -> None:
    with _refusals(workload.title):
        backends = options.backend or [None]
        steps = sides(workload, dtype, direction, options.device, options.baseline, backends)
        work = workload.work(workload.arguments(dtype), direction)
        row = Row(workload.op, workload.name, workload.size, dtype, direction, steps, work)
        made = measured(row, options.device, options.rounds)
    if workload.peak and options.peaks and peaks.can_measure(options.device):
        made["peaks_mb"] = {
            "baseline": peaks.peak_mb(workload, next(iter(workload.baselines)), dtype, options.device),
            "fastlm": peaks.peak_mb(workload, "fastlm", dtype, options.device),
        }
    _add(found, options, made)


def _model(gpt: models.Gpt, options: Options, found: dict) -> None:
    with _refusals(gpt.title):
        row = models.row(gpt, options.device, options.baseline, options.backend or [None])
        _add(found, options, measured(row, options.device, options.rounds))


def _stress(options: Options, found: dict) -> None:
    backends = options.backend or [None]
    _add(found, options, *models.stress_rows(options.device, options.baseline, backends, options.rounds))


def sweeping(options: Options, found: dict) -> Jobs:
    """Every op's sizes, small and large."""
    found["sweep"] = []

    def job(*point) -> None:
        torch._dynamo.reset()
        found["sweep"].append(sweep.measured(*point, options.device, options.baseline, options.rounds))

    points = sweep.points(options.op, options.quick)
    return [(f"sweep {w.title} {dtype} {way}", partial(job, w, dtype, way)) for w, dtype, way in points]


def growing(options: Options, found: dict) -> Jobs:
    """The curves over sequence and vocabulary, and every op on one thread and on all."""
    found["growth"] = {"curves": [], "threads": []}

    def point(curve: growth.Curve, value: int) -> None:
        growth.add_point(found["growth"]["curves"], curve, value, options.device, options.rounds)

    def threads(workload: Workload) -> None:
        found["growth"]["threads"].append(growth.threads(workload, options.rounds))

    jobs: Jobs = []
    for curve in growth.curves():
        if curve.op in (options.op or [curve.op]):
            values = curve.values[:3] if options.quick else curve.values
            jobs += [(f"growth {curve.op} {curve.of} {v}", partial(point, curve, v)) for v in values]
    if torch.device(options.device).type == "cpu":
        named = [w for w in growth.one_per_op() if w.op in (options.op or [w.op])]
        jobs += [(f"threads {w.title}", partial(threads, w)) for w in named]
    return jobs


JOBS: dict[str, Callable[[Options, dict], Jobs]] = {"table": table, "sweep": sweeping, "growth": growing}
