"""Final error against total bytes: float32, EDEN and trellis updates over whole federated runs.

    python benchmarks/front.py --data 300w --root DIR [--out DIR] [--seeds 3]
        [--unets 1] [--bits 8,1,8] [--rounds 12] [--size 64] [--only WORD ...]
    python benchmarks/front.py --report [--out DIR]      what is there, at any time

The settings differ in how updates go up and models come down, and in nothing else: 8 clients by
source, half of them a round, BW-alpha weights, Adam, cosine. float32 and EDEN get the whole model
in float32, as the frameworks that have these codecs send it; trellis gets differences. Bytes are
lengths of what was sent, all counted, up and down, of all clients and rounds. A run that was
interrupted goes on from its last round; what is done is left alone. Writes front.json, front.png.
"""

import argparse
import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `server`, `simulations`

from matplotlib.figure import Figure

from fedcunet.config import RunConfig
from fedcunet.errors import FolderInUse
from server.app import NoDisplay, serve
from simulations.engine import Engine

OUT = Path(".fedcunet/front")
DOWN = {"downlink__codec": "trellis", "downlink__bits": 1}
TRELLIS = {"update__codec": "trellis", "update__error_feedback": "off", **DOWN}
FEEDBACK = {"update__codec": "trellis", "update__error_feedback": "on", **DOWN}
# The most telling first.
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"update__codec": "float32", "update__bits": 32},
    "trellis 1": {**TRELLIS, "update__bits": 1},
    "EDEN 1": {"update__codec": "eden", "update__bits": 1},
    "trellis 0.5": {**TRELLIS, "update__bits": 0.5},
    "EDEN 2": {"update__codec": "eden", "update__bits": 2},
    "trellis 2, 2 down": {**TRELLIS, "update__bits": 2, "downlink__bits": 2},
    "trellis 0.5 shrinkage": {**TRELLIS, "update__bits": 0.5, "federation__shrinkage": True},
    "trellis 0.5 prediction": {**TRELLIS, "update__bits": 0.5, "update__prediction": True},
    "trellis 0.5 feedback": {**FEEDBACK, "update__bits": 0.5},
    "trellis 0.5, 0.5 down": {**TRELLIS, "update__bits": 0.5, "downlink__bits": 0.5},
    "EDEN 4": {"update__codec": "eden", "update__bits": 4},
    "trellis 2": {**TRELLIS, "update__bits": 2},
}


def setting(way: str, seed: int, arguments: argparse.Namespace) -> RunConfig:
    """The whole setting of one run."""
    return RunConfig().replace(
        seed=seed,
        model__unets=arguments.unets,
        model__order=min(1, arguments.unets - 1),
        quant__bits=arguments.bits,
        quant__alpha=True,
        quant__input_quantizer="ranged",  # as in the table of docs/codecs.md
        data__name=arguments.data,
        data__root=arguments.root,
        data__size=arguments.size,
        training__optimizer="adam",
        training__learning_rate=4e-3,
        training__schedule="cosine",
        training__batch_size=8,
        federation__rounds=arguments.rounds,
        federation__fraction=0.5,
        federation__evaluate_every=arguments.rounds,
        federation__state_dir=str(arguments.out / "clients"),
        **WAYS[way],
    )


def run(way: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run, or what is left of it."""
    config = setting(way, seed, arguments)
    folder = arguments.out / "runs" / f"{way.replace(' ', '-')}-seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(name="loopback", num_workers=1, num_gpus=0, ray_address=None)
    with ExitStack() as stack:
        grid = engine.grid(config, stack)
        try:
            summary = serve(grid, config, out=folder, name=way, display=NoDisplay(), resume=True)
        except FolderInUse:
            return  # another process is at it
    percent = summary[summary["metric_name"]]
    print(f"{way}, seed {seed}: {percent:.2f} %", flush=True)


def results(out: Path) -> list[dict[str, Any]]:
    """A row for each way whose runs are there, with means and standard errors over seeds."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob("runs/*/summary.json")):
        summary = json.loads(path.read_text())
        found.setdefault(summary["name"], {})[summary["setting"]["seed"]] = summary
    rows = []
    for way in (way for way in WAYS if way in found):
        runs = found[way]
        percents = {seed: one[one["metric_name"]] for seed, one in runs.items()}
        asked = [sum(one["replies"].values()) for one in runs.values()]
        row: dict[str, Any] = {"way": way, "seeds": sorted(runs), "percent": percents}
        row["mean_percent"] = mean(percents.values())
        for side in ("up", "down"):
            row[f"bits_{side}"] = mean(one[f"bits_per_parameter_{side}"] for one in runs.values())
            row[f"bytes_{side}"] = mean(
                one[f"bytes_{side}_per_client_round"] * count
                for one, count in zip(runs.values(), asked, strict=True)
            )
        exact = {s: one[one["metric_name"]] for s, one in found.get("float32", {}).items()}
        paired = [percents[seed] - exact[seed] for seed in percents if seed in exact]
        if paired:
            row["over_float32"] = mean(paired)
            row["standard_error"] = stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else None
            row["as_good"] = row["over_float32"] <= max(
                0.02 * mean(exact.values()), row["standard_error"] or 0.0
            )
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Final error over float32's of the same seeds against megabytes, a point a way."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    families = (("float32", "k", "D"), ("EDEN", "tab:orange", "s"), ("trellis", "tab:blue", "o"))
    for family, colour, marker in families:
        for row in (one for one in rows if one["way"].startswith(family) and "over_float32" in one):
            total, over = (row["bytes_up"] + row["bytes_down"]) / 1e6, row["over_float32"]
            axes.errorbar(
                total, over, yerr=row["standard_error"], fmt=marker, color=colour, capsize=3
            )
            axes.annotate(
                f"{row['way']} ({len(row['seeds'])})", (total, over), xytext=(6, 4),
                textcoords="offset points", fontsize=7,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_yticks([-0.5, 0, 0.5, 1, 2, 5], ["-0.5", "0", "0.5", "1", "2", "5"])
    axes.set_xlabel("MB up and down, all clients and rounds, everything counted")
    axes.set_ylabel("final error over float32's of the same seeds, percentage points")
    axes.set_title("in brackets: seeds; bars: standard errors", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def report(out: Path) -> None:
    """Prints the table; writes front.json and front.png."""
    rows = results(out)
    if not rows:
        sys.exit(f"folder {out}: expected finished runs in {out / 'runs'}, found none")
    print(f"{'':24}{'seeds':>6}{'error %':>9}{'- float32':>18}{'b up':>7}{'b down':>8}{'MB':>9}")
    for row in rows:
        error = row.get("standard_error")
        beside = f"{row['over_float32']:+.2f}" if "over_float32" in row else ""
        beside += f" ± {error:.2f}" if error is not None else ""
        beside += " *" if row.get("as_good") else "  "
        total = (row["bytes_up"] + row["bytes_down"]) / 1e6
        print(
            f"{row['way']:24}{len(row['seeds']):6}{row['mean_percent']:9.2f}{beside:>18}"
            f"{row['bits_up']:7.2f}{row['bits_down']:8.2f}{total:9.1f}"
        )
    print("* within 2 %, or one paired standard error, of float32's")
    (out / "front.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, out / "front.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="faces")
    parser.add_argument("--root", default=".fedcunet/data/faces")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--unets", type=int, default=1)
    parser.add_argument("--bits", default="8,1,8")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(WAYS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if not arguments.report:
        for seed in range(arguments.seeds):
            for way in arguments.only or WAYS:
                run(way, seed, arguments)
    report(arguments.out)


if __name__ == "__main__":
    main()
