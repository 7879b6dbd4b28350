"""The residual of error feedback over rounds that are taken and rounds that are not."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from clients.state import ClientState, forget_old_runs
from fedcunet.downlink import Visible


@pytest.fixture
def state(tmp_path: Path) -> ClientState:
    return ClientState(folder=tmp_path, token="run-1", client=3)


def vector(value: float) -> np.ndarray:
    return np.full(4, value, dtype=np.float32)


def test_a_new_client_has_no_residual(state: ClientState) -> None:
    assert state.residual(4, 0).tolist() == [0, 0, 0, 0]


def test_an_acknowledged_update_commits_its_residual(state: ClientState) -> None:
    state.save(1, vector(0), vector(0.5))
    assert state.residual(4, 1).tolist() == vector(0.5).tolist()


def test_an_update_that_was_not_taken_restores_the_residual_before_it(state: ClientState) -> None:
    state.save(1, vector(0), vector(0.5))
    state.save(2, vector(0.5), vector(0.7))
    assert state.residual(4, 1).tolist() == vector(0.5).tolist()


def test_residuals_of_another_run_or_client_are_never_read(state: ClientState) -> None:
    state.save(1, vector(0), vector(0.5))
    for token, client in (("run-2", 3), ("run-1", 4)):
        other = ClientState(folder=state.folder, token=token, client=client)
        assert other.residual(4, 1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_costs_the_residual_and_nothing_else(
    state: ClientState, damage: bytes | None
) -> None:
    state.save(1, vector(0), vector(0.5))
    whole = state.path.read_bytes()
    state.path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert state.residual(4, 1).tolist() == [0, 0, 0, 0]


def test_a_residual_of_another_length_or_not_finite_is_not_used(state: ClientState) -> None:
    state.save(1, vector(0), vector(np.nan))
    assert state.residual(4, 1).tolist() == [0, 0, 0, 0]
    state.save(1, vector(0), vector(0.5))
    assert state.residual(5, 1).tolist() == [0] * 5


def test_only_runs_that_nobody_wrote_for_a_while_are_forgotten(tmp_path: Path) -> None:
    for name, age in (("old", 8), ("new", 1)):
        path = tmp_path / name / "client-000000.safetensors"
        path.parent.mkdir()
        path.write_bytes(b"")
        os.utime(path, (time.time() - age * 86400,) * 2)
    forget_old_runs(tmp_path, days=7)
    forget_old_runs(tmp_path / "none", days=7)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_model_comes_back_with_its_id_and_one_that_is_unfit_does_not(state: ClientState) -> None:
    assert state.visible(4) is None
    state.keep_visible(Visible(bytes(range(16)), vector(0.5)))
    found = state.visible(4)
    assert found is not None
    assert (found.model_id, found.state_N.tolist()) == (bytes(range(16)), [0.5] * 4)
    assert state.visible(5) is None
    state.model_path.write_bytes(state.model_path.read_bytes()[:-5])
    assert state.visible(4) is None
    state.keep_visible(Visible(bytes(16), vector(np.nan)))
    assert state.visible(4) is None
