"""What quantisation costs in accuracy: NME over float32's on real faces, beside the paper's ratios.

    python benchmarks/accuracy.py --root DIR [--data 300w] [--out DIR] [--jobs N] [--hours H]
                                  [--shape SIZE EPOCHS BATCH ...] [--seeds 3] [--first N]
    python benchmarks/accuracy.py --report [--out DIR] [--json]      what is there, at any time
    python benchmarks/accuracy.py --export FILE [--out DIR]   adds the runs that are done to FILE

DU-Net(2), cosine schedule. All settings with RMSprop: 15 epochs at 64×64 with batches of 16, and 6
at 128×128 with batches of 4 and `--freeze-norm 0.34`. float32 and the default 8-1-8 and 6-1-6
(BW-α, `source`) again with Adam, for 15 and 12 epochs. (Other shapes: `--shape`, once for each.)
Weights at 1 or 2 bits have `--latent-rate 3 --ramp 0.5`; `-at-once` is the default without the two
options. Every setting is trained at two learning rates and counts at the better one; float32 and
the defaults with further seeds at that rate. These are 128 runs. With 1,159 training images (the
folders afw and helen of 300-W) one at 64×64 takes 5 to 15 minutes of one core, at 128×128 two to
seven an epoch: 20 to 60 core-hours. The most important runs come first, and in a further shape
first the rate whose like, the lower or the higher, was better in the first one.

Each run is a `fedcunet train` in a folder of its own. What was interrupted goes on from its last
whole epoch, what is done is left alone, and a run that failed is tried again by the next call.
An --out is for the images of one --data and --root.
`--known FILE` puts results of runs that were done elsewhere, as `--export` wrote them, into --out,
such as ours, benchmarks/accuracy.jsonl. In an --out without them every run is trained anew.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `benchmarks`

from benchmarks.accuracy_runs import (
    EARLY,
    LATE,
    MAIN,
    RATES,
    SETTINGS,
    SHAPES,
    Run,
    Setting,
    Shape,
    all_runs,
    check_data,
    export,
    shapes_of,
    take_known,
)
from fedcunet.errors import UserError
from fedcunet.files import held

OUT = Path(".fedcunet/accuracy")


def best_rate(setting: Setting, shape: Shape, out: Path, failed: set[Run]) -> float:
    """The rate with the lower NME of seed 0; 0 while a rate is neither done nor failed."""
    scores: dict[float, float] = {}
    for rate in shape.rates:
        run = Run(setting, shape, rate, 0)
        if run.done(out):
            scores[rate] = run.result(out)[1]
        elif run not in failed:
            return 0.0
    return min(scores, key=lambda rate: scores[rate]) if scores else 0.0


def planned(shapes: Sequence[Shape], seeds: int, out: Path, failed: set[Run]) -> Iterator[Run]:
    """All runs whose learning rate is known by now, the most important first."""

    def likely_rates(setting: Setting, shape: Shape) -> list[float]:
        """Both rates, first the one whose like, the lower or the higher, won in the first shape."""
        won = best_rate(setting, shapes[0], out, failed) == shapes[0].rates[1]
        return list(reversed(shape.rates) if won else shape.rates)

    def first_seed(settings: Sequence[Setting], shape: Shape) -> Iterator[Run]:
        runs = [[Run(s, shape, rate, 0) for rate in likely_rates(s, shape)] for s in settings]
        if shape == shapes[0]:  # a setting after the other
            yield from (run for pair in runs for run in pair)
        else:  # the likely rate of all, then the other one
            yield from (run for pairs in zip(*runs, strict=True) for run in pairs)

    def more_seeds(shape: Shape) -> Iterator[Run]:
        for setting in MAIN:
            rate = best_rate(setting, shape, out, failed)
            if rate:
                yield from (Run(setting, shape, rate, seed) for seed in range(1, seeds))

    for shape in shapes:
        yield from first_seed(MAIN, shape)
    for shape in shapes:
        yield from more_seeds(shape)
    for settings in (EARLY, LATE):
        for shape in shapes:
            yield from first_seed([] if shape.only_main else settings, shape)


def work(arguments: argparse.Namespace) -> int:
    """Trains what is missing, `--jobs` at a time; returns the number of runs that failed."""
    out: Path = arguments.out
    deadline = time.monotonic() + 3600 * arguments.hours
    active: dict[Run, subprocess.Popen[bytes]] = {}
    failed: set[Run] = set()
    started = 0
    try:
        while time.monotonic() < deadline:
            for run in [run for run, process in active.items() if process.poll() is not None]:
                code = active.pop(run).returncode
                if not run.done(out):
                    failed.add(run)
                end = "done" if run.done(out) else f"failed, {code}"
                print(f"{run.folder(out)}: {end}", file=sys.stderr, flush=True)
            following = (
                run
                for run in planned(arguments.shapes, arguments.seeds, out, failed)
                if run not in active and run not in failed and not run.done(out)
            )
            is_free = len(active) < arguments.jobs and started < arguments.first
            run = next(following, None) if is_free else None
            if run is not None:
                active[run] = start(run, arguments)
                started += 1
            elif not active:
                break
            else:
                time.sleep(0.5)
    finally:  # at the deadline or an interrupt: the last whole epoch is kept
        for process in active.values():
            process.terminate()
        for process in active.values():
            process.wait()
    return len(failed)


def start(run: Run, arguments: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """The process of a run; what it prints goes to `log.txt` in its folder."""
    folder = run.folder(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            run.command(arguments.out, arguments.data, arguments.root),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is known of each setting at each size; runs that are not done do not count."""
    out, rows = arguments.out, []
    for shape in arguments.shapes:
        reference: float | None = None
        for setting in SETTINGS:
            by_rate = {
                rate: [
                    run.result(out)[1]
                    for seed in range(arguments.seeds)
                    if (run := Run(setting, shape, rate, seed)).done(out)
                ]
                for rate in shape.rates
            }
            tried = {rate: found for rate, found in by_rate.items() if found}
            if not tried:
                continue
            # By seed 0, which every rate has; more seeds come only at the better rate.
            rate = min(tried, key=lambda rate: tried[rate][0])
            nme = mean(tried[rate])
            reference = nme if setting.name == "float32" else reference
            rows.append(
                {
                    "size": shape.size,
                    "epochs": shape.epochs,
                    "batch": shape.batch,
                    "optimizer": shape.optimizer,
                    "setting": setting.name,
                    "input_quantizer": setting.quantizer,
                    "rate": rate,
                    "rates_tried": len(tried),
                    "seeds": len(tried[rate]),
                    "nme_percent": nme,
                    "nme_percent_by_seed": tried[rate],
                    "ratio": nme / reference if reference else None,
                    "paper_ratio": setting.paper,
                    "aim": setting.aim,
                }
            )
    return rows


