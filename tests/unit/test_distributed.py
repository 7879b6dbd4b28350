"""Distributed training: equal networks everywhere, few bytes, nothing lost to coding."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fedcunet.config import RunConfig, UpdateConfig
from fedcunet.data import load
from fedcunet.errors import RunFailure, UserError
from fedcunet.expected import OVERHEAD_BYTES, Expected
from fedcunet.layout import Layout
from fedcunet.training.central import train_network
from fedcunet.training.checkpoint import tensors_sha256
from fedcunet.training.distributed import Team, team_of_torchrun
from fedcunet.training.network import build_network, network_layout

ROOT = Path(__file__).resolve().parents[2]
SIGN = UpdateConfig(codec="sign", bits=1, error_feedback="on")
FLOAT32 = UpdateConfig(codec="float32", bits=32, error_feedback="off")


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_coding_loses_is_added_to_later_gradients(alone: None, seed: int) -> None:
    team = Team(rank=0, size=1, device="cpu", update=SIGN, seed=seed)
    parameters: list[torch.Tensor] = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7))]
    team._fine = {parameters[0]: False, parameters[1]: True}
    torch.manual_seed(seed)
    meant_N, sent_N = torch.zeros(22), torch.zeros(22)
    for step in range(5):
        gradient_N = torch.randn(22)
        meant_N += gradient_N
        team.num_steps = step
        team.mean_of_all(gradient_N, parameters)
        sent_N += gradient_N
    left_N = team._residual_of(parameters)
    assert left_N.abs().max() > 0.1
    torch.testing.assert_close(sent_N + left_N, meant_N)
    # In another bucket the same parameters find what they lost.
    swapped_N = team._residual_of(parameters[::-1])
    torch.testing.assert_close(swapped_N, torch.cat([left_N[15:], left_N[:15]]))


def test_a_gradient_that_is_not_finite_ends_the_training_in_one_line(alone: None) -> None:
    team = Team(rank=0, size=1, device="cpu", update=SIGN, seed=0)
    parameters: list[torch.Tensor] = [nn.Parameter(torch.zeros(3))]
    team._fine = {parameters[0]: False}
    with pytest.raises(RunFailure, match="step 1: a gradient is not finite; lower the rate"):
        team.mean_of_all(torch.tensor([1.0, float("nan"), 0.0]), parameters)


CENTRAL = RunConfig().replace(
    model__unets=1,
    model__order=0,
    training__batch_size=2,
    training__learning_rate=1e-3,
    training__schedule="constant",
    data__disk_cache_bytes=0,
)


@pytest.mark.parametrize("update", [SIGN, FLOAT32], ids=lambda update: str(update.codec))
def test_a_resumed_training_goes_on_with_what_coding_lost_and_with_its_exchange(
    alone: None, make_300w: Callable[..., Path], tmp_path: Path, update: UpdateConfig
) -> None:
    images = {"helen/trainset": range(4), "helen/testset": range(10, 12)}
    root = make_300w({name: [f"{n}_1.jpg" for n in numbers] for name, numbers in images.items()})
    sets = [load("300w", root, subset) for subset in ("train", "test")]

    def central(
        out: str, epochs: int, resume: bool = False, update: UpdateConfig = update
    ) -> tuple[str, int]:
        team = Team(rank=0, size=1, device="cpu", update=update, seed=0)
        config = CENTRAL.replace(training__epochs=epochs)
        model = train_network(config, *sets, tmp_path / out, resume=resume, team=team)
        return tensors_sha256(model), team.num_steps

    whole = central("whole", 2)
    central("parts", 1)
    with pytest.raises(UserError, match=f"trained with, {update.codec} at .* found linear-nearest"):
        central("parts", 2, True, UpdateConfig(codec="linear-nearest", bits=8, error_feedback="on"))
    with pytest.raises(UserError, match="found none"):
        train_network(CENTRAL, *sets, tmp_path / "parts", resume=True)
    assert central("parts", 2, True) == whole
    lost = ["lost-2-0.safetensors"] if update is SIGN else []
    assert [path.name for path in (tmp_path / "parts").glob("lost*")] == lost


class _Crops(list[int]):
    """As many crops as there are numbers."""

    flip_order, size = None, 64


def test_shares_are_equal_disjoint_and_new_each_epoch(seed: int) -> None:
    crops = _Crops(range(11))
    teams = [Team(rank=r, size=2, device="cpu", update=SIGN, seed=seed) for r in range(2)]
    shares = [team.share(crops, 1)._members for team in teams]  # type: ignore[arg-type]
    assert [len(share) for share in shares] == [5, 5]
    assert not set(shares[0]) & set(shares[1])
    assert teams[0].share(crops, 2)._members != shares[0]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 processes: expected as many images, found 1"):
        teams[0].share(_Crops([0]), 1)  # type: ignore[arg-type]


def test_outside_of_torchrun_the_team_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc-per-node"), team_of_torchrun(SIGN, 0):
        pass


SCRIPT = """
import dataclasses, json, sys, torch
import torch.distributed as dist
from fedcunet.config import RunConfig, UpdateConfig
from fedcunet.training.checkpoint import tensors_sha256
from fedcunet.training.distributed import team_of_torchrun
from fedcunet.training.network import build_network

