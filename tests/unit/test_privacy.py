"""Clipping, noise in shares, and what the accountant says of it."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from fedcunet.aggregation import MeanAccumulator
from fedcunet.config import PrivacyConfig, RunConfig
from fedcunet.errors import UserError
from fedcunet.layout import Layout
from fedcunet.privacy import (
    NOISE_SEED_KEY,
    PrivacyAccountant,
    check_accountant,
    noise_generator,
    private_update,
)
from fedcunet.saved import read_saved, write_saved

FLOAT32 = RunConfig().replace(
    update__codec="float32",
    update__bits=32,
    privacy__clip_norm=0.5,
    privacy__noise_multiplier=1.0,
)


def delta_of(epsilon: float, multiplier: float) -> float:
    """Balle and Wang, ICML 2018, theorem 8, for a sensitivity of 1."""
    half = 1 / (2 * multiplier)
    other = math.exp(epsilon) * norm.cdf(-half - epsilon * multiplier)
    return float(norm.cdf(half - epsilon * multiplier) - other)


def spent(config: RunConfig, rounds: list[tuple[list[int], list[int]]], wanted: int = 4) -> Any:
    accountant = PrivacyAccountant(config)
    for asked, summed in rounds:
        accountant.count(asked, summed, wanted)
    return accountant.figures()


def test_an_update_is_clipped_as_a_whole_and_a_short_one_stays(seed: int) -> None:
    privacy = PrivacyConfig(clip_norm=1.0)
    generator = np.random.default_rng(seed)
    long = np.array([3, 0, 4], dtype=np.float32)
    clipped = private_update(long, privacy, 8, generator)
    assert clipped == pytest.approx([0.6, 0, 0.8])
    assert clipped.dtype == np.float32
    assert private_update(long / 10, privacy, 8, generator) == pytest.approx([0.3, 0, 0.4])
    assert private_update(long, PrivacyConfig(), 8, generator) is long
    assert long.tolist() == [3, 0, 4]


def test_the_shares_of_all_clients_are_the_noise_that_was_asked_for(seed: int) -> None:
    privacy = PrivacyConfig(clip_norm=0.5, noise_multiplier=3.0)
    generator = np.random.default_rng(seed)
    nothing = np.zeros(20_000, dtype=np.float32)
    shares = [private_update(nothing, privacy, 16, generator) for _ in range(16)]
    assert shares[0].std() == pytest.approx(3 * 0.5 / 4, rel=0.03)
    assert np.sum(shares, axis=0).std() == pytest.approx(3 * 0.5, rel=0.03)


def test_virtual_clients_repeat_their_noise_and_real_ones_keep_it_secret() -> None:
    def drawn(config: dict[str, Any], round_number: int = 1, client: int = 0) -> float:
        return float(noise_generator(config, round_number, client).standard_normal())

    virtual = {NOISE_SEED_KEY: 5}
    assert drawn(virtual) == drawn(virtual)
    assert len({drawn(virtual), drawn(virtual, 2), drawn(virtual, 1, 1)}) == 3
    assert drawn({}) != drawn({})
    real = virtual | {"data.name": "300w"}
    assert drawn(real) != drawn(real)


def test_epsilon_of_one_round_is_the_exact_one_of_the_gaussian_mechanism() -> None:
    # Five of five shares are there, of which a curious client knows its own: z = 1 becomes 2 / 5.
    config = FLOAT32.replace(privacy__noise_multiplier=math.sqrt(5 / 4))
    everybody = [0, 1, 2, 3, 4]
    found = spent(config, [(everybody, everybody)], wanted=5)
    assert delta_of(found["epsilon"], 1.0) == pytest.approx(1e-5, rel=1e-4)
    assert found["epsilon"] == pytest.approx(4.377, abs=1e-3)
    # The server sees each update with its own share alone.
    assert delta_of(found["epsilon_server"], 0.5) == pytest.approx(1e-5, rel=1e-4)
    assert found["delta"] == 1e-5


def test_rounds_add_up_as_one_with_less_noise_and_the_busiest_client_counts() -> None:
    once = spent(FLOAT32, [([0, 1], [0, 1])])
    four = spent(FLOAT32.replace(privacy__noise_multiplier=2.0), [([0, 1], [0, 1])] * 4)
    assert four["epsilon"] == pytest.approx(once["epsilon"])
    shared = spent(FLOAT32, [([0, 1], [0, 1]), ([2, 3], [2, 3])])
    assert shared == once
    busy = spent(FLOAT32, [([0, 1], [0, 1]), ([0, 3], [0, 3])])
    assert busy["epsilon"] > once["epsilon"]


def test_fewer_updates_than_wanted_carry_less_noise() -> None:
    everybody = [0, 1, 2, 3]
    full, half = (spent(FLOAT32, [(everybody, summed)]) for summed in (everybody, [0, 1]))
    assert half["epsilon"] > full["epsilon"]
    assert half["epsilon_server"] == full["epsilon_server"]


def test_an_abandoned_round_tells_the_server_alone() -> None:
    found = spent(FLOAT32, [([0, 1], [])])
    assert found["epsilon"] == 0
    assert found["epsilon_server"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"update__codec": "eden", "update__bits": 2},
        {"federation__aggregation": "median"},
    ],
)
def test_only_plain_sums_of_plain_values_are_protected_by_the_noise_of_the_others(
    changes: dict[str, Any],
) -> None:
    rounds = [([0, 1, 2, 3], [0, 1, 2, 3])]
    plain, other = (spent(config, rounds) for config in (FLOAT32, FLOAT32.replace(**changes)))
    assert other["epsilon"] == other["epsilon_server"] == plain["epsilon_server"]
    assert plain["epsilon"] < plain["epsilon_server"]


def test_clipping_without_noise_has_no_epsilon() -> None:
    config = FLOAT32.replace(privacy__noise_multiplier=0.0)
    found = spent(config, [([0], [0])])
    assert (found["epsilon"], found["epsilon_server"]) == (None, None)


def test_a_mean_without_the_mixture_follows_from_the_sum_alone() -> None:
    layout = Layout.from_tensors({"n.running_mean": (1,), "n.running_var": (1,)})
    state = np.array([0, 1], dtype=np.float32)

    def mean(first: float, second: float, mixture: bool) -> list[float]:
        total = MeanAccumulator(layout, state, mixture=mixture)
        for value in (first, second):
            total.add(np.array([value, 1], dtype=np.float32), 1)
        return total.mean().tolist()

    assert mean(2, 2, False) == mean(1, 3, False) == [2, 1]
    assert mean(2, 2, True) != mean(1, 3, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise_multiplier": 1.0}, "expected a privacy.clip-norm too, found 0"),
        ({"clip_norm": -1.0}, "privacy.clip-norm: expected 0 to"),
        ({"clip_norm": 1.0, "delta": 0.0}, "privacy.delta: expected 1e-30 to 0.1, found 0"),
    ],
)
def test_settings_of_privacy_that_make_no_sense_are_refused(
    changes: dict[str, float], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        PrivacyConfig(**changes)
    assert said in str(refusal.value)


def test_a_missing_accountant_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_accountant(FLOAT32.privacy)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_accountant(PrivacyConfig())
    with pytest.raises(UserError, match=r"expected the package dp-accounting .*found none"):
        check_accountant(FLOAT32.privacy)


def test_a_run_that_goes_on_has_spent_what_it_spent_and_the_stopped_round_once_more(
    tmp_path: Path,
) -> None:
    asked = [0, 1]
    whole = PrivacyAccountant(FLOAT32)
    before, after = PrivacyAccountant(FLOAT32), PrivacyAccountant(FLOAT32)
    for accountant in (whole, before):
        accountant.count(asked, asked, 4)
    write_saved(tmp_path / "state", {"privacy": before.saved()})
    after.restore(read_saved(tmp_path / "state")["privacy"])
    assert after.figures() == before.figures()
    after.count(asked, asked, 4)
    whole.count(asked, asked, 4)
    assert after.figures()["epsilon"] == whole.figures()["epsilon"]
    whole.count(asked, [], 4)  # the round that was stopped: the server may have seen its updates
    assert after.figures() == whole.figures()
