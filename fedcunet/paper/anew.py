"""One table of the paper from beginning to end: load, train every row, measure, compare."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedcunet.config import RunConfig
from fedcunet.data import AnnotationSet, load
from fedcunet.data.crops import Crops
from fedcunet.errors import UserError
from fedcunet.files import json_text, write_atomically
from fedcunet.memory import compare_with_naive
from fedcunet.paper.budget import Budget, Plan, limited, make_plans
from fedcunet.paper.report import RowReport, make_report, markdown
from fedcunet.paper.running import RowResult, check_setting, is_finished, read_json, train_row
from fedcunet.paper.tables import Table
from fedcunet.training.evaluation import evaluate_mean_shape

MEMORY = "memory.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Listener:
    """What is told while a table is made; each takes what its name says."""

    problems: Callable[[AnnotationSet], None] = lambda found: None
    plan: Callable[[float, float], None] = lambda total, done: None  # in units of work
    step: Callable[[str, int, float, float], None] = lambda name, epoch, loss, work: None
    row: Callable[[str, RowResult, bool], None] = lambda name, result, found: None
    memory: Callable[[str], None] = lambda name: None  # before it is measured


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One training: a row with one seed."""

    plan: Plan
    config: RunConfig
    out: Path

    @property
    def label(self) -> str:
        return f"{self.plan.name}, seed {self.config.seed}"

    @property
    def work(self) -> float:
        """About what an image costs, in U-Nets of a DU-Net (a stacked one takes twice as long)."""
        model = self.config.model
        return model.unets * (1 + model.iterative) * (2 if model.kind == "stacked" else 1)


def make_table(
    table: Table,
    budget: Budget,
    out: Path,
    *,
    with_memory: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Trains what `out` does not hold yet; writes table.json and table.md there.

    Args:
        table: which.
        budget: what each row gets.
        out: folder; each row and seed has one below.
        with_memory: measure each row's training step beside naive float32, for balance indices.
        listener: is told what happens.

    Returns:
        What table.json holds.

    Raises:
        UserError: if `out` holds rows of another setting, or the data cannot be used.
    """
    listener = listener or Listener()
    plans, left_out = make_plans(table, budget)
    train_set, test_set = _load(budget, "train", listener), _load(budget, "test", listener)
    sets = limited(train_set, budget.limit_train), limited(test_set, budget.limit_test)
    jobs = [_job(plan, seed, out) for plan in plans for seed in budget.seeds]
    for job in jobs:  # before hours are spent
        check_setting(job.out, job.config, sets)
    images = len(sets[0].annotations) * budget.epochs
    finished = sum(job.work * images for job in jobs if is_finished(job.out))
    listener.plan(sum(job.work * images for job in jobs), finished)
    results = {job.out: _run(job, sets, table, listener) for job in jobs}
    num_landmarks = train_set.scheme.num_landmarks
    rows = [
        RowReport(
            plan=replace(plan, config=mine[0].config),
            results=tuple(results[job.out] for job in mine),
            memory=_memory(mine[0], num_landmarks, listener) if with_memory else None,
        )
        for plan in plans
        if (mine := [job for job in jobs if job.plan is plan])
    ]
    report = make_report(
        table,
        budget,
        rows,
        left_out=left_out,
        images=(len(sets[0].annotations), len(sets[1].annotations)),
        mean_shape_percent=_mean_shape(budget, sets),
    )
    text = json_text(report, indent=1) + "\n"
    write_atomically(out / "table.json", text)
    write_atomically(out / "table.md", markdown(report))
    written: dict[str, Any] = json.loads(text)
    return written


def curve_epochs(table: Table, epochs: int) -> tuple[int, ...]:
    """The epochs of a short training that stand for the paper's, in proportion to its last."""
    papers = sorted({epoch for row in table.rows for epoch in row.train_curve})
    if not papers:
        return ()
    return tuple(sorted({max(1, round(epoch * epochs / papers[-1])) for epoch in papers}))


def _job(plan: Plan, seed: int, out: Path) -> _Job:
    config = plan.config.replace(seed=seed)
    return _Job(plan=plan, config=config, out=out / plan.row.key / f"seed-{seed}")


def _run(
    job: _Job, sets: tuple[AnnotationSet, AnnotationSet], table: Table, listener: Listener
) -> RowResult:
    found = is_finished(job.out)
    epochs = job.config.training.epochs
    steps_told = 0.0

    def on_step(epoch: int, done: int, total: int, loss: float) -> None:
        nonlocal steps_told
        now = (epoch - 1 + done / total) * len(sets[0].annotations) * job.work
        listener.step(f"{job.label} epoch {epoch}/{epochs}", epoch, loss, now - steps_told)
        steps_told = now

    result = train_row(
        job.config,
        sets,
        job.out,
        train_epochs=curve_epochs(table, epochs),
        on_step=on_step,
    )
    listener.row(job.label, result, found)
    return result


def _load(budget: Budget, subset: str, listener: Listener) -> AnnotationSet:
    found = load(budget.data, budget.root, subset, boxes=budget.boxes)
    listener.problems(found)
    if not found.annotations:
        raise UserError(f"{budget.root}: subset '{subset}' of {budget.data} has no images")
    return found


def _mean_shape(budget: Budget, sets: tuple[AnnotationSet, AnnotationSet]) -> float:
    """The metric of predicting the mean training shape everywhere."""
    train_crops, test_crops = (
        Crops(found.annotations, found.scheme, size=budget.size, budget_bytes=0) for found in sets
    )
    return evaluate_mean_shape(train_crops, sets[1], test_crops).percent


def _memory(job: _Job, num_landmarks: int, listener: Listener) -> dict[str, Any]:
    """The step's measured cost beside naive float32, kept in the row's folder."""
    path = job.out / MEMORY
    if path.exists():
        return read_json(path)
    listener.memory(job.plan.name)
    torch.set_num_threads(job.config.training.threads)
    cost = dict(compare_with_naive(job.config, num_landmarks, repeats=1))
    write_atomically(path, json.dumps(cost) + "\n")
    return cost
