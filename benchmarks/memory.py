"""What a training step takes beside naive float32, with the figures that are wanted, as JSON.

    python benchmarks/memory.py [--only PART ...] [--levels NAME ...] [--repeats N] [--out FILE]

Parts, all at 256×256 on one thread of the CPU: du4 (DU-Net(4), batch 4: 8-1-8 and 6-1-6 in each
level of storage), du4-batch1, du4-batch16, du16 (DU-Net(16), batch 4), du16-batch1, float32 (the
pure float32 network with recomputation, no quantisation). A part that does not fit into the
memory that is free is left out, and says so.

Each row holds the keys of `fedcunet memory --json` and, where a figure is wanted, that figure and
whether it is met. `resident_growth_bytes` is by how much the first step raises the high-water mark
of a fresh process (Linux), `allocator_growth_bytes` the same growth by the allocator's figures;
the first may be 30 MB above the second: work space of the libraries, their code, pages.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fedcunet.config import RunConfig
from fedcunet.files import write_atomically
from fedcunet.measured import FREE_SHARE, free_memory_bytes, resident_growth
from fedcunet.memory import TrainingStep, measure, naive, ratios
from fedcunet.sweep import LEVELS, quant_values

SIZE = 256
BEYOND_ALLOCATOR = 30 * 10**6
# Naive float32, of `fedcunet memory`: bytes of a U-Net and image, and of a U-Net.
NAIVE_IMAGE_BYTES, NAIVE_UNET_BYTES = 85 * 10**6, 20 * 10**6
QUANTISED = ("8,1,8", "6,1,6")
FLOAT32 = ("32,32,32",)
RATIOS = ("peak_ratio", "step_ratio")  # over those of naive float32
Wanted = tuple[float | None, float | None]  # of each of them, at most
NOTHING: Wanted = (None, None)
# A further level: latent weights in bfloat16, of the networks of batch 1, where weights weigh most.
BFLOAT16 = "frugal-bfloat16"
CHOICES = (*LEVELS[1:], BFLOAT16)


@dataclass(frozen=True)
class Part:
    """Steps of one network at one batch size.

    Attributes:
        unets: U-Nets of the network.
        batch: examples of a step.
        bits: bit widths; each is measured in each level of storage but float32.
        wanted: the figures wanted, by bit widths and level.
    """

    unets: int
    batch: int
    bits: tuple[str, ...]
    wanted: dict[tuple[str, str], Wanted]


BATCH_4: dict[tuple[str, str], Wanted] = {
    ("8,1,8", "packed"): (0.11, 1.4),
    ("8,1,8", "frugal"): (0.06, 1.8),
    ("6,1,6", "packed"): (0.10, 1.7),
    ("6,1,6", "frugal"): (0.055, 2.3),
}
PARTS = {
    "du4": Part(4, 4, QUANTISED, BATCH_4),
    "float32": Part(4, 4, FLOAT32, {("32,32,32", "packed"): (0.25, 1.3)}),
    "du4-batch1": Part(4, 1, QUANTISED, {}),
    "du16-batch1": Part(
        16,
        1,
        ("8,1,8",),
        {
            ("8,1,8", "packed"): (0.16, None),
            ("8,1,8", "frugal"): (0.08, None),
            ("8,1,8", BFLOAT16): (0.08, None),
        },
    ),
    "du16": Part(16, 4, QUANTISED, BATCH_4),
    "du4-batch16": Part(4, 16, QUANTISED, {}),
}


def configure(part: Part, bits: str, level: str) -> RunConfig:
    """The setting of a row."""
    values = quant_values(bits, "frugal" if level == BFLOAT16 else level)
    if level == BFLOAT16:
        values["quant__latent"] = "bfloat16"
    return RunConfig().replace(
        model__unets=part.unets,
        data__size=SIZE,
        training__batch_size=part.batch,
        **values,
    )


def growth_of(config: RunConfig, peak_bytes: int) -> dict[str, int]:
    """The process's growth in its first step beside the allocator's."""
    found = resident_growth(config)
    return {
        "resident_growth_bytes": found["growth_bytes"],
        "allocator_growth_bytes": peak_bytes - found["static_before_bytes"],
    }


def rows_of(part: Part, levels: list[str]) -> list[tuple[str, str]]:
    """Bits and level of each row of a part; float32 is measured packed alone."""
    return [
        (bits, level)
        for bits in part.bits
        for level in levels
        if (level == "packed" or bits != "32,32,32") and (level != BFLOAT16 or part.batch == 1)
    ]


def measure_part(
    part: Part, levels: list[str], repeats: int, resident: bool
) -> list[dict[str, Any]]:
    """The rows of a part: measured in turns with naive float32, wanted, and whether it is met."""
    torch.set_num_threads(1)
    chosen = rows_of(part, levels)
    configs = [configure(part, bits, level) for bits, level in chosen]
    plain = naive(configs[0])
    reference, *costs = measure([TrainingStep(c) for c in (plain, *configs)], repeats=repeats)
    naive_row: dict[str, Any] = asdict(reference)
    if resident:
        naive_row |= growth_of(plain, reference.peak_bytes)
    rows: list[dict[str, Any]] = []
    for (bits, level), config, cost in zip(chosen, configs, costs, strict=True):
        row: dict[str, Any] = {"unets": part.unets, "batch": part.batch}
        row |= {"bits": bits, "storage": level, **asdict(cost), **ratios(cost, reference)}
        met: dict[str, bool] = {}
        for key, limit in zip(RATIOS, part.wanted.get((bits, level), NOTHING), strict=True):
            if limit is not None:
                row.setdefault("wanted", {})[key] = limit
                met[key] = row[key] <= limit
        if resident:
            row |= growth_of(config, cost.peak_bytes)
            beyond = row["resident_growth_bytes"] - row["allocator_growth_bytes"]
            met["resident_growth"] = beyond <= BEYOND_ALLOCATOR
        rows.append(row | {"naive_float32": naive_row, "met": met})
    return rows


def line_of(name: str, row: dict[str, Any]) -> str:
    """A row in words."""
    wanted = row.get("wanted", {})
    parts = [f"{name:12} {row['bits']:8} {row['storage']:15}"]
    for key, label in (("peak_ratio", "peak"), ("step_ratio", "step")):
        limit = wanted.get(key)
        asked = "" if limit is None else f" (wanted {limit:g})"
        parts.append(f"{label} {row[key]:.3f}{asked}")
    parts.append(f"{row['peak_bytes'] / 1e6:.1f} MB")
    if "resident_growth_bytes" in row:
        own, allocator = row["resident_growth_bytes"], row["allocator_growth_bytes"]
        parts.append(f"process +{own / 1e6:.1f} MB, allocator +{allocator / 1e6:.1f} MB")
    missed = [key for key, good in row["met"].items() if not good]
    return "  ".join([*parts, f"MISSED: {', '.join(missed)}" if missed else ""]).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts")
    parser.add_argument("--levels", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the shortest counts")
    parser.add_argument("--no-resident", action="store_true", help="no fresh processes")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    for name in arguments.only:
        part = PARTS[name]
        needed = part.unets * (part.batch * NAIVE_IMAGE_BYTES + NAIVE_UNET_BYTES)
        free = FREE_SHARE * free_memory_bytes()
        if not rows_of(part, arguments.levels):
            results[name] = f"left out: has no {' or '.join(arguments.levels)}"
        elif needed > free:
            results[name] = (
                f"left out: naive float32 needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} free"
            )
        else:
            # A process for each part: what the allocator keeps of one is not the next one's.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                work = pool.submit(
                    measure_part,
                    part,
                    arguments.levels,
                    arguments.repeats,
                    not arguments.no_resident,
                )
                results[name] = work.result()
        if isinstance(results[name], str):
            print(f"{name}: {results[name]}", flush=True)
        else:
            for row in results[name]:
                print(line_of(name, row), flush=True)
        if arguments.out:  # after each part, so that an interruption loses no more than one
            text = json.dumps({"size": SIZE, "threads": 1, "results": results}, indent=1)
            write_atomically(arguments.out, text + "\n")
    print(json.dumps({"size": SIZE, "threads": 1, "results": results}))


if __name__ == "__main__":
    main()
