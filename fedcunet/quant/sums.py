"""Sums of sources, and pooled ones: stages without parameters.

Shapes: n samples of a chunk, C channels, H W the sides of a map. Channels come last.
"""

from collections.abc import Iterator

import torch

from fedcunet.quant.outputs import Output, unpool
from fedcunet.quant.pieces import Input, Surroundings, chunks
from fedcunet.quant.sources import Source


class Sum:
    """A sum of sources, or one source pooled: a stage without parameters."""

    def __init__(self, around: Surroundings, inputs: list[Input], output: Output) -> None:
        self.around, self.inputs, self.output = around, inputs, output
        source, scale = inputs[0].source, inputs[0].scale
        self.batch, height, width, self.channels = source.shape
        self.height, self.width = height * scale, width * scale

    def outputs(self) -> list[Output]:
        """The one output."""
        return [self.output]

    def reads(self) -> list[Source]:
        """None: the gradient of a sum does not depend on what was summed."""
        return []

    def needs(self) -> list[Source]:
        """The sources that the sum is computed from."""
        return [each.source for each in self.inputs]

    def forward(self) -> None:
        """Puts the sum into the output."""
        self._run(again=False)
        self.output.source.finish()

    def refill(self, source: Source) -> None:
        """Computes the codes of the released output again, to the bit."""
        assert source is self.output.source
        self._run(again=True)

    def _samples(self) -> Iterator[slice]:
        for samples, _ in chunks(self.batch, self.channels, self.height, self.width):
            yield samples

    def _run(self, *, again: bool) -> None:
        workspace = self.around.workspace
        for samples in self._samples():
            n = samples.stop - samples.start
            shape = (n, self.height, self.width, self.channels)
            total_nHWC = workspace.take("y 0", *shape)
            grids = [each.source.grid(samples) for each in self.inputs]
            so_far = torch.stack([middle for middle, _ in grids]).sum(0)
            for each, (_, step_n11C) in zip(self.inputs, grids, strict=True):
                x_nHWC = workspace.take("x", *shape)
                each.load(samples, slice(0, self.height), x_nHWC, workspace)
                so_far = torch.addcmul(so_far, x_nHWC, step_n11C, out=total_nHWC)
            self.output.put(samples, total_nHWC, again=again)

    def backward(self) -> None:
        """Adds to the waiting gradients of the inputs."""
        rows = slice(0, self.height)
        are_first = self.around.open_gradients(self.inputs)
        for samples in self._samples():
            gradient_nhwC = self.output.gradient(samples)
            if self.output.pool:
                n = samples.stop - samples.start
                place = self.around.workspace.take("y 0", n, self.height, self.width, self.channels)
                index = self.output.pooled_from(samples, slice(None))
                gradient_nhwC = unpool(gradient_nhwC, index, place)
            for each, first in zip(self.inputs, are_first, strict=True):
                self.around.add_gradient(each, samples, rows, gradient_nhwC, first=first)
        self.output.release()
