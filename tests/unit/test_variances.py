"""Variances in a vector: there and back, whatever the numbers, and behind a coarse codec."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcunet.aggregation import MeanAccumulator, ServerOptimizer
from fedcunet.expected import Expected
from fedcunet.layout import Layout
from fedcunet.payload import decode_own, pack
from fedcunet.variances import HIGHEST, LOWEST, kept, to_logarithms, to_variances

anything = st.floats(width=32, allow_nan=False)


@given(st.lists(st.floats(0, 1e9, width=32), min_size=1, max_size=20))
def test_what_a_network_got_from_a_vector_goes_back_as_it_was(values: list[float]) -> None:
    variances = np.array(values, dtype=np.float32)
    logarithms = to_logarithms(variances)
    in_network = to_variances(logarithms).astype(np.float32)
    assert in_network == pytest.approx(variances, rel=2e-6, abs=1e-10)
    assert to_logarithms(in_network).tolist() == logarithms.tolist()
    assert kept(logarithms).tolist() == logarithms.tolist()


@given(anything)
def test_whatever_a_vector_has_a_variance_comes_of_it(value: float) -> None:
    variance = to_variances(np.array([value], dtype=np.float32))
    assert 0 <= variance[0] <= 1.0001e9
    assert LOWEST - 1e-5 <= kept(np.array([value], dtype=np.float32))[0] <= HIGHEST + 1e-5
    assert to_logarithms(variance)[0] == pytest.approx(np.clip(value, LOWEST, HIGHEST), abs=1e-5)


def test_a_new_networks_variance_is_exactly_one() -> None:
    assert to_logarithms(np.ones(1)).tolist() == [0]
    assert to_variances(np.zeros(1, dtype=np.float32)).astype(np.float32).tolist() == [1]


@pytest.mark.parametrize("codec", ["sign", "eden"])
def test_a_coarse_codec_leaves_small_variances_beside_large_ones(codec: str) -> None:
    """At 1 bit, of 64 variances from 0.01 to 10,000 that all move by up to a third."""
    layout = Layout.from_tensors({"n.running_mean": (64,), "n.running_var": (64,)})
    variances = np.geomspace(0.01, 1e4, 64)
    state_N = np.concatenate([np.zeros(64, np.float32), to_logarithms(variances)])
    factors = np.random.default_rng(0).permutation(np.geomspace(0.75, 1.33, 64))
    update_N = np.concatenate([np.zeros(64, np.float32), to_logarithms(factors * variances)])
    update_N[64:] -= state_N[64:]
    expected = Expected(layout=layout, run_seed=1, round=1, sender=1, codec=codec, bits=1)
    mean = MeanAccumulator(layout, state_N)
    mean.add(decode_own(pack(update_N, expected), expected), 1)
    server = ServerOptimizer(layout, "sgd", learning_rate=1, momentum=0, clamp_latent=False)
    new_N = server.step(state_N, mean.mean())
    assert (np.abs(new_N[64:] - state_N[64:]) < 0.5).all()  # not one is 1.7 times another
