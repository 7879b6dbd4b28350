"""NME under attack: the plain mean beside the robust rules, by kind of attack.

    python benchmarks/attacks.py [--data 300w --root DIR] [--out DIR] [--share 0.2] [--clients 10]
                                 [--rounds 12] [--seeds 1] [--only ATTACK/RULE …] [--hours H]
                                 [--setting FILE] [--set KEY=VALUE …]
    python benchmarks/attacks.py --report [--out DIR] [--json]       what is there, at any time

A cell is one federated run (`python -m simulations run --engine loopback`, one core) of one attack,
one rule and one seed; every client is asked in every round, and the share that attacks is the share
that the rules assume. Without `--root`, faces are drawn. A cell that is done is left alone, one
that was interrupted is run anew, and one that failed is tried again by the next call; processes
may share an --out. The cells that tell most come first: all rules under one attack after the other,
the first seed of each.

NME is that of the final model on the test set, each beside the mean's without attackers.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `fedcunet` of this checkout

from fedcunet.errors import FolderInUse
from fedcunet.files import held

OUT = Path(".fedcunet/attacks")
SETTING = Path("simulations/settings/i8-w1-g8-alpha-eden2.toml")
ATTACKS = ("none", "sign-flip", "scaled", "label-shift", "nan")
RULES = ("mean", "trimmed-mean", "median", "multi-krum", "norm-clipping")


@dataclass(frozen=True)
class Cell:
    """One run."""

    attack: str
    rule: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.attack}/{self.rule}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.attack / self.rule / f"seed-{self.seed}"

    def summary(self, out: Path) -> dict[str, Any] | None:
        """The run's summary, None while it is not done."""
        path = self.folder(out) / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def values(self, share: float) -> dict[str, str | float]:
        """What the cell sets."""
        return {
            "federation.attack": self.attack,
            "federation.attackers": 0.0 if self.attack == "none" else share,
            "federation.aggregation": self.rule,
            "federation.assumed-attackers": 0.0 if self.rule == "mean" else share,
        }


def planned(arguments: argparse.Namespace) -> Iterator[Cell]:
    """All cells that were asked for, the most telling first."""
    for seed in range(arguments.seeds):
        for attack in ATTACKS:
            for rule in RULES:
                cell = Cell(attack, rule, seed)
                if not arguments.only or cell.name in arguments.only:
                    yield cell


def work(arguments: argparse.Namespace) -> int:
    """Runs what is missing until the time is up; returns the number of cells that failed."""
    deadline = time.monotonic() + 3600 * arguments.hours
    root = arguments.root or drawn_faces(arguments)
    failed = 0
    for cell in planned(arguments):
        if time.monotonic() >= deadline:
            break
        try:
            with held(cell.folder(arguments.out).with_suffix(".lock")):
                if cell.summary(arguments.out) is None:
                    failed += not run(cell, arguments, root)
        except FolderInUse:
            continue  # another process is at it
    return failed


