"""Stages of a network that keep sources only, and recompute the rest in their backward passes.

A stage is Concat -> BatchNorm -> ReLU -> (input quantiser) -> convolution. It reads sources
(`sources.py`) in chunks of a few samples or rows, in work space that does not grow with the batch
or with the depth of the network, forward and again backward (Tang et al., ECCV 2018, section 3.3;
Pleiss et al., "Memory-efficient implementation of DenseNets", 2017, hold whole maps instead).
Layers that read the same sources are branches of one stage and load them once.

BatchNorm's statistics belong to the source: concatenation does not mix channels, and nearest
upsampling changes neither mean nor biased variance.

Shapes: B batch, n samples and h rows of a chunk, C channels, I and O inputs and outputs of a
convolution, H W the sides of a map, P pixels. Channels come last.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fedcunet.quant.branches import Branch, BranchBackward, convolve
from fedcunet.quant.kernels import FULL, encode, kernels_for, over_pixels
from fedcunet.quant.normalise import Normaliser, update_running
from fedcunet.quant.outputs import GradientQuantiser, Output, unpool
from fedcunet.quant.pieces import Input, Strip, Surroundings, chunks, strips
from fedcunet.quant.sources import Source, map_grid


class Stage:
    """Layers over the same sources. `forward` once, then `backward` once."""

    def __init__(self, around: Surroundings, inputs: list[Input], branches: list[Branch]) -> None:
        self.around, self.inputs, self.branches = around, list(inputs), branches
        self.kernels = kernels_for(around.workspace.like)
        source, scale = inputs[0].source, inputs[0].scale
        batch, height, width, _ = source.shape
        self.batch, self.height, self.width = batch, height * scale, width * scale
        self.channels = sum(each.source.shape[3] for each in inputs)
        for branch in branches:
            around.collector.expect(branch.conv.weight)
            if branch.norm is not None:
                around.collector.expect(branch.norm.weight)
                around.collector.expect(branch.norm.bias)

    def outputs(self) -> list[Output]:
        """Of all branches."""
        return [branch.output for branch in self.branches]

    def reads(self) -> list[Source]:
        """The sources that the backward pass needs."""
        return [each.source for each in self.inputs]

    def needs(self) -> list[Source]:
        """The sources that the results are computed from."""
        added = [branch.added.source for branch in self.branches if branch.added is not None]
        return self.reads() + added

    def _normaliser(self, branch: Branch) -> Normaliser | None:
        if branch.norm is None:
            return None
        mean_C = torch.cat([each.source.mean_C for each in self.inputs])
        variance_C = torch.cat([each.source.variance_C for each in self.inputs])
        return Normaliser(branch.norm, mean_C, variance_C, self.batch * self.height * self.width)

    def _chunks(self) -> Iterator[tuple[slice, list[Strip]]]:
        reach = 0 if self.branches[0].pointwise else 1
        for samples, height in chunks(self.batch, self.channels, self.height, self.width):
            yield samples, [Strip(rows, self.height, reach) for rows in strips(self.height, height)]

    def _codes(self, samples: slice, rows: slice) -> Tensor:
        """The codes of all inputs, side by side, in work space: (n, h, W, I)."""
        n, height = samples.stop - samples.start, rows.stop - rows.start
        workspace = self.around.workspace
        x_nhWI = workspace.take("x", n, height, self.width, self.channels)
        start = 0
        for each in self.inputs:
            stop = start + each.source.shape[3]
            each.load(samples, rows, x_nhWI[..., start:stop], workspace)
            start = stop
        return x_nhWI

    def _activated(
        self,
        branch: Branch,
        normaliser: Normaliser | None,
        x_nhWI: Tensor,
        middle_nI: Tensor,
        step_nI: Tensor,
        strip: Strip,
    ) -> tuple[Tensor, Tensor]:
        """The activation of alpha * x + shift or of x, with the strip's rows of zeros around.

        And what the convolution reads of it.
        """
        n, _, width, channels = x_nhWI.shape
        height = strip.rows.stop - strip.rows.start + 2 * strip.reach
        padded_nhWI = self.around.workspace.take("r", n, height, width, channels)
        shift_nI, factor_nI = middle_nI, step_nI
        if normaliser is not None:
            factor_nI = step_nI * normaliser.alpha_C
            shift_nI = torch.addcmul(normaliser.shift_C, middle_nI, normaliser.alpha_C)
        read_nhWI = self.kernels.activate(
            x_nhWI,
            shift_nI,
            factor_nI,
            padded_nhWI,
            strip.above,
            branch.activation,
            branch.input_grid(),
            self.around.workspace,
        )
        return padded_nhWI, read_nhWI

    def _grids(self) -> tuple[Tensor, Tensor]:
        """Middles and steps (B, I) of all inputs."""
        sources = [each.source for each in self.inputs]
        middles = torch.cat([source.middle_BC for source in sources], 1)
        return middles, torch.cat([source.step_BC for source in sources], 1)

    def forward(self) -> None:
        """Puts the results into the outputs and updates the running statistics."""
        normalisers = [self._normaliser(branch) for branch in self.branches]
        for branch, normaliser in zip(self.branches, normalisers, strict=True):
            if branch.norm is not None and normaliser is not None and branch.updates_running:
                variance_C = torch.cat([each.source.variance_C for each in self.inputs])
                update_running(branch.norm, normaliser.mean_C, variance_C, normaliser.count)
        self._run(self.branches, normalisers, again=False)
        for branch in self.branches:
            branch.output.source.finish()

    def refill(self, source: Source) -> None:
        """Computes the codes of a released source again, to the bit."""
        (branch,) = (branch for branch in self.branches if branch.output.source is source)
        self._run([branch], [self._normaliser(branch)], again=True)

    def _run(
        self, branches: list[Branch], normalisers: list[Normaliser | None], *, again: bool
    ) -> None:
        middles_BI, steps_BI = self._grids()
        weights = [branch.weight() for branch in branches]
        for samples, all_strips in self._chunks():
            results = [
                self.around.workspace.take(
                    f"y {number}",
                    samples.stop - samples.start,
                    self.height,
                    self.width,
                    branch.conv.out_channels,
                )
                for number, branch in enumerate(branches)
            ]
            for strip in all_strips:
                x_nhWI = self._codes(samples, strip.read)
                for branch, normaliser, weight, y_nHWO in zip(
                    branches, normalisers, weights, results, strict=True
                ):
                    _, read_nhWI = self._activated(
                        branch, normaliser, x_nhWI, middles_BI[samples], steps_BI[samples], strip
                    )
                    convolve(read_nhWI, weight, y_nHWO[:, strip.rows])
            for branch, y_nHWO in zip(branches, results, strict=True):
                if branch.added is not None:
                    self._add(branch, samples, y_nHWO)
                branch.output.put(samples, y_nHWO, again=again)

    def _add(self, branch: Branch, samples: slice, y_nHWO: Tensor) -> None:
        """Quantises a convolution's result, and adds the branch's other map."""
        assert branch.added is not None
        bits, workspace = branch.spec.source_bits, self.around.workspace
        other_middle, other_step = branch.added.source.grid(samples)
        if bits != FULL:
            middle, step = map(over_pixels, map_grid(y_nHWO, bits))
            encode(y_nHWO, middle, step, out=y_nHWO)
            torch.addcmul(middle + other_middle, y_nHWO, step, out=y_nHWO)
        other_nHWO = workspace.take("x", *y_nHWO.shape)
        branch.added.load(samples, slice(0, self.height), other_nHWO, workspace)
        y_nHWO.addcmul_(other_nHWO, other_step)

    def backward(self) -> None:
        """Adds to the waiting gradients of the inputs; hands over those of the parameters."""
        around, (middles_BI, steps_BI) = self.around, self._grids()
        parts = [
            BranchBackward(branch, self._normaliser(branch), around.workspace, str(number))
            for number, branch in enumerate(self.branches)
        ]
        quantisers = [self._quantiser(branch) for branch in self.branches]
        are_first = around.open_gradients(self.inputs)
        added = [branch.added for branch in self.branches if branch.added is not None]
        added_first = around.open_gradients(added)
        for samples, all_strips in self._chunks():
            dys = [
                self._output_gradient(branch, quantiser, samples, f"y {number}", added_first)
                for number, (branch, quantiser) in enumerate(
                    zip(self.branches, quantisers, strict=True)
                )
            ]
            for strip in all_strips:
                x_nhWI = self._codes(samples, strip.read)
                total_nhWI: Tensor | None = None
                for part, dy_nHWO in zip(parts, dys, strict=True):
                    grid = middles_BI[samples], steps_BI[samples]
                    padded_nhWI, read_nhWI = self._activated(
                        part.branch, part.normaliser, x_nhWI, *grid, strip
                    )
                    dz_nhWI = part.input_gradient(
                        padded_nhWI,
                        read_nhWI,
                        x_nhWI,
                        dy_nHWO[:, strip.rows],
                        *grid,
                        strip.above,
                    )
                    total_nhWI = dz_nhWI if total_nhWI is None else total_nhWI.add_(dz_nhWI)
                assert total_nhWI is not None
                self._spread(samples, strip, total_nhWI, are_first)
        for branch in self.branches:
            branch.output.release()
        for part in parts:
            late = part.finish(around.collector)
            if late is not None:
                self._spread_late(*late)

    def _quantiser(self, branch: Branch) -> GradientQuantiser:
        bits, peak = branch.spec.gradient_bits, None
        if bits != FULL and branch.spec.gradient_scale == "tensor":
            peak = torch.stack(
                [
                    branch.output.gradient(slice(sample, sample + 1)).abs().amax()
                    for sample in range(self.batch)
                ]
            ).amax()
        return GradientQuantiser(bits, self.around.rounding, peak)

    def _output_gradient(
        self,
        branch: Branch,
        quantiser: GradientQuantiser,
        samples: slice,
        name: str,
        added_first: list[bool],
    ) -> Tensor:
        """The gradient of a convolution's result for some samples: (n, H, W, O), in work space.

        The gradient of a pooled map is quantised before it is spread over four pixels, three of
        which are zero; stochastic rounding leaves zeros as they are, so this is the same quantiser.
        """
        pool = branch.output.pool
        gradient_nhwO = branch.output.gradient(samples, "gradient" if pool else name)
        if branch.added is not None:
            rows = slice(0, self.height)
            (first,) = added_first
            self.around.add_gradient(branch.added, samples, rows, gradient_nhwO, first=first)
        quantiser(gradient_nhwO)
        if not pool:
            return gradient_nhwO
        n, _, _, channels = gradient_nhwO.shape
        dy_nHWO = self.around.workspace.take(name, n, self.height, self.width, channels)
        return unpool(gradient_nhwO, branch.output.pooled_from(samples, slice(None)), dy_nHWO)

    def _spread(
        self, samples: slice, strip: Strip, gradient_nhWI: Tensor, are_first: list[bool]
    ) -> None:
        read, overlap, start = strip.read, strip.overlap, 0
        again, fresh = (
            slice(read.start, read.start + overlap),
            slice(read.start + overlap, read.stop),
        )
        add = self.around.add_gradient
        for each, first in zip(self.inputs, are_first, strict=True):
            stop = start + each.source.shape[3]
            part = gradient_nhWI[..., start:stop]
            if overlap:
                add(each, samples, again, part[:, :overlap], first=False)
                part = part[:, overlap:]
            add(each, samples, fresh, part, first=first)
            start = stop

    def _spread_late(self, by_value_I: Tensor, constant_I: Tensor) -> None:
        start = 0
        for each in self.inputs:
            stop = start + each.source.shape[3]
            part = slice(start, stop)
            each.source.add_late(by_value_I[part], constant_I[part], each.scale**2)
            start = stop
