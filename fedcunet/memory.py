"""Memory and time of a training step, measured: nothing here follows from bit widths.

The bytes come from the events of torch's CPU allocator, which knows nothing of what a tensor is
for: every allocation and every release between the start and the end of a step. The process's
own high-water mark, in a fresh process, is the second opinion.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fedcunet.config import RunConfig
from fedcunet.errors import RunFailure, UserError
from fedcunet.quant.layers import clamp_latent_weights, quantised_weights
from fedcunet.training.local import OPTIMIZERS, STRIDE
from fedcunet.training.losses import regression_loss
from fedcunet.training.network import build_network

FORWARD_DONE = "fedcunet: forward done"
STEP_DONE = "fedcunet: step done"

# With glibc's defaults freed memory stays with the process and the growth of later steps hides
# in it: large blocks are to be mapped, and given back, one by one.
PLAIN_MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What a training step (forward, backward, optimiser) takes."""

    peak_bytes: int  # static bytes + the high-water mark of what the step allocates
    saved_bytes: int  # allocated by the forward pass and still held when it ends
    static_bytes: int  # parameters, buffers, optimiser state, images and targets
    step_seconds: float  # wall time, the shortest of the timed steps


class TrainingStep:
    """A network, an optimiser and one made-up batch: calling it makes a training step.

    Args:
        config: model, bits, crop size, batch size and optimiser are used.
        num_landmarks: K of the heatmaps.
    """

    def __init__(self, config: RunConfig, num_landmarks: int = 16) -> None:
        self.model = build_network(config, num_landmarks).train()
        self.latent = quantised_weights(self.model)
        training = config.training
        self.optimizer = OPTIMIZERS[training.optimizer](
            self.model.parameters(), lr=training.learning_rate
        )
        generator = torch.Generator().manual_seed(config.seed)
        shape, side = (training.batch_size, num_landmarks), config.data.size // STRIDE
        self.images_B3SS = torch.rand(
            training.batch_size, 3, config.data.size, config.data.size, generator=generator
        ).to(memory_format=torch.channels_last)
        self.target_BKSS = torch.rand(*shape, side, side, generator=generator)
        self.labelled_BK = torch.ones(shape, dtype=torch.bool)

    def __call__(self, mark: Callable[[str], object] = lambda name: None) -> float:
        """Makes a step and returns its loss; gradients are gone afterwards.

        Args:
            mark: called with FORWARD_DONE and STEP_DONE where the step gets there.
        """
        heatmaps = self.model(self.images_B3SS)
        mark(FORWARD_DONE)
        loss = regression_loss(heatmaps, self.target_BKSS, self.labelled_BK)
        del heatmaps  # as in the training loop, where nothing holds them
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        clamp_latent_weights(self.latent)
        mark(STEP_DONE)
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def static_bytes(self) -> int:
        """Bytes that stay from step to step: state of model and optimiser, images, targets."""
        state = [
            value
            for values in self.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        batch = [self.images_B3SS, self.target_BKSS, self.labelled_BK]
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *state, *batch])


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def allocator_bytes(run: Callable[[Callable[[str], object]], object]) -> dict[str, int]:
    """Runs `run(mark)` once and returns allocator bytes, relative to the start.

    Returns:
        For each name that `run` marks: bytes held at that moment; and under "peak" the most that
        was held at any moment.
    """

    def mark(name: str) -> None:
        with record_function(name):
            pass

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(mark)
    results = profiler.profiler.kineto_results
    if results is None:
        raise RunFailure("the profiler of this build of torch reports no events")
    timeline: list[tuple[int, str, int]] = []
    for event in results.events():
        name = event.name()
        if name == "[memory]":
            if event.device_type() == DeviceType.CPU:
                timeline.append((event.start_ns(), "", event.nbytes()))
        elif name in (FORWARD_DONE, STEP_DONE):
            timeline.append((event.start_ns(), name, 0))
    held, found = 0, {"peak": 0}
    # The sort is stable: events of one nanosecond stay in the order in which they came.
    for _, name, size in sorted(timeline, key=lambda entry: entry[0]):
        held += size
        found["peak"] = max(found["peak"], held)
        if name:
            found[name] = held
    return found


def measure(
    step: TrainingStep, other: TrainingStep | None = None, *, repeats: int = 3
) -> tuple[StepCost, StepCost | None]:
    """The cost of `step`, and of `other` beside it.

    The timed steps of the two take turns, so that a busy machine slows both alike.

    Args:
        step: of the setting asked for.
        other: of the setting to compare with.
        repeats: timed steps of each, at least 1; the shortest counts.
    """
    steps = [step] if other is None else [step, other]
    for each in steps:
        each()  # the optimiser's state and the libraries' work spaces come with the first step
    memory = [allocator_bytes(each) for each in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for times, each in zip(seconds, steps, strict=True):
            begin = time.perf_counter()
            each()
            times.append(time.perf_counter() - begin)
    costs = [
        StepCost(
            peak_bytes=each.static_bytes() + found["peak"],
            saved_bytes=found[FORWARD_DONE],
            static_bytes=each.static_bytes(),
            step_seconds=min(times),
        )
        for each, found, times in zip(steps, memory, seconds, strict=True)
    ]
    return costs[0], costs[1] if other is not None else None


def naive(config: RunConfig) -> RunConfig:
    """The same network, batch and optimiser in float32 with plain autograd."""
    return config.replace(quant__bits="32,32,32", quant__alpha=False, quant__storage="float32")


def compare_with_naive(
    config: RunConfig, num_landmarks: int = 16, *, repeats: int = 3
) -> dict[str, object]:
    """The keys of `fedcunet memory --json`: the setting, naive float32, and their ratios."""
    cost, reference = measure(
        TrainingStep(config, num_landmarks),
        TrainingStep(naive(config), num_landmarks),
        repeats=repeats,
    )
    assert reference is not None
    return {
        **asdict(cost),
        "naive_float32": asdict(reference),
        "peak_ratio": cost.peak_bytes / reference.peak_bytes,
        "step_ratio": cost.step_seconds / reference.step_seconds,
    }


def resident_growth(config: RunConfig, num_landmarks: int = 16) -> int:
    """Bytes by which the first step raises a fresh process's high-water mark (Linux).

    The mark is reset before the step; its growth is over what is resident then, with network and
    batch in place. The first step also makes the optimiser's state.

    Raises:
        UserError: where the system has no /proc/self/clear_refs.
        RunFailure: if the process fails.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("the growth of the high-water mark: this needs Linux's /proc")
    code = (
        "import json, sys; from fedcunet.memory import _grow; "
        "print(_grow(json.loads(sys.argv[1]), int(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(config.flat()), str(num_landmarks)],
        env={**os.environ, **PLAIN_MALLOC},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RunFailure(f"the measured process failed: {lines[-1] if lines else done.returncode}")
    return int(done.stdout)


def _grow(flat: dict[str, bool | int | float | str], num_landmarks: int) -> int:
    torch.set_num_threads(1)
    step = TrainingStep(RunConfig.from_flat(flat), num_landmarks)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RunFailure(f"/proc/self/status has no {field}")
