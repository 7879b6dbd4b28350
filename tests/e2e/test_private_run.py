"""Clients with privacy through the real apps: noise goes into what is coded, and is accounted for.

N is the number of values of an update, M of those that the update's codec codes.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcunet.config import RunConfig
from fedcunet.payload import Admitted
from fedcunet.replies import RoundReplies
from server.app import NoDisplay, serve
from simulations.engine import Engine

FACES = {
    "afw": [f"{n}_1.jpg" for n in range(6)],
    "helen/testset": [f"{n}_1.jpg" for n in range(10, 14)],
}
CLIP = 0.05


@pytest.fixture
def setting(make_300w: Callable[..., Path], tmp_path: Path, measured_dir: Path) -> RunConfig:
    """Two clients, one round, clipped updates without noise.

    Network and training are those of `test_simulation`: their memory is measured once for both.
    """
    return RunConfig().replace(
        model__unets=1,
        model__order=0,
        quant__bits="8,1,8",
        quant__alpha=True,
        data__name="300w",
        data__root=str(make_300w(FACES)),
        training__batch_size=4,
        training__optimizer="adam",
        update__codec="float32",
        update__bits=32,
        federation__clients=2,
        federation__rounds=1,
        federation__partition="iid",
        federation__state_dir=str(tmp_path / "clients"),
        federation__measured_dir=str(measured_dir),
        privacy__clip_norm=CLIP,
    )


@pytest.fixture
def sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[RunConfig], tuple[list[Admitted], dict[str, Any]]]:
    """Runs a setting; the updates that the server admitted, and the summary."""
    seen: list[Admitted] = []
    mean = RoundReplies.mean

    def watched(self: RoundReplies, state_N: np.ndarray, needed: int) -> np.ndarray | str:
        seen.extend(update for update, _ in self.admitted.values())
        return mean(self, state_N, needed)

    monkeypatch.setattr(RoundReplies, "mean", watched)

    def run(config: RunConfig) -> tuple[list[Admitted], dict[str, Any]]:
        seen.clear()
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        engine = Engine(name="loopback", num_workers=1, num_gpus=0, ray_address=None)
        with ExitStack() as stack:
            grid = engine.grid(config, stack)
            summary = serve(grid, config, out=folder, name="run", display=NoDisplay())
        line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for key in ("epsilon", "epsilon_server", "delta"):
            assert line.get(key) == summary.get(key)
        return list(seen), summary

    return run


Sent = Callable[[RunConfig], tuple[list[Admitted], dict[str, Any]]]


def test_what_is_sent_is_the_clipped_update_and_a_share_of_the_noise(
    setting: RunConfig, sent: Sent
) -> None:
    clipped, summary = sent(setting)
    assert summary["epsilon"] is None
    for update in clipped:
        assert np.linalg.norm(update.decode()) == pytest.approx(CLIP, rel=1e-4)
    noisy, summary = sent(setting.replace(privacy__noise_multiplier=4.0))
    noise = [one.decode() - other.decode() for one, other in zip(noisy, clipped, strict=True)]
    for noise_N in noise:
        assert noise_N.std() == pytest.approx(4 * CLIP / np.sqrt(2), rel=0.02)
        assert abs(noise_N.mean()) < 0.01
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.02  # each client has its own
    # Of two shares one is a curious client's own: both see one share, z / sqrt(2).
    assert summary["epsilon"] == pytest.approx(summary["epsilon_server"])
    assert 0 < summary["epsilon"] < 10


def test_noise_is_in_the_update_before_it_is_quantised(setting: RunConfig, sent: Sent) -> None:
    """Signs of updates whose noise drowns them are noise: added later, they would be the update's.

    One bit a value leaves two values for each tensor, which noise that came later would not.
    """
    config = setting.replace(update__codec="sign", update__bits=1, federation__max_update_norm=0.0)
    plain, _ = sent(config)
    noisy, summary = sent(config.replace(privacy__noise_multiplier=200.0))
    for one, other in zip(plain, noisy, strict=True):
        main_M, noisy_M = one.decode_bodies()[0], other.decode_bodies()[0]
        assert np.mean(np.sign(main_M) == np.sign(noisy_M)) == pytest.approx(0.5, abs=0.02)
        num_tensors = len(one.expected.layout.segments(fine=False))
        assert len(np.unique(np.abs(noisy_M))) <= num_tensors
        assert np.abs(noisy_M).mean() == pytest.approx(  # of the noise: E|x| = sqrt(2/pi) sigma
            np.sqrt(2 / np.pi) * 200 * CLIP / np.sqrt(2), rel=0.05
        )
    assert summary["epsilon"] == summary["epsilon_server"]


def test_without_the_switch_nothing_of_it_is_there(setting: RunConfig, sent: Sent) -> None:
    updates, summary = sent(setting.replace(privacy__clip_norm=0.0))
    assert np.linalg.norm(updates[0].decode()) > CLIP
    assert "epsilon" not in summary