def budget(arguments: argparse.Namespace) -> str:
    """How many runs are done, and how long the others would take at the pace so far."""
    out = arguments.out
    num_done = num_left = 0
    seconds_left = 0.0
    paces = {shape: pace_of(shape, arguments) for shape in arguments.shapes}
    known = [pace for pace in paces.values() if pace]
    for shape, pace in paces.items():
        runs = list(all_runs([shape], arguments.seeds))
        done = sum(run.done(out) for run in runs)
        # Seeds beyond the first are at one of the two rates.
        left = len(runs) - (len(shape.rates) - 1) * len(MAIN) * (arguments.seeds - 1) - done
        num_done, num_left = num_done + done, num_left + left
        if known:  # a shape without a pace has that of the others
            seconds_left += left * shape.epochs * shape.size**2 * (pace or mean(known))
    text = f"{num_done} runs done, {num_left} to do"
    if num_left and known:
        text += f": about {seconds_left / 3600:.1f} core-hours at the pace so far"
    return text


def pace_of(shape: Shape, arguments: argparse.Namespace) -> float:
    """Seconds of an epoch over the pixels of a crop, the mean of what was trained here, or 0."""
    files = [
        run.folder(arguments.out) / "history.jsonl" for run in all_runs([shape], arguments.seeds)
    ]
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return mean(json.loads(line)["seconds"] for line in lines) / shape.size**2 if lines else 0.0


def report(arguments: argparse.Namespace) -> None:
    """Prints the table, or with --json one value."""
    rows = rows_of(arguments)
    if arguments.json:
        print(json.dumps({"rows": rows, "budget": budget(arguments)}))
        return
    print(f"{'size':>4} {'epochs':>6} {'optimiser':9} {'setting':24} {'quantiser':9} {'rate':>7} "
          f"{'seeds':>5} {'NME %':>6} {'ratio':>6} {'paper':>6} {'aim':>5}")  # fmt: skip
    for row in rows:
        cells = [(row["ratio"], 3), (row["paper_ratio"], 2), (row["aim"], 2)]
        texts = ["–" if cell is None else f"{cell:.{digits}f}" for cell, digits in cells]
        untried = "*" if row["rates_tried"] < len(RATES) else " "
        print(f"{row['size']:>4} {row['epochs']:>6} {row['optimizer']:9} {row['setting']:24} "
              f"{row['input_quantizer'] or '–':9} {row['rate']:>6g}{untried} {row['seeds']:>5} "
              f"{row['nme_percent']:>6.2f} {texts[0]:>6} {texts[1]:>6} {texts[2]:>5}")  # fmt: skip
    print("NME after the last epoch, at the better learning rate (*: the other is not done yet).")
    print(budget(arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="300w", help="data set of faces")
    parser.add_argument("--root", help="its folder")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, a core each")
    parser.add_argument("--hours", type=float, default=1e6, help="stop after so many")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        action="append",
        metavar=("SIZE", "EPOCHS", "BATCH"),
        help="crop side, epochs, examples of a step; once for each shape",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of float32 and the defaults")
    parser.add_argument("--first", type=int, default=10**6, help="start at most so many runs")
    parser.add_argument("--known", type=Path, help="results of runs that need no training")
    parser.add_argument("--export", type=Path, help="add the done runs to this file, train nothing")
    parser.add_argument("--report", action="store_true", help="print what is there, train nothing")
    parser.add_argument("--json", action="store_true", help="the report as one JSON value")
    arguments = parser.parse_args()
    asked = [shape for each in arguments.shape or () for shape in shapes_of(*each)]
    arguments.shapes = asked or list(SHAPES)
    if arguments.known and (arguments.report or arguments.export):
        take_known(arguments)
    if arguments.report or arguments.export:
        (export if arguments.export else report)(arguments)
        return
    if arguments.root is None:
        parser.error("--root: expected the folder of the data set")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected 1 or more, found {arguments.jobs}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the trainings end with this process
    try:
        with held(arguments.out):
            check_data(arguments)
            if arguments.known:
                take_known(arguments)
            num_failed = work(arguments)
    except UserError as error:
        parser.error(f"--out {error}")
    report(arguments)
    sys.exit(1 if num_failed else 0)


if __name__ == "__main__":
    main()
