"""Virtual time to a given error: rounds that wait for stragglers against a buffer that does not.

    python benchmarks/asynchronous.py [--data faces --root DIR] [--out DIR]
        [--clients 16] [--at-work 8] [--buffer 4] [--rounds 16] [--target PERCENT]
        [--fleet phone-low:2,phone-mid:4,tablet:1,laptop:1]

Synchronous rounds ask `at-work` clients and wait for the slowest; with over-selection 1.3 they
leave the slowest out at a deadline that the median device keeps easily. The buffered server keeps
as many at work and steps at every `buffer` answers; it gets more and smaller steps, the same
number of trainings in all. Seconds are of the clients' devices (docs/devices.md), 0.1 s an example
on the reference core. Runs are resumed or left alone when they are there. Writes asynchronous.json
and asynchronous.png.
"""

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `server`, `simulations`

import numpy as np
from matplotlib.figure import Figure

from fedcunet.config import RunConfig
from server.app import NoDisplay, serve
from simulations.engine import Engine


def settings(arguments: argparse.Namespace) -> dict[str, RunConfig]:
    """The three ways to run the same number of trainings."""
    share = arguments.at_work / arguments.clients
    base = RunConfig().replace(
        model__unets=arguments.unets,
        model__order=min(1, arguments.unets - 1),
        data__name=arguments.data,
        data__root=arguments.root,
        training__optimizer="adam",
        training__learning_rate=4e-3,
        training__schedule="cosine",
        training__batch_size=8,
        update__codec="trellis",
        update__bits=1,
        update__error_feedback="off",
        downlink__codec="trellis",
        downlink__bits=1,
        federation__clients=arguments.clients,
        federation__fraction=share,
        federation__fleet=arguments.fleet,
        federation__seconds_per_example=0.1,
        federation__state_dir=str(arguments.out / "clients"),
    )
    steps = round(arguments.rounds * arguments.at_work / arguments.buffer)
    return {
        "synchronous": base.replace(federation__rounds=arguments.rounds),
        "deadline": base.replace(
            federation__rounds=arguments.rounds,
            federation__over_selection=1.3,
            federation__deadline_seconds=arguments.deadline,
        ),
        "buffered": base.replace(
            federation__rounds=steps,
            federation__mode="buffered",
            federation__buffer_size=arguments.buffer,
        ),
    }


def curve(folder: Path) -> tuple[list[float], list[float]]:
    """Virtual seconds and errors of a run's evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = np.cumsum([line["device_seconds"] for line in lines]).tolist()
    seen = [(c, one["metric"]) for c, one in zip(clock, lines, strict=True) if one["metric"]]
    return [c for c, _ in seen], [metric for _, metric in seen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="faces")
    parser.add_argument("--root", default=".fedcunet/data/faces")
    parser.add_argument("--out", type=Path, default=Path(".fedcunet/asynchronous"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--at-work", type=int, default=8)
    parser.add_argument("--buffer", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--unets", type=int, default=1)
    parser.add_argument("--deadline", type=float, default=20.0)
    parser.add_argument("--target", type=float, help="percent; the worst of the final errors")
    parser.add_argument("--fleet", default="phone-low:2,phone-mid:4,tablet:1,laptop:1")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, config in settings(arguments).items():
        folder = arguments.out / name
        engine = Engine(name="loopback", num_workers=1, num_gpus=0, ray_address=None)
        with ExitStack() as stack:
            grid = engine.grid(config, stack)
            serve(grid, config, out=folder, name=name, display=NoDisplay(), resume=True)
        curves[name] = curve(folder)
        axes.plot(*curves[name], label=name)
    target = arguments.target or max(percents[-1] for _, percents in curves.values())
    rows: list[dict[str, Any]] = []
    for name, (clock, percents) in curves.items():
        reached = next((c for c, p in zip(clock, percents, strict=True) if p <= target), None)
        summary = json.loads((arguments.out / name / "summary.json").read_text())
        rows.append(
            {
                "way": name,
                "final_percent": percents[-1],
                "seconds": clock[-1],
                "seconds_to_target": reached,
                "trainings": sum(summary["replies"].values()),
                "replies": summary["replies"],
            }
        )
        to_target = "never" if reached is None else f"{reached:.0f} s"
        print(
            f"{name:12} final {percents[-1]:6.2f} % after {clock[-1]:6.0f} s; "
            f"{target:.2f} % after {to_target}; replies {summary['replies']}"
        )
    axes.axhline(target, color="k", linewidth=0.5)
    axes.set_xlabel("seconds on the clients' devices")
    axes.set_ylabel("error, %")
    axes.legend()
    figure.savefig(arguments.out / "asynchronous.png", dpi=150)
    result = {"target_percent": target, "fleet": arguments.fleet, "ways": rows}
    (arguments.out / "asynchronous.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
