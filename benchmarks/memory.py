"""Memory and time of training steps beside naive float32, on one thread of the CPU, as JSON.

    python benchmarks/memory.py [--unets 4 ...] [--batch 4 ...] [--size 256] [--settings NAME ...]
                                [--repeats N] [--no-resident] [--out FILE]

Each row holds what `fedcunet memory --json` prints and, beside the allocator's figures,
`resident_bytes`: by how much the first step raises the high-water mark of a fresh process
(Linux). That includes what the allocator does not see: work space of the libraries, their code,
fragments of pages.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from fedcunet.config import RunConfig
from fedcunet.memory import compare_with_naive, naive, resident_growth

SETTINGS: dict[str, dict[str, Any]] = {
    "fake-8-1-8": {"bits": "8,1,8", "alpha": True},
    "recomputed-float32": {"bits": "32,32,32", "storage": "packed"},
    "packed-8-1-8": {"bits": "8,1,8", "alpha": True, "storage": "packed"},
    "packed-6-1-6": {"bits": "6,1,6", "alpha": True, "storage": "packed"},
    "packed-4-1-4": {"bits": "4,1,4", "alpha": True, "storage": "packed"},
}


def configure(name: str, unets: int, batch: int, size: int) -> RunConfig:
    """The run of a setting by its name; packed storage has quantised sources."""
    quant = SETTINGS[name]
    source = {"input_quantizer": "source"} if quant.get("storage") == "packed" else {}
    return RunConfig().replace(
        model__unets=unets,
        model__order=min(1, unets - 1),
        data__size=size,
        training__batch_size=batch,
        **{f"quant__{key}": value for key, value in {**quant, **source}.items()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unets", type=int, nargs="+", default=[4], help="U-Nets of the networks")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="examples of a step")
    parser.add_argument("--size", type=int, default=256, help="side of the crops")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the shortest counts")
    parser.add_argument("--no-resident", action="store_true", help="no fresh processes")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for unets in arguments.unets:
        for batch in arguments.batch:
            naive_resident = None
            for name in arguments.settings:
                config = configure(name, unets, batch, arguments.size)
                row: dict[str, object] = {"setting": name, "unets": unets, "batch": batch}
                row |= compare_with_naive(config, repeats=arguments.repeats)
                if not arguments.no_resident:
                    if naive_resident is None:
                        naive_resident = resident_growth(naive(config))
                    row["resident_bytes"] = resident_growth(config)
                    row["naive_resident_bytes"] = naive_resident
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.out:
        result = {"size": arguments.size, "threads": 1, "results": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
