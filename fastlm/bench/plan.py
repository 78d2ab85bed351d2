"""What is to be measured, as jobs: a title and a function that measures and adds to the results."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from ..cli.errors import CommandError
from . import growth, models, peaks, registry, sweep
from .journal import note
from .measure import Row, is_fastlm, measured
from .options import Options
from .sides import builders
from .trial import tried, unlike
from .workload import Workload

Jobs = list[tuple[str, Callable[[], None]]]


def table(options: Options, found: dict) -> Jobs:
    """The workloads and models that the options choose. Raises: CommandError where they choose none."""
    jobs: Jobs = []
    for workload, dtype, way in _chosen(options):
        title = f"{workload.title} {dtype} {way}"
        jobs.append((title, partial(_op, title, workload, dtype, way, options, found)))
    wanted = options.model or ([] if options.op or options.cases else models.MODEL_NAMES)
    for gpt in (gpt.on(options.device) for gpt in models.MODELS):
        if gpt.name in wanted and options.workload in gpt.title:
            jobs.append((gpt.title, partial(_model, gpt, options, found)))
    if "stress" in wanted and options.workload in models.STRESS_TITLE:
        jobs.append((models.STRESS_TITLE, partial(_stress, options, found)))
    if not jobs:
        raise CommandError(f"no workload's title holds {options.workload!r}; see `fastlm bench --list`")
    return jobs if options.limit_s is None else every_op_first(jobs)


def every_op_first(jobs: Jobs) -> Jobs:
    """The first job of every op, then the second ones, and so on: for a run whose time may be up."""
    turns: Counter[str] = Counter()
    found = []
    for title, job in jobs:
        op = title.split()[0]
        found.append((turns[op], title, job))
        turns[op] += 1
    return [(title, job) for _, title, job in sorted(found, key=lambda entry: entry[0])]


def _chosen(options: Options) -> list[tuple[Workload, str, str]]:
    if options.model and not options.op:
        return []
    chosen = registry.chosen(options.op, options.workload, options.cases)
    return [
        (workload, dtype, way)
        for workload in (w.on(options.device) for w in chosen)
        for dtype in options.dtype or workload.dtypes
        for way in workload.directions
        if not options.direction or way in options.direction
    ]


def _add(found: dict, options: Options, *rows: dict) -> None:
    found["rows"] += [row | {"memory": options.memory_mode} for row in rows]


def _steps(title: str, made: dict[str, Callable], options: Options, found: dict) -> tuple[dict, dict]:
    """The steps of the sides that run, and their first outputs; why the others do not run is noted."""
    torch._dynamo.reset()  # else one function's compiled versions add up to torch's limit
    try:
        steps, outputs, failed = tried(made, options.device)
    except NotImplementedError as error:
        raise CommandError(f"{title}: {error}") from error
    for side, reason in failed.items():
        note(found, title, side, reason)
    return steps, outputs


def _op(title: str, workload: Workload, dtype: str, direction: str, options: Options, found: dict) -> None:
    device, backends = options.device, options.backend or [None]
    built = builders(workload, dtype, direction, device, options.baseline, backends)
    forms: dict[str, Callable] = {}

    def step_of(name: str) -> Callable:
        step, forms[name] = built[name]()
        return step

    with torch.inference_mode(direction == "forward"):
        steps, outputs = _steps(title, {name: partial(step_of, name) for name in built}, options, found)
        outputs = {name: forms[name](output) for name, output in outputs.items()}
    if not workload.options.get("dropout_p"):
        for side, reason in unlike(outputs).items():
            note(found, title, side, reason)
            del steps[side]
    del outputs
    work = workload.work(workload.arguments(dtype, device), direction)
    row = Row(workload.op, workload.name, workload.size, dtype, direction, steps, work)
    made = measured(row, device, options.rounds)
    if options.peaks:
        made |= _peaks(workload, row, made["best_baseline"], options)
    _add(found, options, made)


def _peaks(workload: Workload, row: Row, best: str | None, options: Options) -> dict:
    """Peak memory: on a GPU of every side; on a CPU, where each needs a process, of some workloads' two."""
    device = options.device
    if options.on_gpu:
        with torch.inference_mode(row.direction == "forward"):
            mb = {name: peaks.peak_of(step, device) / 1e6 for name, step in row.steps.items()}
        ours = next((name for name in mb if is_fastlm(name)), None)
        if ours is None or best is None:
            return {"peaks_by_side_mb": mb}
        return {"peaks_mb": {"baseline": mb[best], "fastlm": mb[ours]}, "peaks_by_side_mb": mb}
    if not workload.peak or not peaks.can_measure(device):
        return {}
    baseline = next(iter(workload.baselines))
    sides = {"baseline": baseline, "fastlm": "fastlm"}
    mb = {name: peaks.peak_mb(workload, side, row.dtype, device) for name, side in sides.items()}
    return {"peaks_mb": mb}


def _of_models(options: Options) -> list[str | None]:
    """A model takes one backend, or each op's first where several are asked for, as users' models do."""
    return options.backend if len(options.backend) == 1 else [None]


def _model(gpt: models.Gpt, options: Options, found: dict) -> None:
    made = models.builders(gpt, options.device, options.baseline, _of_models(options))
    steps, _ = _steps(gpt.title, made, options, found)
    row = models.row_of_steps(gpt, steps)
    _add(found, options, measured(row, options.device, options.rounds))


def _stress(options: Options, found: dict) -> None:
    given = options.device, options.baseline, _of_models(options), options.rounds
    _add(found, options, *models.stress_rows(*given))


def sweeping(options: Options, found: dict) -> Jobs:
    """Every op's sizes, small and large."""
    found.setdefault("sweep", [])

    def job(*point) -> None:
        torch._dynamo.reset()
        found["sweep"].append(sweep.measured(*point, options.device, options.baseline, options.rounds))

    points = sweep.points(options.op, options.quick)
    return [(f"sweep {w.title} {dtype} {way}", partial(job, w, dtype, way)) for w, dtype, way in points]


def growing(options: Options, found: dict) -> Jobs:
    """The curves over sequence and vocabulary, and every op on one thread and on all."""
    found.setdefault("growth", {"curves": [], "threads": []})

    def point(curve: growth.Curve, value: int) -> None:
        growth.add_point(found["growth"]["curves"], curve, value, options.device, options.rounds)

    def threads(workload: Workload) -> None:
        found["growth"]["threads"].append(growth.threads(workload, options.rounds))

    jobs: Jobs = []
    for curve in growth.curves():
        if curve.op in (options.op or [curve.op]):
            values = curve.values[:3] if options.quick else curve.values
            jobs += [(f"growth {curve.op} {curve.of} {v}", partial(point, curve, v)) for v in values]
    if not options.on_gpu:
        named = [w for w in growth.one_per_op() if w.op in (options.op or [w.op])]
        jobs += [(f"threads {w.title}", partial(threads, w)) for w in named]
    return jobs


JOBS: dict[str, Callable[[Options, dict], Jobs]] = {"table": table, "sweep": sweeping, "growth": growing}
