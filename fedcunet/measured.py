"""What a training step needs, measured once a setting in a process of its own and kept in a file.

A process of its own is a fresh one, whose high-water mark says what the whole of it took, and it
has a limit: a step that does not fit into the memory that is free ends there and nowhere else.
"""

import functools
import gc
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil
import torch

from fedcunet.config import RunConfig, Scalar
from fedcunet.errors import RunFailure
from fedcunet.files import write_atomically
from fedcunet.memory import TrainingStep, naive, step_bytes

# With glibc's defaults freed memory stays with the process, and growth hides in it: large blocks
# are to be mapped, and given back, one by one.
PLAIN_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
FREE_SHARE = 0.9  # of the memory that is free, what a measured process may take
_PACKAGE = Path(__file__).resolve().parent
_CHILD = "from fedcunet.measured import _child; _child()"
_RESET_MARK = Path("/proc/self/clear_refs")  # Linux


class NotMeasured(RunFailure):
    """A step could not be measured, most often because it does not fit into the free memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNeed:
    """What a training step takes, measured in a fresh process."""

    peak_bytes: int  # of torch's allocator: static bytes + the high-water mark of the step
    static_bytes: int  # parameters, buffers, optimiser state, images and targets
    # High-water mark of the process: Python, the libraries, the network, the step.
    resident_bytes: int
    growth_bytes: int  # its growth since before the network was made


def free_memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that new processes can take: free on the machine, or left in a container's limit.

    Of a container's usage its inactive cached files do not count: they give way, as those of the
    machine do.
    """
    free = int(psutil.virtual_memory().available)
    for folder, limit_name, usage_name, cached in (
        (cgroup, "memory.max", "memory.current", "inactive_file"),
        (
            cgroup / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        try:
            limit = int((folder / limit_name).read_text())
            usage = int((folder / usage_name).read_text())
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        usage -= _figure(folder / "memory.stat", cached)
        free = min(free, max(0, limit - usage))
    return free


def _figure(path: Path, name: str) -> int:
    """A figure of a file of lines "name number"; 0 where it is not there."""
    try:
        return int(dict(line.split() for line in path.read_text().splitlines())[name])
    except (OSError, ValueError, KeyError):
        return 0


def step_need(config: RunConfig, num_landmarks: int) -> StepNeed:
    """What a step of the setting takes, from the file of an earlier measurement if there is one.

    Measurements are kept in the folder `federation.measured-dir`, a file for each network, bit
    widths, crop size, batch size and optimiser; torch and this program's code are part of the key.

    Raises:
        NotMeasured: the step does not fit into the free memory, or the process failed.
    """
    key = _key(config, num_landmarks)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    path = Path(config.federation.measured_dir) / f"{name}.json"
    found = _read(path, key)
    if found is None:
        found = measure_need(config, num_landmarks)
        write_atomically(path, json.dumps({"key": key, "need": asdict(found)}, indent=1) + "\n")
    return found


def measure_need(config: RunConfig, num_landmarks: int, device: str = "cpu") -> StepNeed:
    """Measures a step in a fresh process whose memory is limited to what is free.

    The process holds freed memory as any process that trains does.

    Args:
        config: the setting.
        num_landmarks: K of the heatmaps.
        device: torch's name of the device; the resident bytes are the process's on any of them.

    Raises:
        NotMeasured: the step does not fit, or the process failed.
    """
    return StepNeed(**run_child("need", config, num_landmarks, device, plain_malloc=False))


def resident_growth(config: RunConfig, num_landmarks: int = 16) -> dict[str, int]:
    """By how much the first step raises a fresh process's high-water mark (Linux).

    Returns:
        "growth_bytes", over what is resident before the step, when network and batch are in
        place (the first step also makes the optimiser's state); and "static_before_bytes", which
        network and batch take: an allocator's peak minus these is what the growth compares with.

    Raises:
        NotMeasured: the step does not fit, the process failed, or the system is not Linux.
    """
    return run_child("growth", config, num_landmarks, "cpu", plain_malloc=True)


def summary_figures(config: RunConfig, num_landmarks: int) -> dict[str, Any]:
    """`training_peak_bytes` and `training_peak_ratio` (to naive float32) of a run's summary.

    What could not be measured is None, and `training_peak_note` says why.
    """
    figures: dict[str, Any] = {"training_peak_bytes": None, "training_peak_ratio": None}
    try:
        figures["training_peak_bytes"] = step_need(config, num_landmarks).peak_bytes
        reference = step_need(naive(config), num_landmarks).peak_bytes
        figures["training_peak_ratio"] = figures["training_peak_bytes"] / reference
    except NotMeasured as failure:
        what = "naive float32: " if figures["training_peak_bytes"] else ""
        figures["training_peak_note"] = f"{what}{failure}"
    return figures


def run_child(
    task: str,
    config: RunConfig,
    num_landmarks: int,
    device: str = "cpu",
    *,
    plain_malloc: bool,
    limit_bytes: int | None = None,
) -> dict[str, int]:
    """Runs a task of `_TASKS` in a fresh process and returns its figures.

    Args:
        task: its name.
        config: the setting.
        num_landmarks: K of the heatmaps.
        device: torch's name of the device.
        plain_malloc: give freed memory back at once, so that growth is that of one step.
        limit_bytes: of the process's data (RLIMIT_DATA); by default `FREE_SHARE` of what is free.
            CUDA, whose driver maps far more than it uses, has its own limit.
    """
    limit = int(FREE_SHARE * free_memory_bytes()) if limit_bytes is None else limit_bytes
    threads = str(config.training.threads)
    # This very package, wherever it was loaded from.
    path = os.pathsep.join([str(_PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CHILD],
        input=json.dumps([task, config.flat(), num_landmarks, device, limit]),
        env=os.environ | environment | (PLAIN_MALLOC if plain_malloc else {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        figures: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
        return figures
    lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    # Killed, or C++ that ran out of memory: neither leaves a Python error.
    if "CUDA" in lines[-1]:
        raise NotMeasured(lines[-1][:200])
    if done.returncode < 0 or "alloc" in lines[-1] or "memory" in lines[-1].lower():
        raise NotMeasured(f"a training step needs more than the {limit / 1e9:.1f} GB it may take")
    raise NotMeasured(f"the measured process failed: {lines[-1]}")


def _key(config: RunConfig, num_landmarks: int) -> dict[str, Scalar]:
    """What the need of a step depends on."""
    flat = config.flat()
    chosen = {key: value for key, value in flat.items() if key.startswith(("model.", "quant."))}
    for key in ("data.size", "training.batch-size", "training.optimizer", "training.threads"):
        chosen[key] = flat[key]
    machine = {"torch": torch.__version__, "machine": platform.machine(), "code": _code_hash()}
    return chosen | machine | {"landmarks": num_landmarks}


@functools.cache
def _code_hash() -> str:
    """Of the code that a training step runs: a measurement of other code is none of this."""
    digest = hashlib.sha256()
    for name in ("models", "quant", "training", "bits.py", "memory.py", "measured.py"):
        for path in sorted([_PACKAGE / name, *(_PACKAGE / name).rglob("*.py")]):
            if path.is_file():
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read(path: Path, key: dict[str, Scalar]) -> StepNeed | None:
    """The measurement in a file; None where there is none that is whole and of this key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        need = content["need"]
        if content["key"] != key or not all(
            type(need[field.name]) is int and need[field.name] >= 0 for field in fields(StepNeed)
        ):
            return None
        return StepNeed(**need)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# What runs in the fresh process.


def _child() -> None:
    task, flat, num_landmarks, device, limit = json.loads(sys.stdin.read())
    config = RunConfig.from_flat(flat)
    if device == "cpu":
        _limit_data(limit)
    torch.set_num_threads(config.training.threads)
    print(json.dumps(_TASKS[task](config, num_landmarks, device)))


def _limit_data(limit_bytes: int) -> None:
    """Lets allocations fail beyond so many bytes of data, where the system knows such a limit."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
    except (ImportError, ValueError, OSError):
        return


def _need(config: RunConfig, num_landmarks: int, device: str) -> dict[str, int]:
    before = psutil.Process().memory_info().rss
    step = TrainingStep(config, num_landmarks, device)
    step.warm_up()
    step()
    # Before the profiler comes, whose log of events takes hundreds of megabytes.
    resident = high_water_bytes()
    peak = step_bytes(step)["peak"]
    static = step.static_bytes()
    return asdict(
        StepNeed(
            peak_bytes=static + peak,
            static_bytes=static,
            resident_bytes=resident,
            growth_bytes=resident - before,
        )
    )


def _growth(config: RunConfig, num_landmarks: int, device: str) -> dict[str, int]:
    if not _RESET_MARK.exists():
        raise RunFailure("the growth of the high-water mark: this needs Linux's /proc")
    step = TrainingStep(config, num_landmarks, device)
    gc.collect()
    _RESET_MARK.write_text("5")  # sets the mark back to what is resident now
    before, static = psutil.Process().memory_info().rss, step.static_bytes()
    step()
    return {"growth_bytes": high_water_bytes() - before, "static_before_bytes": static}


def high_water_bytes() -> int:
    """The most that this process has had resident."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_TASKS = {"need": _need, "growth": _growth}
