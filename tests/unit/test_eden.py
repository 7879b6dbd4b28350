"""EDEN: its error, its levels, and the rotation that hides heavy tails."""

import itertools

import numpy as np
import pytest

from fedcunet.codecs import CODECS, make_seed
from fedcunet.codecs.eden import gaussian_levels
from fedcunet.codecs.hadamard import Rotation, block_sizes, hadamard_transform, padded_length

SEED = make_seed(1, 2, 3, "test")


def nmse_of(vector: np.ndarray, bits: int) -> float:
    """Normalised squared error of a vector (float32) after EDEN."""
    body = CODECS["eden"].encode(vector, bits=bits, seed=SEED)
    decoded = CODECS["eden"].decode(body, length=vector.size, bits=bits, seed=SEED)
    error = np.square(decoded.astype(np.float64) - vector).sum()
    return float(error / np.square(vector.astype(np.float64)).sum())


@pytest.mark.parametrize(
    ("bits", "expected"), [(1, 0.5708), (2, 0.1331), (3, 0.03578), (4, 0.009592)]
)
def test_eden_has_the_error_of_its_paper_on_gaussian_and_heavy_tailed_values(
    bits: int, expected: float
) -> None:
    generator = np.random.default_rng(8)
    for vector in (generator.standard_normal(2**17), generator.standard_t(4, 2**17)):
        assert nmse_of(vector.astype(np.float32), bits) == pytest.approx(expected, rel=0.03)


def test_eden_error_falls_with_every_bit() -> None:
    vector = np.random.default_rng(9).standard_normal(2**15).astype(np.float32)
    errors = [nmse_of(vector, bits) for bits in range(1, 9)]
    # Towards 6 dB a bit; the limit 2^(-2R) is never beaten.
    assert all(later < earlier / 3 for earlier, later in itertools.pairwise(errors))
    assert all(error > 4.0**-bits for bits, error in enumerate(errors, start=1))


@pytest.mark.parametrize(
    ("bits", "levels", "distortion"),
    [
        # J. Max, "Quantizing for Minimum Distortion" (1960), table I, for 2, 4, 8, 16 levels.
        (1, [0.7980], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_gaussian_levels_are_those_of_max_1960(
    bits: int, levels: list[float], distortion: float
) -> None:
    found = gaussian_levels(bits)
    half = found[found > 0]
    np.testing.assert_allclose(half, levels, atol=6e-4)
    np.testing.assert_array_equal(found, np.concatenate([-half[::-1], half]))
    grid = np.linspace(-9, 9, 200_001)
    nearest = found[np.searchsorted((found[1:] + found[:-1]) / 2, grid)]
    density = np.exp(-(grid**2) / 2) / np.sqrt(2 * np.pi)
    assert np.sum((grid - nearest) ** 2 * density) * 18 / 200_000 == pytest.approx(
        distortion, rel=1e-3
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_levels_are_the_means_of_their_cells(bits: int) -> None:
    levels = gaussian_levels(bits)
    edges = np.concatenate([[-12.0], (levels[1:] + levels[:-1]) / 2, [12.0]])
    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        x = np.linspace(low, high, 20_001)
        density = np.exp(-(x**2) / 2)
        assert np.trapezoid(x * density, x) / np.trapezoid(density, x) == pytest.approx(
            level, abs=1e-6
        )


def test_blocks_cover_a_vector_with_fewer_than_64_zeros_added() -> None:
    for length in (0, 1, 63, 64, 65, 5000, 2**14, 3 * 2**14 + 79, 79_500):
        sizes = block_sizes(length)
        assert sum(size * count for size, count in sizes) == padded_length(length)
        assert 0 <= padded_length(length) - length < 64
        assert sizes == sorted(sizes, reverse=True)


def test_hadamard_transform_is_sylvesters_and_its_own_inverse() -> None:
    for size in (64, 128, 2**11):
        blocks = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
        indices = np.arange(size)
        parity = np.array(
            [[bin(row & column).count("1") & 1 for column in indices] for row in (5,)]
        )
        row = ((1 - 2 * parity[0]) / np.sqrt(size)).astype(np.float32)
        turned = hadamard_transform(blocks)
        np.testing.assert_allclose(turned[:, 5], blocks @ row, atol=1e-5)
        np.testing.assert_allclose(hadamard_transform(turned), blocks, atol=1e-5)


def test_rotation_keeps_lengths_and_turns_back_and_differs_by_seed() -> None:
    blocks = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    rotation = Rotation(512, SEED)
    turned = rotation.forward(blocks, 0)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=1), np.linalg.norm(blocks, axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(rotation.backward(turned, 0), blocks, atol=1e-5)
    other = Rotation(512, make_seed(1, 2, 4, "test")).forward(blocks, 0)
    assert np.abs(other - turned).max() > 0.1
