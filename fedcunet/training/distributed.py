"""Data-parallel training under torchrun whose processes send each other k-bit gradients.

Every process has the whole network and a share of the images. After a step's backward pass each
codes its gradients by an update codec, all-gathers the payloads, and takes the mean of what
everybody sent, itself included: all processes add the same numbers in the same order and stay
equal to the bit. What coding lost is added to the next step's gradient (error feedback: Seide et
al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, section 3). With codec `float32`
the gradients are summed by the backend's all-reduce instead, the usual baseline.

N parameters of a bucket, R processes, P bytes of a payload.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from fedcunet.config import UpdateConfig
from fedcunet.data.crops import Crops, CropSubset
from fedcunet.errors import RunFailure, UserError
from fedcunet.expected import Expected
from fedcunet.layout import Layout
from fedcunet.payload import admit, pack
from fedcunet.payload_header import Rejection
from fedcunet.training.local import LocalResult
from fedcunet.training.network import network_layout

MAX_STEP = 2**32  # the payload's round counts steps here


class Replica(DistributedDataParallel):
    """The network in one process, with what the training loop asks it."""

    @property
    def supervisions(self) -> object:
        """Those of the network."""
        return self.module.supervisions


@dataclass(kw_only=True, slots=True)
class Team:
    """The processes of one training.

    Attributes:
        rank: this process, 0 to `size` - 1.
        size: number of processes.
        device: torch's name of this process's device.
        update: codec and bits of the gradients.
        seed: of the codecs' randomness.
        bytes_sent: by this process for gradients so far: payloads to each other process, or for
            `float32` 2 (R - 1) / R of them, as a ring all-reduce sends.
        num_steps: so far.
    """

    rank: int
    size: int
    device: str
    update: UpdateConfig
    seed: int
    bytes_sent: int = 0
    num_steps: int = 0
    _residual: dict[torch.Tensor, torch.Tensor] = field(default_factory=dict)
    _layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)
    _fine: dict[torch.Tensor, bool] = field(default_factory=dict)

    def replica(self, model: nn.Module) -> Replica:
        """`model`, on this process's device, as one of the team's equal networks.

        BatchNorm's statistics stay each process's own until `average_statistics`.
        """
        layout = network_layout(model)
        fine = dict(zip(layout.names, layout.fine, strict=True))
        self._fine = {parameter: fine[name] for name, parameter in model.named_parameters()}
        on_gpu = self.device.startswith("cuda")
        devices = [torch.device(self.device)] if on_gpu else None
        # Buckets would be made anew after the first step, of a training that is resumed too, and
        # its sums come out otherwise, but for networks of which a part may be unused. None is.
        replica = Replica(
            model, device_ids=devices, forward_sync_buffers=False, find_unused_parameters=True
        )
        replica.register_comm_hook(self, exchange)
        return replica

    def facts(self) -> dict[str, str]:
        """How gradients are exchanged, and how far: what a training that is resumed keeps to."""
        codec = f"{self.update.codec} at {self.update.bits:g} bits"
        return {
            "exchange": f"{codec} by {self.size} processes",
            "steps": str(self.num_steps),
            "bytes_sent": str(self.bytes_sent),
        }

    def lost(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """By parameter what coding lost and this process's next gradient gets."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        return {names[parameter]: value for parameter, value in self._residual.items()}  # type: ignore[index]

    def restore(
        self, model: nn.Module, facts: Mapping[str, str], lost: Mapping[str, torch.Tensor]
    ) -> None:
        """Goes on from the facts and from what this process lost in a training that was stopped."""
        self.num_steps, self.bytes_sent = int(facts["steps"]), int(facts["bytes_sent"])
        parameters = dict(model.named_parameters())
        self._residual = {parameters[name]: value for name, value in lost.items()}

    def share_size(self, num_images: int) -> int:
        """How many of the images a process trains on in an epoch.

        Raises:
            UserError: there are fewer images than processes.
        """
        if num_images < self.size:
            raise UserError(f"{self.size} processes: expected as many images, found {num_images}")
        return num_images // self.size

    def share(self, crops: Crops, epoch: int) -> CropSubset:
        """This process's images of an epoch: equal shares, divided anew each time."""
        per_process = self.share_size(len(crops))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(crops))
        begin = self.rank * per_process
        return CropSubset(crops, order[begin : begin + per_process].tolist())

    @torch.no_grad()
    def average_statistics(self, model: nn.Module) -> None:
        """Makes BatchNorm's running statistics the mean of the processes' own."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.size

    def together(self, result: LocalResult) -> LocalResult:
        """What all processes did in a pass."""
        loss = torch.tensor([result.loss], dtype=torch.float64, device=self.device)
        dist.all_reduce(loss)
        return dataclasses.replace(
            result,
            num_examples=result.num_examples * self.size,
            loss=float(loss) / self.size,
        )

    @property
    def keeps_lost(self) -> bool:
        """Whether what coding loses is added to the next gradient."""
        return self.update.error_feedback == "on" and self.update.codec != "float32"

    def wait(self) -> None:
        """Until all processes are here."""
        dist.barrier()

    def bytes_per_step(self) -> float:
        """What a process sends for the gradients of one step."""
        return self.bytes_sent / max(self.num_steps, 1)

    def mean_of_all(self, gradient_N: torch.Tensor, parameters: list[torch.Tensor]) -> None:
        """Replaces this process's gradient by the mean of all processes' coded gradients."""
        layout = self._layout(parameters)
        corrected_N = gradient_N.detach().cpu() + self._residual_of(parameters)
        if not torch.isfinite(corrected_N).all():
            raise RunFailure(
                f"training step {self.num_steps + 1}: a gradient is not finite; lower the rate"
            )
        blob = pack(corrected_N.numpy(), self._expected(layout, self.rank))
        total_N = np.zeros(layout.num_parameters, dtype=np.float64)
        for rank, other in enumerate(self._gather(blob)):
            vector_N = self._decoded(other, layout, rank)
            total_N += vector_N
            if rank == self.rank:
                self._keep(parameters, corrected_N - torch.from_numpy(vector_N))
        gradient_N.copy_(torch.from_numpy((total_N / self.size).astype(np.float32)))

    def _gather(self, blob: bytes) -> Iterator[bytes]:
        """Everybody's payload in the order of the ranks, sent at the longest one's length."""
        own = torch.tensor([len(blob)], device=self.device)
        lengths_R = torch.empty((self.size, 1), dtype=torch.int64, device=self.device)
        dist.all_gather(list(lengths_R.unbind()), own)
        longest = int(lengths_R.max())
        own_P = torch.frombuffer(bytearray(blob.ljust(longest, b"\0")), dtype=torch.uint8)
        all_RP = torch.empty((self.size, longest), dtype=torch.uint8, device=self.device)
        dist.all_gather(list(all_RP.unbind()), own_P.to(self.device))
        self.bytes_sent += (self.size - 1) * (longest + lengths_R.element_size())
        for other_P, length in zip(all_RP.cpu(), lengths_R.flatten().tolist(), strict=True):
            yield other_P.numpy()[:length].tobytes()

    def _decoded(self, blob: bytes, layout: Layout, rank: int) -> np.ndarray:
        admitted = admit(blob, self._expected(layout, rank))
        if isinstance(admitted, Rejection):  # its memory or its version is not ours
            raise RuntimeError(f"process {rank}: {admitted.reason}: {admitted.detail}")
        return admitted.decode()

    def _expected(self, layout: Layout, rank: int) -> Expected:
        return Expected(
            layout=layout,
            run_seed=self.seed,
            round=self.num_steps % MAX_STEP,
            sender=rank,
            codec=self.update.codec_with(feedback=self.keeps_lost),
            bits=self.update.bits,
            fine_bits=self.update.fine_bits,
        )

    def _layout(self, parameters: list[torch.Tensor]) -> Layout:
        """The parameters of a bucket in its order."""
        key = tuple(map(id, parameters))
        if key not in self._layouts:
            self._layouts[key] = Layout(
                names=tuple(map(str, range(len(parameters)))),
                shapes=tuple(tuple(parameter.shape) for parameter in parameters),
                fine=tuple(self._fine[parameter] for parameter in parameters),
            )
        return self._layouts[key]

    def _residual_of(self, parameters: list[torch.Tensor]) -> torch.Tensor:
        kept = (self._residual.get(one, torch.zeros(one.numel())) for one in parameters)
        return torch.cat(list(kept))

    def _keep(self, parameters: list[torch.Tensor], lost_N: torch.Tensor) -> None:
        if self.keeps_lost:
            parts = torch.split(lost_N, [parameter.numel() for parameter in parameters])
            self._residual.update(zip(parameters, parts, strict=True))


def exchange(team: Team, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: the mean of all processes' gradients of a bucket."""
    gradient_N = bucket.buffer()
    if team.update.codec == "float32":
        dist.all_reduce(gradient_N)
        gradient_N /= team.size
        team.bytes_sent += 2 * (team.size - 1) * 4 * gradient_N.numel() // team.size
    else:
        team.mean_of_all(gradient_N, bucket.parameters())
    if bucket.is_last():
        team.num_steps += 1
    devices: list[int | str | torch.device] | None = (
        [gradient_N.device] if gradient_N.is_cuda else None
    )
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=devices)
    done.set_result(gradient_N)
    return done


@contextmanager
def team_of_torchrun(update: UpdateConfig, seed: int) -> Iterator[Team]:
    """The team that torchrun started this process in: NCCL where every process has a GPU.

    Raises:
        UserError: this process was not started by torchrun.
    """
    try:
        rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except KeyError:
        raise UserError(
            "--distributed: expected to be started by torchrun, such as "
            "`torchrun --nproc-per-node 2 -m fedcunet train --distributed ...`"
        ) from None
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= per_machine
    device = f"cuda:{local}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(local)
    # Long: the others wait in a collective operation while the first process evaluates.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    try:
        yield Team(rank=rank, size=size, device=device, update=update, seed=seed)
    finally:
        dist.destroy_process_group()
