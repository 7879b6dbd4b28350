"""Parameters' gradients as a backward pass finds them."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor, nn

# Takes a parameter and its whole gradient, and may change both.
Update = Callable[[nn.Parameter, Tensor], None]


class Collector:
    """Adds up the gradients of each parameter, and hands over those that are complete.

    Args:
        update: called with each parameter and its gradient as soon as the last of its uses has
            added to it; without it, gradients stay in `gradients`.
    """

    def __init__(self, update: Update | None) -> None:
        self.update = update
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self._open: Counter[Tensor] = Counter()

    def expect(self, parameter: Tensor) -> None:
        """Notes a use of the parameter in the forward pass: `add` will come once for it."""
        self._open[parameter] += 1

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of one use; that of a frozen parameter is dropped."""
        assert isinstance(parameter, nn.Parameter)
        if not parameter.requires_grad:
            return
        if parameter in self.gradients:
            self.gradients[parameter] += gradient
        else:
            self.gradients[parameter] = gradient
        self._open[parameter] -= 1
        if self._open[parameter] == 0 and self.update is not None:
            self.update(parameter, self.gradients.pop(parameter))
