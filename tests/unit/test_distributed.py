"""Distributed training: equal networks everywhere, few bytes, nothing lost to coding."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fedcunet.config import RunConfig, UpdateConfig
from fedcunet.errors import UserError
from fedcunet.expected import OVERHEAD_BYTES, Expected
from fedcunet.layout import Layout
from fedcunet.training.distributed import Team, team_of_torchrun
from fedcunet.training.network import build_network, network_layout

ROOT = Path(__file__).resolve().parents[2]
SIGN = UpdateConfig(codec="sign", bits=1, error_feedback="on")


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


class _Crops(list[int]):
    """As many crops as there are numbers."""

    flip_order = None


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
import json, sys, torch
from fedcunet.config import RunConfig, UpdateConfig
from fedcunet.training.checkpoint import tensors_sha256
from fedcunet.training.distributed import team_of_torchrun
from fedcunet.training.network import build_network

codec, bits = sys.argv[1], float(sys.argv[2])
config = RunConfig().replace(model__unets=1, model__order=0, quant__bits="8,1,8", quant__alpha=True)
update = UpdateConfig(codec=codec, bits=bits, error_feedback="off" if codec == "float32" else "on")
with team_of_torchrun(update, 1) as team:
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
    with open(f"{sys.argv[3]}/{team.rank}.json", "w") as file:
        json.dump([tensors_sha256(model), team.bytes_per_step(), different], file)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("codec", "bits"), [("float32", 32), ("sign", 1)])
def test_two_processes_end_with_one_model_and_send_what_the_codec_says(
    codec: str, bits: int, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), codec, str(bits), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one[0] == other[0]
    assert one[2] != other[2]  # they did see different images
    assert one[1] == other[1]
    model = build_network(RunConfig().replace(model__unets=1, model__order=0), 3)
    if codec == "float32":
        assert one[1] == 4 * sum(parameter.numel() for parameter in model.parameters())
        return
    layout = network_layout(model)
    fine = dict(zip(layout.names, layout.fine, strict=True))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    whole = Layout.from_tensors(shapes, {name for name in shapes if fine[name]})
    payload, most = Expected(
        layout=whole, run_seed=1, round=0, sender=0, codec=codec, bits=bits
    ).payload_limits
    assert payload == most  # a bit a value, whatever the values
    # DDP sends a few buckets, each with a header and a checksum.
    assert payload <= one[1] < payload + 5 * (OVERHEAD_BYTES + 8)
