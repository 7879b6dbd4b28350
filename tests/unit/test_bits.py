"""Packing against numpy's own bits, Eq. 6 and scales against values worked out by hand."""

import numpy as np
import pytest
import torch

from fedcunet.bits import (
    check_bits,
    covering_scale,
    field_bits,
    fields_of,
    linear_quantise,
    pack_codes,
    packed_length,
    round_up_where,
    sigma,
    unpack_codes,
)
from fedcunet.errors import UserError

LENGTHS = (0, 1, 7, 8, 9, 16, 1001)


def reference_packing(codes: np.ndarray, bits: int) -> np.ndarray:
    """The definition in the module's docstring, bit by bit."""
    stream = (codes[:, None] >> np.arange(bits)) & 1
    return np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little")


@pytest.mark.parametrize("bits", range(1, 17))
def test_packed_codes_are_the_little_endian_bit_stream_and_come_back(bits: int) -> None:
    for length in LENGTHS:
        codes = np.random.default_rng(length).integers(0, 1 << bits, length)
        packed = pack_codes(codes, bits)
        assert packed.dtype == np.uint8
        assert packed.size == packed_length(length, bits)
        np.testing.assert_array_equal(packed, reference_packing(codes, bits))
        np.testing.assert_array_equal(unpack_codes(packed, bits=bits, count=length), codes)


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        pack_codes(np.array([1, 8]), 3)
    with pytest.raises(ValueError, match=r"\[0, 8\)"):
        pack_codes(np.array([-1]), 3)


def test_unpacking_refuses_a_wrong_number_of_bytes() -> None:
    with pytest.raises(ValueError, match="take 4 bytes, not 3"):
        unpack_codes(np.zeros(3, dtype=np.uint8), bits=3, count=9)


@pytest.mark.parametrize("bits", [0, 17, 33, -1, 2.5, float("nan"), float("inf")])
def test_bits_outside_the_range_are_a_user_error_that_names_it(bits: float) -> None:
    with pytest.raises(UserError, match="weight bits must be a whole number from 1 to 16, not"):
        check_bits(bits, low=1, high=16, what="weight bits")
    assert issubclass(UserError, ValueError)


def test_sigma_is_the_step_of_the_paper() -> None:
    assert [sigma(bits) for bits in (1, 2, 8)] == [1.0, 0.5, 1 / 128]


def test_linear_quantise_is_equation_6_for_arrays_and_tensors() -> None:
    # k = 3: step 1/4, halves to even, clipped to ±3/4.
    values = [-2.0, -0.8, -0.375, -0.1, 0.0, 0.125, 0.13, 0.375, 0.7, 0.9, 5.0]
    expected = [-0.75, -0.75, -0.5, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 0.75, 0.75]
    array = linear_quantise(np.array(values, dtype=np.float32), 3)
    tensor = linear_quantise(torch.tensor(values), 3)
    np.testing.assert_array_equal(array, np.array(expected, dtype=np.float32))
    assert torch.equal(tensor, torch.tensor(expected))
    assert array.dtype == np.float32


def test_a_scale_widens_the_range_of_equation_6() -> None:
    # k = 3 over [-4, 4]: step 1, clipped to ±3.
    values = torch.tensor([-9.0, -0.5, 0.4, 1.5, 2.6, 3.4])
    assert linear_quantise(values, 3, scale=4.0).tolist() == [-3, 0, 0, 2, 3, 3]


@pytest.mark.parametrize("bits", [1, 32])
def test_linear_quantise_refuses_bits_without_a_grid(bits: int) -> None:
    with pytest.raises(UserError, match="2 to 16"):
        linear_quantise(np.zeros(1), bits)


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_covering_scale_is_the_smallest_power_of_two_that_clips_nothing(bits: int) -> None:
    values = np.geomspace(1e-20, 1e20, 500).astype(np.float32)
    most = 1 - sigma(bits)
    on_grid = (most * 2.0 ** np.arange(-9, 9)).astype(np.float32)
    values = np.concatenate([values, on_grid])
    scales = covering_scale(values, bits)
    assert scales.dtype == np.float32
    assert np.all(np.frexp(scales)[0] == 0.5)
    assert np.all(values <= scales * most)
    assert np.all(values > scales / 2 * most)
    assert torch.equal(covering_scale(torch.from_numpy(values), bits), torch.from_numpy(scales))
    assert covering_scale(np.zeros(1), bits)[0] == 1


def test_rounding_up_where_the_fraction_exceeds_uniform_numbers_is_right_on_average() -> None:
    value, count = -1.7, 40_000
    uniform = np.random.default_rng(1).random(count)
    rounded = round_up_where(np.full(count, value), uniform)
    assert set(np.unique(rounded)) == {-2.0, -1.0}
    # Standard deviation of the mean: sqrt(0.3 * 0.7 / 40000) = 0.0023.
    assert abs(rounded.mean() - value) < 0.012
    whole = np.arange(-5.0, 6.0)
    np.testing.assert_array_equal(round_up_where(whole, np.zeros(11)), whole)


def test_fields_of_any_width_come_back() -> None:
    numbers = np.array([0, 1, 5, 2**20 - 1, 0, 2**40 + 3, 6])
    widths = np.array([0, 1, 3, 20, 4, 41, 2])  # of the last only the lowest two bits
    bits = field_bits(numbers, widths)
    assert bits.tolist()[:6] == [1, 1, 0, 1, 1, 1]
    assert bits.size == widths.sum()
    assert fields_of(bits, widths).tolist() == [*numbers[:-1].tolist(), 2]
    assert fields_of(bits[:0], widths[:0]).size == 0
