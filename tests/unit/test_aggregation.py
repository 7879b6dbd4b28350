"""The mean of updates, BatchNorm statistics as a mixture, and the server's optimisers."""

import numpy as np
import pytest

from fedcunet.aggregation import MeanAccumulator, ServerOptimizer
from fedcunet.layout import Layout
from fedcunet.variances import HIGHEST, to_logarithms, to_variances

LAYOUT = Layout.from_tensors(
    {
        "conv.weight": (2, 1, 1, 1),
        "norm.weight": (1,),
        "norm.running_mean": (1,),
        "norm.running_var": (1,),
    },
    fine={"norm.weight", "norm.running_mean", "norm.running_var"},
)
FOUR = float(to_logarithms(np.array([4.0]))[0])  # how a vector has the variance 4
STATE = np.array([0.5, -0.5, 1.0, 2.0, FOUR], dtype=np.float32)


def optimizer(name: str = "sgd", **changes: float) -> ServerOptimizer:
    settings = {"learning_rate": 1.0, "momentum": 0.0, "clamp_latent": True} | changes
    return ServerOptimizer(LAYOUT, name, **settings)


def test_the_mean_is_weighted_by_examples() -> None:
    total = MeanAccumulator(LAYOUT, STATE)
    total.add(np.array([1, 0, 0, 0, 0], dtype=np.float32), 3)
    total.add(np.array([0, 4, 0, 0, 0], dtype=np.float32), 1)
    assert total.mean().tolist() == [0.75, 1, 0, 0, 0]


def test_batchnorm_variance_is_that_of_the_mixture() -> None:
    # Clients with means 1 and 5 and variance 4 each, in equal parts: mean 3, variance 4 + 4.
    total = MeanAccumulator(LAYOUT, STATE)
    total.add(np.array([0, 0, 0, -1, 0], dtype=np.float32), 10)
    total.add(np.array([0, 0, 0, 3, 0], dtype=np.float32), 10)
    new = optimizer().step(STATE, total.mean())
    assert new[:4].tolist() == [0.5, -0.5, 1, 3]
    assert to_variances(new[4:]) == pytest.approx([8], rel=1e-5)


def test_noise_of_coding_does_not_raise_the_variance() -> None:
    total = MeanAccumulator(LAYOUT, STATE)
    for noise in (-3.0, 3.0):  # 0.2 and 80 for 4
        total.add(np.array([0, 0, 0, 0, noise], dtype=np.float32), 1)
    new = optimizer().step(STATE, total.mean())
    assert to_variances(new[4:]) == pytest.approx([4], rel=1e-5)


def test_equal_clients_leave_the_variance_as_it_is() -> None:
    total = MeanAccumulator(LAYOUT, STATE)
    for weight in (1, 7):
        total.add(np.array([0, 0, 0, 0.3, 0.5], dtype=np.float32), weight)
    assert optimizer().step(STATE, total.mean())[4] == pytest.approx(FOUR + 0.5, abs=1e-5)


def test_the_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no updates"):
        MeanAccumulator(LAYOUT, STATE).mean()


def test_latent_weights_are_clamped_and_a_variance_stays_one() -> None:
    update = np.array([9, -9, 9, 9, -99], dtype=np.float32)
    new = optimizer().step(STATE, update)
    assert new[:4].tolist() == [1, -1, 10, 11]
    assert to_variances(new[4:]) == pytest.approx([0], abs=1e-9)
    free = optimizer(clamp_latent=False).step(STATE, -update)
    assert free[:4].tolist() == [-8.5, 8.5, -8, -7]
    assert free[4] == pytest.approx(HIGHEST, abs=1e-5)


def test_momentum_carries_on_but_not_for_statistics() -> None:
    server = optimizer(momentum=0.5, clamp_latent=False)
    update = np.array([1, 0, 0, 1, 0], dtype=np.float32)
    state = server.step(STATE, update)
    state = server.step(state, update)
    assert state.tolist() == [0.5 + 1 + 1.5, -0.5, 1, 4, FOUR]


def test_adam_moves_every_moved_parameter_by_about_its_rate() -> None:
    update = np.array([0.3, -0.3, 0, 0.5, 0], dtype=np.float32)
    new = optimizer("adam", learning_rate=0.01).step(STATE, update)
    assert new.tolist() == pytest.approx([0.51, -0.51, 1, 2.5, FOUR], abs=1e-4)


def test_arguments_of_a_step_stay_as_they_are() -> None:
    state, update = STATE.copy(), np.full(5, 0.25, dtype=np.float32)
    optimizer().step(state, update)
    assert state.tolist() == STATE.tolist()
    assert update.tolist() == [0.25] * 5