config = RunConfig().replace(model__unets=1, model__order=0, quant__bits="8,1,8", quant__alpha=True)
FLOAT32 = UpdateConfig(codec="float32", bits=32, error_feedback="off")
SIGN = UpdateConfig(codec="sign", bits=1, error_feedback="on")
TRELLIS = UpdateConfig(codec="trellis", bits=1, error_feedback="off")
handed, lengths = 0, []
all_gather = dist.all_gather

def watched(parts, own):
    global handed
    handed += own.nbytes
    if own.dtype == torch.int64:
        lengths.append(int(own))
    all_gather(parts, own)

def trained(team):
    model = build_network(config, 3)
    replica = team.replica(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    torch.manual_seed(team.rank)  # images of its own
    for _ in range(3):
        optimizer.zero_grad()
        sum((output**2).mean() for output in replica(torch.randn(2, 3, 64, 64))).backward()
        optimizer.step()
    own = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    different = float(sum(value.double().sum() for value in own.values()))
    team.average_statistics(model)
    return {
        "model": tensors_sha256(model), "bytes_per_step": team.bytes_per_step(),
        "bytes": team.bytes_sent, "statistics": different, "handed": handed, "lengths": lengths,
    }

dist.all_gather = watched
with team_of_torchrun(FLOAT32, 1) as first:
    found = {}
    for update in (FLOAT32, SIGN, TRELLIS):
        handed, lengths = 0, []
        team = dataclasses.replace(first, update=update, _residual={}, _layouts={}, _fine={})
        found[update.codec] = trained(team)
with open(f"{sys.argv[1]}/{first.rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found in three steps, by codec."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", ["float32", "sign", "trellis"])
def test_two_processes_end_with_one_model_and_send_what_the_codec_says(
    two_processes: list[dict[str, Any]], codec: str
) -> None:
    one, other = (found[codec] for found in two_processes)
    assert one["model"] == other["model"]
    assert one["statistics"] != other["statistics"]  # they did see different images
    assert one["bytes"] == other["bytes"]
    model = build_network(RunConfig().replace(model__unets=1, model__order=0), 3)
    if codec == "float32":
        values = sum(parameter.numel() for parameter in model.parameters())
        assert one["bytes_per_step"] == 4 * values
        return
    layout = network_layout(model)
    fine = dict(zip(layout.names, layout.fine, strict=True))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    whole = Layout.from_tensors(shapes, {name for name in shapes if fine[name]})
    least, most = Expected(
        layout=whole, run_seed=1, round=0, sender=0, codec=codec, bits=1
    ).payload_limits
    if codec == "sign":
        assert least == most  # a bit a value, whatever the values
    # DDP sends a few buckets, each with a header and a checksum.
    assert least <= one["bytes_per_step"] < most + 5 * (OVERHEAD_BYTES + 8)


def test_the_bytes_counted_are_those_sent_also_where_payloads_differ_in_length(
    two_processes: list[dict[str, Any]],
) -> None:
    assert two_processes[0]["trellis"]["lengths"] != two_processes[1]["trellis"]["lengths"]
    for found in two_processes:
        for codec in ("sign", "trellis"):
            assert found[codec]["bytes"] == found[codec]["handed"] > sum(found[codec]["lengths"])