def run(cell: Cell, arguments: argparse.Namespace, root: str) -> bool:
    """Runs a cell, prints how it went; returns whether it went well."""
    folder = cell.folder(arguments.out)
    shutil.rmtree(folder, ignore_errors=True)  # interrupted
    begin = time.monotonic()
    with folder.with_suffix(".log").open("w") as log:
        code = subprocess.run(
            command(cell, arguments, root),
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
    outcome = "done" if code == 0 else f"failed ({code}): {folder.with_suffix('.log')}"
    print(f"{cell.name} seed {cell.seed}: {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
    return code == 0


def command(cell: Cell, arguments: argparse.Namespace, root: str) -> list[str]:
    """The command line of a cell."""
    values = cell.values(arguments.share) | {"federation.fraction": 1.0}
    assignments = [f"{key}={value}" for key, value in values.items()] + arguments.values
    return [
        sys.executable, "-m", "simulations", "run", str(arguments.setting),
        "--data", arguments.data, "--root", root, "--engine", "loopback",
        "--clients", str(arguments.clients), "--rounds", str(arguments.rounds),
        "--seed", str(cell.seed), "--out", str(cell.folder(arguments.out)), "--json", "--quiet",
        *(word for assignment in assignments for word in ("--set", assignment)),
    ]  # fmt: skip


def drawn_faces(arguments: argparse.Namespace) -> str:
    """The folder of the drawn faces, made where it is not there."""
    root: Path = arguments.out / f"faces-{arguments.num_train}-{arguments.num_test}"
    if not root.exists():
        counts = ["--num-train", str(arguments.num_train), "--num-test", str(arguments.num_test)]
        subprocess.run(
            [sys.executable, "-m", "fedcunet", "data", "make", "faces", "--out", root, *counts],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return str(root)


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is known of each attack and rule; cells that are not done do not count."""
    rows = []
    reference: float | None = None
    for attack in ATTACKS:
        for rule in RULES:
            cells = [Cell(attack, rule, seed) for seed in range(arguments.seeds)]
            found = [one for cell in cells if (one := cell.summary(arguments.out)) is not None]
            if not found:
                continue
            nme = mean(summary["nme_percent"] for summary in found)
            if (attack, rule) == ("none", "mean"):
                reference = nme
            refused = [
                count
                for summary in found
                for reason, count in summary["replies"].items()
                if reason != "accepted"
            ]
            rows.append(
                {
                    "attack": attack,
                    "rule": rule,
                    "attackers": sum(found[0]["attackers"].values()),
                    "clients": found[0]["setting"]["federation.clients"],
                    "seeds": len(found),
                    "nme_percent": nme,
                    "nme_percent_by_seed": [summary["nme_percent"] for summary in found],
                    "ratio": nme / reference if reference else None,
                    "mean_shape_percent": found[0]["mean_shape_percent"],
                    "refused": sum(refused),
                    "rounds_abandoned": sum(summary["rounds_abandoned"] for summary in found),
                }
            )
    return rows


def report(arguments: argparse.Namespace) -> None:
    """Writes OUT/attacks.json and prints the table, or with --json its one value."""
    rows = rows_of(arguments)
    done = [cell.summary(arguments.out) is not None for cell in planned(arguments)]
    value = {"rows": rows, "cells_done": sum(done), "cells": len(done)}
    (arguments.out / "attacks.json").write_text(json.dumps(value, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(value))
        return
    print(f"{'attack':12} {'rule':14} {'hostile':>8} {'seeds':>5} {'NME %':>7} {'ratio':>6} "
          f"{'refused':>7} {'abandoned':>9}")  # fmt: skip
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        hostile = f"{row['attackers']}/{row['clients']}"
        print(f"{row['attack']:12} {row['rule']:14} {hostile:>8} {row['seeds']:>5} "
              f"{row['nme_percent']:>7.2f} {ratio:>6} {row['refused']:>7} "
              f"{row['rounds_abandoned']:>9}")  # fmt: skip
    if rows:
        print(f"mean shape {rows[0]['mean_shape_percent']:.2f} %; ", end="")
    print(f"{sum(done)} of {len(done)} cells done")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="faces", help="data set of faces")
    parser.add_argument("--root", help="its folder; without it faces are drawn into --out")
    parser.add_argument("--num-train", type=int, default=360, help="faces drawn to train on")
    parser.add_argument("--num-test", type=int, default=120, help="faces drawn to test on")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the cells")
    parser.add_argument("--setting", type=Path, default=SETTING, help="what all cells share")
    parser.add_argument("--set", dest="values", action="append", default=[], help="KEY=VALUE of it")
    parser.add_argument("--share", type=float, default=0.2, help="of the clients that attack")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each attack and rule")
    parser.add_argument("--only", nargs="+", default=[], help="cells such as nan/median")
    parser.add_argument("--hours", type=float, default=1e6, help="start no cell after so many")
    parser.add_argument("--report", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--json", action="store_true", help="the report as one JSON value")
    arguments = parser.parse_args()
    names = {f"{attack}/{rule}" for attack in ATTACKS for rule in RULES}
    if unknown := sorted(set(arguments.only) - names):
        parser.error(f"--only: expected ATTACK/RULE such as nan/median, found {unknown[0]}")
    if arguments.root is None and arguments.data != "faces":
        parser.error(f"--data {arguments.data}: expected --root DIR beside it")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = 0 if arguments.report else work(arguments)
    report(arguments)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
