"""What a run goes on from: nothing of its state is lost on disk, and a damaged file says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcunet.aggregation import ServerOptimizer
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.saved import Saved, read_saved, write_saved
from tests.unit.test_downlink import CONFIG, LAYOUT, LENGTH, Federation, first_state

SMALL = Layout.from_tensors({"a.weight": (50,)}, fine=set())


def on_disk(parts: Mapping[str, Saved], folder: Path) -> dict[str, Saved]:
    write_saved(folder / "state", parts)
    return read_saved(folder / "state")


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    part = Saved({"a/b": np.arange(3), "scalar": np.float32(2.5)}, {"x": [1, "two"], "y": None})
    found = on_disk({"one": part, "two": Saved()}, tmp_path)
    assert found["one"].facts == part.facts
    assert found["one"].tensors["a/b"].tolist() == [0, 1, 2]
    assert found["one"].tensors["scalar"] == 2.5
    assert (found["two"].tensors, found["two"].facts) == ({}, {})


@pytest.mark.parametrize(
    "damage", [lambda blob: b"", lambda blob: blob[:20], lambda blob: blob[:-3]]
)
def test_a_damaged_file_is_named_in_one_line(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_saved(path, {"one": Saved({"a": np.zeros(100)})})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="state: expected the state of a run, found") as refusal:
        read_saved(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad"])
def test_a_restored_optimiser_takes_the_same_steps(
    name: str, momentum: float, tmp_path: Path
) -> None:
    def made() -> ServerOptimizer:
        return ServerOptimizer(SMALL, name, learning_rate=0.5, momentum=momentum, clamp_latent=True)

    generator = np.random.default_rng(0)
    updates = generator.normal(0, 0.1, (6, 50)).astype(np.float32)
    through, state_N = made(), np.zeros(50, dtype=np.float32)
    for index, update_N in enumerate(updates):
        if index == 3:
            resumed, resumed_N = made(), state_N
            resumed.restore(on_disk({"o": through.saved()}, tmp_path)["o"])
        state_N = through.step(state_N, update_N)
    for update_N in updates[3:]:
        resumed_N = resumed.step(resumed_N, update_N)
    assert resumed_N.tolist() == state_N.tolist()


@pytest.mark.parametrize("stop", [1, 3, 12])
def test_a_restored_downlink_sends_the_same_bytes(stop: int, tmp_path: Path) -> None:
    federation = Federation(CONFIG.replace(update__prediction=True))
    for _ in range(stop):
        federation.begin()
        federation.fetch(0)
    saved = on_disk({"d": federation.downlink.saved()}, tmp_path)["d"]
    other = type(federation.downlink)(federation.config, LAYOUT, first_state())
    other.restore(saved)
    for _ in range(2):
        federation.begin()
        other.begin_round(federation.round, federation.state_N)
        for client in (0, 1):  # client 1 has missed all
            assert other.parcel(client) == federation.downlink.parcel(client)
            reference_N = federation.downlink.reference(client)
            assert (reference_N is None) == (other.reference(client) is None)
            if reference_N is not None:
                assert reference_N.tolist() == other.reference(client).tolist()  # type: ignore[union-attr]
                assert len(reference_N) == LENGTH
        federation.fetch(0)
        other.delivered(0)
