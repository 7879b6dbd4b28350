"""A run killed again and again (kill -9) and resumed each time, beside one that was left in peace.

    python benchmarks/resume.py [--data faces --root DIR] [--kills 10] [--setting FILE]
        [--rounds 6] [--seed 0] [--engine loopback] [--out DIR]

The kills are spread over the run's rounds, each at a moment of a round that is drawn from the
seed. Prints the hashes of both final models, which must be equal, and how far the run had come at
each kill; exit code 1 if they differ or no kill came in time. Writes resume.json into the folder,
which must be new.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def command(arguments: argparse.Namespace, out: Path) -> list[str]:
    words = [sys.executable, "-m", "simulations", "run", arguments.setting, "--quiet"]
    words += ["--resume"] if out.exists() else []
    words += ["--data", arguments.data, "--root", arguments.root, "--rounds", arguments.rounds]
    words += ["--engine", arguments.engine, "--out", out]
    return [str(word) for word in (*words, "--set", f"federation.state-dir={out.parent / 'state'}")]


def rounds_done(out: Path) -> int:
    """Rounds whose lines are in the run folder."""
    try:
        return len((out / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def killed(arguments: argparse.Namespace, out: Path, rounds: int, seconds: float) -> bool:
    """Starts or resumes the run and kills it `seconds` after that many rounds; False if done."""
    process = subprocess.Popen(command(arguments, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and (
        not (out / "checkpoint").exists() or rounds_done(out) < rounds
    ):
        time.sleep(0.02)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True
    if process.returncode:
        raise SystemExit(f"a resumed run ended with exit code {process.returncode}")
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="faces")
    parser.add_argument("--root", default=".fedcunet/data/faces")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--setting", default="simulations/settings/i8-w2-g8-sign.toml")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--engine", default="loopback")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(".fedcunet/resume"))
    arguments = parser.parse_args()
    if arguments.out.exists():  # a run that is there would not be killed
        parser.error(f"--out {arguments.out}: expected a folder that is not there yet")
    through, out = arguments.out / "through", arguments.out / "killed"
    begin = time.monotonic()
    subprocess.run(command(arguments, through), stdout=subprocess.DEVNULL, check=True)
    seconds = time.monotonic() - begin
    generator = random.Random(arguments.seed)
    kills: list[dict[str, Any]] = []
    for number in range(arguments.kills):
        target = number * arguments.rounds // arguments.kills
        life = generator.uniform(0, seconds / arguments.rounds)
        before = rounds_done(out)
        if not killed(arguments, out, target, life):
            break
        kills.append({"seconds": life, "rounds_before": before, "rounds_after": rounds_done(out)})
        print(
            f"kill {len(kills)}: {life:.1f} s into a round, rounds {before} -> {rounds_done(out)}"
        )
    subprocess.run(command(arguments, out), stdout=subprocess.DEVNULL, check=True)
    hashes = [
        json.loads((folder / "summary.json").read_text())["checkpoint_sha256"]
        for folder in (through, out)
    ]
    result = {"kills": kills, "undisturbed": hashes[0], "killed": hashes[1]}
    (arguments.out / "resume.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"undisturbed {hashes[0]}\nkilled      {hashes[1]}  {len(kills)} times")
    raise SystemExit(0 if hashes[0] == hashes[1] and kills else 1)


if __name__ == "__main__":
    main()
