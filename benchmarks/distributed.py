"""Data-parallel training of two processes with k-bit gradients against float32 all-reduce, as JSON.

    python benchmarks/distributed.py [--epochs N] [--unets N] [--out FILE]

The same network, seed, images and steps for every codec, by `torchrun … fedcunet train
--distributed`. Bytes are those that a process hands over for the gradients of a step: of coded ones
counted, of float32 calculated, as a ring all-reduce sends them. The step time is that of the
fastest epoch, since other work on the machine only ever adds to it; on one machine nothing is
gained by sending less, so the ratio is what coding costs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CODECS: list[tuple[str, float]] = [
    ("float32", 32),
    ("linear-nearest", 8),
    ("eden", 2),
    ("sign", 1),
]
PROCESSES, BATCH, IMAGES = 2, 4, 96


def train(
    codec: str, bits: float, data: Path, out: Path, epochs: int, unets: int
) -> dict[str, Any]:
    """One training; its figures."""
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(PROCESSES), "-m", "fedcunet", "train", "--distributed"),
            *("--exchange", codec, "--exchange-bits", str(bits)),
            *("--data", "faces", "--root", str(data), "--out", str(out)),
            *("--unets", str(unets), "--size", "64", "--batch-size", str(BATCH)),
            *("--epochs", str(epochs), "--optimizer", "adam", "--learning-rate", "1e-3"),
            *("--schedule", "constant"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    steps = IMAGES // PROCESSES // BATCH
    return {
        "codec": codec,
        "bits": bits,
        "steps": steps * epochs,
        "loss": [line["loss"] for line in history],
        "bytes_per_step": history[-1]["gradient_bytes_per_step"],
        "step_seconds": min(line["seconds"] for line in history) / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--unets", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = ["fedcunet", "data", "make", "faces", "--out", str(folder / "faces")]
        make += ["--num-train", str(IMAGES), "--num-test", "8"]
        subprocess.run(
            [sys.executable, "-m", *make], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        for codec, bits in CODECS:
            out = folder / codec
            row = train(codec, bits, folder / "faces", out, arguments.epochs, arguments.unets)
            first = results[0] if results else row
            row["fewer_bytes"] = first["bytes_per_step"] / row["bytes_per_step"]
            row["step_ratio"] = row["step_seconds"] / first["step_seconds"]
            print(json.dumps(row), file=sys.stderr, flush=True)
            results.append(row)
    text = json.dumps({"processes": PROCESSES, "results": results}, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
