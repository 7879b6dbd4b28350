"""The codes inside a file of packed weights: trits, and vectors at a few bits a value."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcunet.packed import (
    LINEAR,
    LOG,
    SIGNED_LOG,
    code_vector,
    pack_trits,
    pack_vectors,
    round_significant,
    unpack_trits,
    unpack_vectors,
    vectors_length,
)


@given(st.lists(st.integers(0, 2), max_size=40))
def test_trits_come_back_and_five_take_a_byte(trits: list[int]) -> None:
    packed = pack_trits(np.array(trits, dtype=np.uint8))
    assert len(packed) == (len(trits) + 4) // 5
    assert unpack_trits(packed, len(trits)).tolist() == trits


def test_bytes_that_are_no_trits_are_refused() -> None:
    with pytest.raises(ValueError, match="above 242"):
        unpack_trits(b"\xf3", 5)
    with pytest.raises(ValueError, match="take 2 bytes, not 1"):
        unpack_trits(b"\x00", 6)
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        pack_trits(np.array([3]))


VECTORS = st.lists(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(VECTORS, st.integers(4, 16))
def test_vectors_come_back_as_they_were_rounded(values: list[list[float]], bits: int) -> None:
    codes = [code_vector(np.array(vector), bits=bits) for vector in values]
    body = pack_vectors(codes, bits)
    lengths = [len(vector) for vector in values]
    assert len(body) == vectors_length(lengths, bits, sum(code.apart_M.size for code in codes))
    for code, found in zip(codes, unpack_vectors(body, lengths, bits), strict=True):
        assert found.dtype == np.float32
        assert np.array_equal(found, code.values(bits))


@settings(deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.integers(4, 12))
def test_no_vector_is_worse_off_than_with_equal_steps(values: list[float], bits: int) -> None:
    vector = np.array(values)
    step = np.ptp(vector) / (2**bits - 1)
    found = code_vector(vector, bits=bits)
    error = np.square(found.values(bits) - vector).sum()
    # Values that stand apart have to be worth their bits, else there are none.
    assert error <= len(values) * (step / 2) ** 2 * 1.001 + 1e-10


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.linspace(-3, 2, 100), LINEAR),
        (np.geomspace(1e-3, 1e3, 100), LOG),
        (np.geomspace(1e-3, 1e3, 100) * (-1) ** np.arange(100), SIGNED_LOG),
    ],
)
def test_the_grid_suits_the_values(values: np.ndarray, kind: int) -> None:
    code = code_vector(values, bits=8, weights_N=None if kind == LINEAR else values**-2.0)
    assert code.kind == kind
    assert np.abs(code.values(8) / values - 1).max() < (0.1 if kind != LINEAR else 1)


def test_constants_and_zeros_are_exact() -> None:
    for values in ([0.0], [0.0, 0.0], [-0.7] * 9, [1e-38], [0.0, 5.0], [-1.0, 0.0]):
        wanted = np.array(values, dtype=np.float32)
        assert np.array_equal(code_vector(wanted, bits=4).values(4), wanted)


def test_a_few_far_values_do_not_coarsen_the_grid_of_the_others() -> None:
    values = np.linspace(-3, 3, 160)
    values[[5, 40, 90]] = [210, 197.7, -150]
    code = code_vector(values, bits=8)
    assert code.apart_M.tolist() == [5, 40, 90]
    assert np.abs(code.values(8) - values).max() <= 6 / 255 / 2 * 1.01


def test_significant_bits_are_as_many_as_asked() -> None:
    found = round_significant(np.array([1.0, 1.3, 0.0, -3.7e-20], dtype=np.float32), 4)
    assert found.tolist()[:3] == [1.0, 1.25, 0.0]
    assert np.frexp(found[3])[0] * 16 == np.round(np.frexp(found[3])[0] * 16)
