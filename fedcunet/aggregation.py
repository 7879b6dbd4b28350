"""What the server does with decoded updates: the weighted mean, then a step of its optimiser.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017 (the mean weighted by examples); Reddi et al., "Adaptive Federated
Optimization", ICLR 2021, Algorithm 2 (the mean update as a pseudo-gradient).

N is the length of the vector of the network's whole state (`layout.Layout`).
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from fedcunet.layout import Layout
from fedcunet.saved import Saved
from fedcunet.variances import VARIANCE_SUFFIX, kept, to_logarithms, to_variances

MEAN_SUFFIX = ".running_mean"

SERVER_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, momentum: torch.optim.SGD(p, lr=lr, momentum=momentum),
    # eps as in Reddi et al.: the pseudo-gradients are far smaller than gradients.
    "adam": lambda p, lr, momentum: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.99), eps=1e-3),
    "adagrad": lambda p, lr, momentum: torch.optim.Adagrad(p, lr=lr, eps=1e-3),
}


class MeanAccumulator:
    """The weighted mean of any number of updates in one float32 buffer.

    BatchNorm statistics are averaged nearly as those of a mixture. A variance is the geometric mean
    of the clients' variances, which the noise of coding does not raise as it does their mean, plus
    the variance of their means, else clients that differ would look more alike than they are.

    Args:
        layout: names and shapes of the vector's tensors.
        state_N: the global state that the updates are differences to.
        mixture: without it the spread of the means is left out, and the mean follows from the sum
            of the updates alone, which privacy asks for.
    """

    def __init__(self, layout: Layout, state_N: np.ndarray, *, mixture: bool = True) -> None:
        self._mixture = mixture
        means, variances = _statistics(layout)
        self._means, self._variances = means, variances
        self._logarithms = state_N[variances]
        self._sum_N = np.zeros(layout.num_parameters, dtype=np.float32)
        self._sum_of_squares = np.zeros(len(means))  # of the steps of running means
        self.weight = 0.0

    def add(self, update_N: np.ndarray, weight: float) -> None:
        """Adds a decoded update; `weight` > 0 is the client's number of examples."""
        self.add_parts([(slice(0, update_N.size), update_N)], weight)

    def add_parts(self, parts: Iterable[tuple[slice, np.ndarray]], weight: float) -> None:
        """Adds an update whose values come in parts with their places in the vector."""
        steps = np.zeros(len(self._means))
        for place, values in parts:
            # In pieces: no second vector of N values is made.
            for begin in range(0, values.size, 2**16):
                piece = values[begin : begin + 2**16]
                start = place.start + begin
                self._sum_N[start : start + piece.size] += np.float32(weight) * piece
            first, last = self._means.searchsorted([place.start, place.stop])
            steps[first:last] = values[self._means[first:last] - place.start]
        self._sum_of_squares += weight * steps**2
        self.weight += weight

    def mean(self) -> np.ndarray:
        """The mean update (N,), float32. Raises ValueError if nothing was added."""
        if self.weight <= 0:
            raise ValueError("the mean of no updates")
        mean_N: np.ndarray = self._sum_N / np.float32(self.weight)
        if not self._mixture:
            return mean_N
        steps = mean_N[self._means].astype(np.float64)
        spread = np.maximum(self._sum_of_squares / self.weight - steps**2, 0)
        variances = to_variances(self._logarithms + mean_N[self._variances])
        mean_N[self._variances] = to_logarithms(variances + spread) - self._logarithms
        return mean_N


def statistics_places(layout: Layout) -> list[tuple[slice, slice]]:
    """Where in the vector each BatchNorm's running mean and running variance stand."""
    place_of: dict[str, slice] = {}
    position = 0
    for name, length in zip(layout.names, layout.lengths, strict=True):
        place_of[name] = slice(position, position + length)
        position += length
    return [
        (place, place_of[name.removesuffix(MEAN_SUFFIX) + VARIANCE_SUFFIX])
        for name, place in place_of.items()
        if name.endswith(MEAN_SUFFIX)
    ]


def _statistics(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the running means, ascending, and of their running variances."""
    means: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    variances: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
    for mean, variance in statistics_places(layout):
        means.append(np.arange(mean.start, mean.stop))
        variances.append(np.arange(variance.start, variance.stop))
    return np.concatenate(means), np.concatenate(variances)


def statistics_at(layout: Layout) -> np.ndarray:
    """Positions of all BatchNorm statistics in the vector, ascending."""
    return np.sort(np.concatenate(_statistics(layout)))


def statistics_mask(layout: Layout) -> np.ndarray:
    """True (N,) where the vector holds a BatchNorm statistic."""
    mask_N = np.zeros(layout.num_parameters, dtype=bool)
    mask_N[statistics_at(layout)] = True
    return mask_N


class StateRange:
    """What the values of a global state are kept within.

    Logarithms of variances stay on their grid (`variances.py`), latent weights at 1 or 2 bits
    within [-1, 1].

    Args:
        layout: names and shapes of the vector's tensors.
        clamp_latent: whether the tensors that are not fine are latent weights.
    """

    def __init__(self, layout: Layout, *, clamp_latent: bool) -> None:
        _, self._variances = _statistics(layout)
        self._latent = [
            slice(start, stop) for start, stop, fine in layout.runs if clamp_latent and not fine
        ]

    def keep(self, state_N: np.ndarray) -> np.ndarray:
        """Brings `state_N` (N,), float32, into the range in place; returns it."""
        state_N[self._variances] = kept(state_N[self._variances])
        for part in self._latent:
            np.clip(state_N[part], -1, 1, out=state_N[part])
        return state_N


class ServerOptimizer:
    """Moves the global state by mean updates.

    BatchNorm statistics take the mean update as it is: they are measurements, no parameters.

    Args:
        layout: names and shapes of the vector's tensors.
        name: `sgd` (with rate 1 and no momentum: federated averaging), `adam` or `adagrad`.
        learning_rate: of the server.
        momentum: of `sgd`.
        clamp_latent: of the new state, as in `StateRange`.
    """

    def __init__(
        self,
        layout: Layout,
        name: str,
        *,
        learning_rate: float,
        momentum: float,
        clamp_latent: bool,
    ) -> None:
        self._is_statistic_N = statistics_mask(layout)
        self._range = StateRange(layout, clamp_latent=clamp_latent)
        self._parameter = torch.nn.Parameter(torch.zeros(layout.num_parameters))
        self._optimizer = SERVER_OPTIMIZERS[name]([self._parameter], learning_rate, momentum)

    def saved(self) -> Saved:
        """What `restore` needs: torch's state of the optimiser."""
        state = self._optimizer.state[self._parameter]
        return Saved({name: tensor.numpy() for name, tensor in state.items() if tensor is not None})

    def restore(self, saved: Saved) -> None:
        """Goes on from what was saved."""
        for name, tensor in saved.tensors.items():
            self._optimizer.state[self._parameter][name] = torch.from_numpy(tensor)

    def step(self, state_N: np.ndarray, mean_update_N: np.ndarray) -> np.ndarray:
        """The next global state (N,), float32; the arguments stay as they are."""
        with torch.no_grad():
            self._parameter.copy_(torch.from_numpy(state_N))
        self._parameter.grad = torch.from_numpy(-mean_update_N)
        self._optimizer.step()
        self._parameter.grad = None  # not kept until the next round
        new_N: np.ndarray = self._parameter.detach().numpy().copy()
        new_N = np.where(self._is_statistic_N, state_N + mean_update_N, new_N)
        return self._range.keep(new_N)
