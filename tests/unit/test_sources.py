"""What waits for the backward pass: packed sources, pooling indices, coded gradients."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fedcunet.quant.kernels import encode
from fedcunet.quant.outputs import GradientQuantiser, gather, pool_codes, pool_values, unpool
from fedcunet.quant.packing import pack_rows, packed_row, unpack_rows
from fedcunet.quant.rounding import Rounding
from fedcunet.quant.sources import QuantiseSource, Source, source_grid
from fedcunet.quant.waiting import CodedGradient
from fedcunet.quant.workspace import Workspace

WHOLE = slice(None)


@given(
    width=st.sampled_from([2, 4, 6]),
    shape=st.tuples(*[st.integers(1, high) for high in (3, 5, 5, 9)]),
    seed=st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_packed_codes_come_back_in_the_bytes_that_are_counted(
    width: int, shape: tuple[int, int, int, int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**width, shape, generator=generator, dtype=torch.uint8)
    packed = pack_rows(codes, width)
    values = shape[2] * shape[3]
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:2], packed_row(values, width))
    assert unpack_rows(packed, width, values).equal(codes.flatten(2))
    row = unpack_rows(packed[:, :1], width, values)
    assert row.equal(codes[:, :1].flatten(2))


@pytest.mark.parametrize(("bits", "share"), [(16, 2), (8, 1), (6, 0.75), (5, 0.75), (4, 0.5)])
def test_a_source_takes_its_bits(bits: int, share: float) -> None:
    source = Source((2, 4, 4, 8), bits=bits, packed=True, like=torch.zeros(0))
    source.store(slice(0, 2), torch.zeros(2, 4, 4, 8), encoded=True)
    assert source.data.nbytes == 2 * 8 * 16 * share


def test_source_quantiser_has_a_grid_for_each_sample_and_channel() -> None:
    x = torch.tensor(
        [[[[0.4, -1.0, 1.0]], [[30.0, 10.0, 21.0]]], [[[5.0, 5.0, 5.0]], [[-3.0, 0.0, -1.2]]]]
    )
    x.requires_grad_()
    y = QuantiseSource.apply(x, 3)  # six steps from the least to the greatest value
    expected = [[[[1 / 3, -1, 1]], [[30, 10, 20]]], [[[5, 5, 5]], [[-3, 0, -1]]]]
    assert y.detach().allclose(torch.tensor(expected))
    (y * torch.arange(12.0).view_as(y)).sum().backward()
    assert x.grad.flatten().tolist() == list(range(12))


@given(
    bits=st.sampled_from([2, 4, 6, 8, 16]),
    middle=st.sampled_from([0.0, 1.0, -1e6, 1e30, 2e38]),
    half=st.sampled_from([0.0, 1e-42, 1e-30, 1e-6, 1.0, 1e38]),
    seed=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_code_is_beyond_its_bits_and_no_value_off_by_more_than_half_a_step(
    bits: int, middle: float, half: float, seed: int
) -> None:
    levels = 2 ** (bits - 1) - 1
    x = middle + half * (2 * torch.rand(50, generator=torch.Generator().manual_seed(seed)) - 1)
    m, s = source_grid(x.min(), x.max(), bits)
    codes = encode(x, m, s, out=torch.empty_like(x))
    assert codes.isfinite().all()
    assert codes.abs().max() <= levels
    y = QuantiseSource.apply(x.view(1, 1, 5, 10), bits).flatten()
    torch.testing.assert_close(y, m + codes * s, rtol=1e-6, atol=1e-6 * float(s))
    # Steps below the smallest normal number are 1; where a map is nearly constant, they are as
    # small as float32 allows.
    tiny, unit = torch.finfo(x.dtype).tiny * levels, 2.0**-20 * x.abs().max()
    span = x.max().double() - x.min().double()
    assert (y.double() - x.double()).abs().max() <= span / (4 * levels) + unit + tiny


def test_source_quantiser_passes_on_what_is_not_finite() -> None:
    assert not QuantiseSource.apply(torch.tensor([[[[float("nan"), 1.0]]]]), 8).isfinite().any()
    assert not QuantiseSource.apply(torch.tensor([[[[float("inf"), 1.0]]]]), 8).isfinite().all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 9, 16])
@pytest.mark.parametrize("channels", [1, 6])
def test_packed_and_unpacked_sources_give_equal_codes_and_statistics(
    bits: int, channels: int
) -> None:
    levels = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-levels, levels + 1, (3, 4, 6, channels), generator=generator).float()
    steps = torch.rand(3, channels, generator=generator) + 0.5
    middles = torch.randn(3, channels, generator=generator) * levels
    sources = [
        Source((3, 4, 6, channels), bits=bits, packed=packed, like=codes)
        for packed in (True, False)
    ]
    space = Workspace(codes)
    for source in sources:
        for sample in range(3):
            part = slice(sample, sample + 1)
            source.middle_BC[part], source.step_BC[part] = middles[part], steps[part]
            source.store(part, codes[part].clone(), encoded=True)
            source.measure(part, codes[part], space)
        source.finish()
        assert source.load(slice(0, 3), WHOLE, torch.empty_like(codes), space).equal(codes)
        rows = codes[1:2, 2:4]
        assert source.load(slice(1, 2), slice(2, 4), torch.empty_like(rows), space).equal(rows)
        values = middles[:, None, None] + codes * steps[:, None, None]
        assert source.mean_C.allclose(values.mean((0, 1, 2)), atol=levels * 1e-6)
        assert source.variance_C.allclose(values.var((0, 1, 2), correction=0), rtol=1e-4)
    assert sources[0].variance_C.equal(sources[1].variance_C)


@pytest.mark.parametrize("pool", [pool_codes, pool_values])
def test_pooling_keeps_the_first_of_equal_maxima_and_spreads_back_to_it(
    pool: Callable[[Tensor, Workspace], tuple[Tensor, Tensor]],
) -> None:
    x = torch.randint(-3, 3, (2, 6, 8, 3), generator=torch.Generator().manual_seed(0)).float()
    theirs = x.permute(0, 3, 1, 2).clone().requires_grad_()
    expected = F.max_pool2d(theirs, 2)
    best, index = pool(x.clone(), Workspace(x))
    assert best.permute(0, 3, 1, 2).equal(expected)
    assert gather(x, index).equal(best)
    weight = torch.arange(best.numel(), dtype=torch.float32).view_as(best)
    (expected * weight.permute(0, 3, 1, 2)).sum().backward()
    assert unpool(weight, index, torch.empty_like(x)).permute(0, 3, 1, 2).equal(theirs.grad)


@given(
    bits=st.sampled_from([2, 6, 8, 12, 16]),
    shape=st.tuples(*[st.integers(1, high) for high in (2, 4, 6, 5)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_gradients_wait_in_codes_that_are_off_by_at_most_a_step(
    bits: int, shape: tuple[int, int, int, int], seed: int
) -> None:
    rounding, generator = Rounding(), torch.Generator().manual_seed(seed)
    rounding.seed(seed)
    scale = torch.randint(-9, 9, (shape[0], 1, 1, shape[3]), generator=generator)
    added = torch.randn(2, *shape, generator=generator) * 10.0**scale
    waiting = [
        CodedGradient(shape, added, bits=bits, packed=True, rounding=rounding) for _ in range(2)
    ]
    workspace = Workspace(added)
    for gradient, each in zip(added, waiting, strict=True):
        each.add(slice(0, shape[0]), slice(0, shape[1]), gradient, workspace, first=True)
    levels = 127 if bits <= 8 else 32767
    for gradient, each in zip(added, waiting, strict=True):
        found = torch.zeros(shape)
        each.add_to(found, slice(0, shape[0]), workspace)
        step = gradient.abs().amax(2, keepdim=True) / levels * 1.02
        assert bool(((found - gradient).abs() <= step).all())


@pytest.mark.parametrize(("bits", "share"), [(6, 1), (8, 1), (9, 2), (16, 2)])
def test_a_waiting_gradient_takes_its_codes_and_a_scale_of_two_bytes_a_row(
    bits: int, share: int
) -> None:
    shape = (2, 4, 32, 3)
    waiting = CodedGradient(shape, torch.zeros(0), bits=bits, packed=True, rounding=Rounding())
    assert waiting.data.nbytes == share * 2 * 4 * 32 * 3
    assert waiting.step_BH1C.nbytes == 2 * (2 * 4 * 3)


@pytest.mark.parametrize("one_scale", [False, True])
def test_gradients_are_quantised_on_their_grid_without_bias(one_scale: bool) -> None:
    bits, repeats = 4, 1500
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(2, 3, 4, 3, generator=generator) * torch.tensor([1e-6, 1.0, 30.0])
    peak = gradient.abs().amax() if one_scale else gradient.abs().amax((1, 2), keepdim=True)
    # The power of two at or above the peak over 1 - 1/8, in steps of an eighth.
    step = torch.exp2(torch.log2(peak / (1 - 1 / 8)).ceil()) / 8
    quantise = GradientQuantiser(bits, Rounding(), peak if one_scale else None)
    total = torch.zeros_like(gradient)
    for _ in range(repeats):
        codes = quantise(gradient.clone()) / step
        assert codes.equal(codes.round())
        assert codes.abs().max() <= 2 ** (bits - 1) - 1
        total += codes
    # A rounding is off by half a step at most in the mean square, and by 1/512 in the mean.
    assert (total / repeats - gradient / step).abs().max() < 5 * 0.5 / repeats**0.5


def test_gradients_wait_in_codes_without_bias() -> None:
    rounding = Rounding()
    gradient = torch.tensor([1.0, 0.3, 0.0031, -0.0002]).view(1, 1, 4, 1)
    total = torch.zeros_like(gradient)
    workspace = Workspace(gradient)
    for _ in range(4000):
        waiting = CodedGradient((1, 1, 4, 1), total, bits=8, packed=True, rounding=rounding)
        for first in (True, False):
            waiting.add(slice(0, 1), slice(0, 1), gradient / 2, workspace, first=first)
        waiting.add_to(total, slice(0, 1), workspace)
    # A step is 1/127; the mean of 4000 roundings is off by about 1/16000, and by 1/512 of a step.
    assert (total / 4000 - gradient).abs().max() < 4 / 16000


def test_random_bits_follow_from_the_seed_and_are_even() -> None:
    rounding = Rounding()
    words = torch.empty(100_000, dtype=torch.int32)
    rounding.seed(5)
    rounding.fill(words)
    first = words.clone()
    counts = torch.bincount(words.view(torch.uint8).long(), minlength=256)
    assert ((counts - 400_000 / 256).abs() < 5 * (400_000 / 256) ** 0.5).all()
    rounding.fill(words)
    assert not words.equal(first)
    rounding.seed(5)
    rounding.fill(words)
    assert words.equal(first)


@pytest.mark.parametrize("kind", ["one", "samples", "rows"])
@pytest.mark.parametrize("shape", [(3, 64, 48, 24), (1, 1, 300, 500), (2, 3, 1, 1)])
def test_values_of_any_number_are_rounded_with_factors_of_their_own(
    kind: str, shape: tuple[int, int, int, int]
) -> None:
    n, height, _, channels = shape
    factor_shape = {
        "one": (), "samples": (n, 1, 1, channels), "rows": (n, height, 1, channels)
    }[kind]  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    factor = torch.rand(factor_shape, generator=generator) * 50 + 1
    values = torch.randn(shape, generator=generator)
    exact = values * factor
    rounding = Rounding()
    first, second = (rounding.scale_and_round_(values.clone(), factor) for _ in range(2))
    for found in (first, second):
        assert found.equal(found.round())
        assert (found - exact).abs().max() < 1.001
        assert abs(float((found - exact).mean())) < 1 / 512 + 3 / values.numel() ** 0.5
    if values.numel() > 1000:  # other numbers each time: half of the values between go elsewhere
        assert 0.2 < float((first != second).float().mean()) < 0.5
    rounding.seed(0)
    assert rounding.scale_and_round_(values.clone(), factor).equal(first)
