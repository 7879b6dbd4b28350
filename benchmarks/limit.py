"""The deepest DU-Net that trains within a limit of memory, found by training under it, as JSON.

    python benchmarks/limit.py [--limit-gb 1.0] [--size 256] [--batch 1] [--bits 8,1,8]
                               [--levels NAME ...] [--steps 3] [--start 1] [--most 64] [--out FILE]

Each depth is tried in a process of its own, which makes real training steps (forward, backward,
optimiser) and prints the losses. The limit is hard: a memory cgroup by `systemd-run` where the
user has a systemd that can give one (whatever the process holds counts, and it is killed beyond
it), else RLIMIT_DATA (all private writable memory, touched or not: stricter than what is
resident, but for code and files that are mapped). A depth passes if its process ends well, its
losses are finite, and its high-water mark (VmHWM: Python, torch and all) is within the limit.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedcunet.config import RunConfig
from fedcunet.errors import UserError
from fedcunet.files import write_atomically
from fedcunet.sweep import LEVELS, quant_values

# How a process says that it got none: torch, Python, C++, the loader of libraries.
NO_MEMORY = ("memory", "alloc")
# Many small arenas and held blocks would count; in a small process memory is to go back at once.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


def has_cgroup() -> bool:
    """Whether `systemd-run` can start a process with a memory limit for this user."""
    if shutil.which("systemd-run") is None:
        return False
    tried = subprocess.run([*_scope(10**8), "true"], capture_output=True, check=False)
    return tried.returncode == 0


def _scope(limit_bytes: int) -> list[str]:
    return [
        "systemd-run", "--user", "--scope", "--quiet",
        "-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0",
    ]  # fmt: skip


def configure(bits: str, level: str, unets: int, batch: int, size: int) -> RunConfig:
    """The setting of one try."""
    return RunConfig().replace(
        model__unets=unets,
        model__order=min(1, unets - 1),
        data__size=size,
        training__batch_size=batch,
        **quant_values(bits, level),
    )


def train(config: RunConfig, steps: int, limit_bytes: int, rlimit: bool) -> None:
    """In the child: makes the steps under the limit and prints a line of JSON."""
    if rlimit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    import torch

    from fedcunet.measured import high_water_bytes
    from fedcunet.memory import TrainingStep

    torch.set_num_threads(1)
    floor = high_water_bytes()
    step = TrainingStep(config)
    losses = [step() for _ in range(steps)]
    print(json.dumps({"losses": losses, "high_water": high_water_bytes(), "floor": floor}))


def attempt(config: RunConfig, steps: int, limit_bytes: int, cgroup: bool) -> dict[str, Any]:
    """One try in a fresh process: "fits", its high-water mark and losses, or why not."""
    given = json.dumps({"flat": config.flat(), "steps": steps, "limit": limit_bytes})
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    done = subprocess.run(
        [*(_scope(limit_bytes) if cgroup else []), *command],
        input=given + "\n" + json.dumps(not cgroup),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        if done.returncode > 0 and not any(word in lines[-1].lower() for word in NO_MEMORY):
            sys.exit(f"limit.py: a try failed, and not for memory: {lines[-1][:200]}")
        return {"fits": False, "why": lines[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    trains = all(map(math.isfinite, found["losses"]))
    return {"fits": trains and found["high_water"] <= limit_bytes} | found


def deepest(
    bits: str, level: str, arguments: argparse.Namespace, limit_bytes: int, cgroup: bool
) -> dict[str, Any]:
    """Doubles the depth until it does not fit, then bisects."""
    tries: dict[int, dict[str, Any]] = {}

    def fits(unets: int) -> bool:
        config = configure(bits, level, unets, arguments.batch, arguments.size)
        tries[unets] = attempt(config, arguments.steps, limit_bytes, cgroup)
        print(json.dumps({"bits": bits, "storage": level, "unets": unets} | tries[unets]),
              file=sys.stderr, flush=True)  # fmt: skip
        return bool(tries[unets]["fits"])

    good, bad = 0, arguments.start
    while bad <= arguments.most and fits(bad):
        good, bad = bad, 2 * bad
    if bad > arguments.most:
        bad = arguments.most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {
        "bits": bits,
        "storage": level,
        "deepest_unets": good,
        "most_tried": max(tries),
        "at_deepest": tries.get(good),
        "one_deeper": tries.get(good + 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit-gb", type=float, default=1.0, help="10^9 bytes")
    parser.add_argument("--size", type=int, default=256, help="side of the crops")
    parser.add_argument("--batch", type=int, default=1, help="examples of a step")
    parser.add_argument("--bits", default="8,1,8", help="of the quantised levels")
    parser.add_argument("--levels", nargs="+", default=["naive", *LEVELS[1:]],
                        choices=["naive", *LEVELS], help="naive: float32 throughout")  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, help="training steps of a try")
    parser.add_argument("--start", type=int, default=1, help="U-Nets that are tried first")
    parser.add_argument("--most", type=int, default=64, help="U-Nets tried at most, up to 64")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        given, rlimit = map(json.loads, sys.stdin.read().splitlines())
        config = RunConfig.from_flat(given["flat"])
        train(config, given["steps"], given["limit"], rlimit)
        return
    if not 1 <= arguments.start <= arguments.most <= 64:
        parser.error("--start, --most: expected 1 to 64, the U-Nets that a setting may have")
    if arguments.steps < 1:
        parser.error(f"--steps: expected 1 or more, found {arguments.steps}")
    try:
        configure(arguments.bits, "float32", 1, arguments.batch, arguments.size)
    except UserError as error:
        parser.error(str(error))
    limit_bytes, cgroup = int(arguments.limit_gb * 1e9), has_cgroup()
    results = []
    for level in arguments.levels:
        bits = "32,32,32" if level == "naive" else arguments.bits
        storage = "float32" if level == "naive" else level
        results.append(deepest(bits, storage, arguments, limit_bytes, cgroup))
    text = json.dumps(
        {
            "limit_bytes": limit_bytes,
            "limit": "memory cgroup (systemd-run)" if cgroup else "RLIMIT_DATA and VmHWM",
            "size": arguments.size,
            "batch": arguments.batch,
            "results": results,
        },
        indent=1,
    )
    print(text)
    if arguments.out:
        write_atomically(arguments.out, text + "\n")


if __name__ == "__main__":
    main()
