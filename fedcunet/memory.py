"""Memory and time of a training step, measured: nothing here follows from bit widths.

On the CPU the bytes come from the events of torch's allocator, which knows nothing of what a
tensor is for: every allocation and every release between the start and the end of a step. On CUDA
they come from the allocator's statistics. The growth of a fresh process's high-water mark is the
second opinion on the CPU (`fedcunet/measured.py`).
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from fedcunet.config import QuantConfig, RunConfig
from fedcunet.errors import RunFailure
from fedcunet.quant.layers import clamp_latent_weights, quantised_weights
from fedcunet.quant.storage import Stored
from fedcunet.training.checkpoint import to_device
from fedcunet.training.local import STRIDE, make_optimizer
from fedcunet.training.losses import regression_loss
from fedcunet.training.network import build_network

BEGIN = "fedcunet: begin"
FORWARD_DONE = "fedcunet: forward done"
STEP_DONE = "fedcunet: step done"


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What a training step (forward, backward, optimiser) takes."""

    peak_bytes: int  # static bytes + the high-water mark of what the step allocates
    saved_bytes: int  # allocated by the forward pass and still held when it ends
    static_bytes: int  # parameters, buffers, state of optimiser and rounding, images and targets
    step_seconds: float  # wall time, the shortest of the timed steps


class TrainingStep:
    """A network, an optimiser and one made-up batch: calling it makes a training step.

    Args:
        config: model, bits, crop size, batch size and optimiser are used.
        num_landmarks: K of the heatmaps.
        device: torch's name of the device.
    """

    def __init__(self, config: RunConfig, num_landmarks: int = 16, device: str = "cpu") -> None:
        self.model = to_device(build_network(config, num_landmarks), device).train()
        self.device = torch.device(device)
        self.latent = quantised_weights(self.model)
        training = config.training
        self.optimizer = make_optimizer(self.model, training, training.learning_rate)
        generator = torch.Generator().manual_seed(config.seed)
        shape, side = (training.batch_size, num_landmarks), config.data.size // STRIDE
        self.images_B3SS = torch.rand(
            training.batch_size, 3, config.data.size, config.data.size, generator=generator
        ).to(self.device, memory_format=torch.channels_last)
        self.target_BKSS = torch.rand(*shape, side, side, generator=generator).to(self.device)
        self.labelled_BK = torch.ones(shape, dtype=torch.bool, device=self.device)

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

    def warm_up(self) -> None:
        """Makes a step on two of the examples: the optimiser's state comes with the first step."""
        batch = self.images_B3SS, self.target_BKSS, self.labelled_BK
        self.images_B3SS, self.target_BKSS, self.labelled_BK = (part[:2] for part in batch)
        self()
        self.images_B3SS, self.target_BKSS, self.labelled_BK = batch

    def static_bytes(self) -> int:
        """Bytes that stay from step to step: state of model, optimiser, rounding; the batch."""
        state = [
            value
            for values in self.optimizer.state.values()
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        if isinstance(self.model, Stored):
            state += self.model.rounding.held()
        batch = [self.images_B3SS, self.target_BKSS, self.labelled_BK]
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *state, *batch])


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


Run = Callable[[Callable[[str], object]], object]


def allocator_bytes(run: Run, *, first: Callable[[], object] | None = None) -> dict[str, int]:
    """Runs `run(mark)` once and returns bytes of the CPU's allocator, relative to its start.

    Args:
        run: what is measured.
        first: runs before it, and is not counted. The profiler does not tell the release of what
            was allocated before it began: what `run` replaces has to be made under its eyes.

    Returns:
        For each name that `run` marks: bytes held at that moment; and under "peak" the most that
        was held at any moment.
    """

    def mark(name: str) -> None:
        with record_function(name):
            pass

    gc.collect()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # two lines on standard error otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if first is not None:
            first()
        mark(BEGIN)
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
        elif name in (BEGIN, FORWARD_DONE, STEP_DONE):
            timeline.append((event.start_ns(), name, 0))
    held, found = 0, {"peak": 0}
    # The sort is stable: events of one nanosecond stay in the order in which they came.
    for _, name, size in sorted(timeline, key=lambda entry: entry[0]):
        held += size
        if name == BEGIN:
            held, found = 0, {"peak": 0}
            continue
        found["peak"] = max(found["peak"], held)
        if name:
            found[name] = held
    return found


def cuda_bytes(run: Run, device: torch.device) -> dict[str, int]:
    """`allocator_bytes` of a CUDA device, from its allocator's statistics."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    found: dict[str, int] = {}

    def mark(name: str) -> None:
        found[name] = torch.cuda.memory_allocated(device) - before

    run(mark)
    return found | {"peak": torch.cuda.max_memory_allocated(device) - before}


def step_bytes(step: TrainingStep) -> dict[str, int]:
    """What a step allocates on its device, relative to its start: see `allocator_bytes`."""
    if step.device.type == "cuda":
        return cuda_bytes(step, step.device)
    return allocator_bytes(step, first=step)  # an optimiser may replace its state


def measure(steps: Sequence[TrainingStep], *, repeats: int = 3) -> list[StepCost]:
    """The cost of each step.

    The timed steps take turns, so that a busy machine slows all of them alike.

    Args:
        steps: what to measure.
        repeats: timed steps of each, at least 1; the shortest counts.
    """
    for step in steps:
        step()  # the optimiser's state and the libraries' work spaces come with the first step
    memory = [step_bytes(step) for step in steps]
    rounds = [[_timed(step) for step in steps] for _ in range(repeats)]
    seconds = [min(times) for times in zip(*rounds, strict=True)]
    return [
        StepCost(
            peak_bytes=step.static_bytes() + found["peak"],
            saved_bytes=found[FORWARD_DONE],
            static_bytes=step.static_bytes(),
            step_seconds=shortest,
        )
        for step, found, shortest in zip(steps, memory, seconds, strict=True)
    ]


def _timed(step: TrainingStep) -> float:
    """Wall seconds of a step, whose last act is to read its loss: the device is done then."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def naive(config: RunConfig) -> RunConfig:
    """The same network, batch and optimiser in float32 with plain autograd."""
    on_no_ladder = replace(config.federation, ladder="")  # whose bits are not those of float32
    return replace(config, quant=QuantConfig(), federation=on_no_ladder)


def compare_with_naive(
    config: RunConfig, num_landmarks: int = 16, *, repeats: int = 3, device: str = "cpu"
) -> dict[str, object]:
    """The keys of `fedcunet memory --json`: the setting, naive float32, and their ratios."""
    steps = [TrainingStep(setting, num_landmarks, device) for setting in (config, naive(config))]
    cost, reference = measure(steps, repeats=repeats)
    return {**asdict(cost), "naive_float32": asdict(reference)} | ratios(cost, reference)


def ratios(cost: StepCost, reference: StepCost) -> dict[str, float]:
    """Peak bytes and step time of a setting over those of naive float32."""
    return {
        "peak_ratio": cost.peak_bytes / reference.peak_bytes,
        "step_ratio": cost.step_seconds / reference.step_seconds,
    }
