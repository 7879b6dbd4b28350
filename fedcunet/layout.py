"""Names, shapes and order of the tensors in an update, and the flat vectors made of them."""

import functools
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

# The payload's header counts parameters in 32 bits.
_MAX_PARAMETERS = 2**32 - 1


@dataclass(frozen=True)
class Layout:
    """Names and shapes of an update's tensors, in the order in which they travel.

    Attributes:
        names: Of the tensors, each once.
        shapes: Their shapes.
        fine: For each tensor whether it is coded at the fine bits (BatchNorm affine parameters and
            statistics, first and last convolutions).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    fine: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.shapes) == len(self.fine):
            raise ValueError(
                f"a layout of {len(self.names)} names has {len(self.shapes)} shapes and"
                f" {len(self.fine)} marks"
            )
        if len(set(self.names)) != len(self.names):
            raise ValueError("a layout names a tensor twice")
        if any(side < 0 for shape in self.shapes for side in shape):
            raise ValueError("a layout has a negative side")
        if self.num_parameters > _MAX_PARAMETERS:
            raise ValueError(f"{self.num_parameters} parameters are more than {_MAX_PARAMETERS}")

    @classmethod
    def from_tensors(
        cls, shapes: Mapping[str, Collection[int]], fine: Collection[str] = ()
    ) -> "Layout":
        """The layout of tensors by name, in the mapping's order; `fine` names the fine ones."""
        unknown = set(fine) - set(shapes)
        if unknown:
            raise ValueError(f"no such tensor to be coded finely: {', '.join(sorted(unknown))}")
        return cls(
            names=tuple(shapes),
            shapes=tuple(tuple(int(side) for side in shape) for shape in shapes.values()),
            fine=tuple(name in fine for name in shapes),
        )

    @classmethod
    def vector(cls, length: int) -> "Layout":
        """The layout "vector of n": one tensor of `length` values, coded by the codec alone."""
        return cls(names=("vector",), shapes=((length,),), fine=(False,))

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        # Python's integers: a product of sides from elsewhere may not fit 64 bits.
        return tuple(functools.reduce(lambda a, b: a * b, shape, 1) for shape in self.shapes)

    @functools.cached_property
    def num_parameters(self) -> int:
        """Values of all tensors together."""
        return sum(self.lengths)

    @functools.cached_property
    def layout_id(self) -> bytes:
        """8 bytes hashed from names, shapes and fine marks."""
        text = json.dumps([self.names, self.shapes, self.fine])
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    def segments(self, *, fine: bool) -> tuple[int, ...]:
        """Lengths of the tensors that are `fine`, or of those that are not."""
        return tuple(n for n, mark in zip(self.lengths, self.fine, strict=True) if mark == fine)

    @functools.cached_property
    def runs(self) -> tuple[tuple[int, int, bool], ...]:
        """(start, stop, fine) of the longest pieces of a flat vector with one mark."""
        runs: list[tuple[int, int, bool]] = []
        start = 0
        for length, mark in zip(self.lengths, self.fine, strict=True):
            if runs and runs[-1][2] == mark:
                runs[-1] = (runs[-1][0], start + length, mark)
            else:
                runs.append((start, start + length, mark))
            start += length
        return tuple(runs)

    def flatten(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """One float32 vector of all tensors in layout order; names and shapes must agree."""
        if set(tensors) != set(self.names):
            differing = sorted(set(tensors) ^ set(self.names))
            raise ValueError(f"tensors and layout differ in: {', '.join(differing)}")
        for name, shape in zip(self.names, self.shapes, strict=True):
            if tensors[name].shape != shape:
                raise ValueError(f"'{name}' has shape {tensors[name].shape}, not {shape}")
        flat = np.empty(self.num_parameters, dtype=np.float32)
        for name, part in self.split(flat).items():
            part[...] = tensors[name]
        return flat

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors by name as views of a vector in layout order."""
        if flat.shape != (self.num_parameters,):
            raise ValueError(f"the vector has shape {flat.shape}, not ({self.num_parameters},)")
        stops = np.cumsum(self.lengths).tolist()
        return {
            name: flat[stop - length : stop].reshape(shape)
            for name, shape, length, stop in zip(
                self.names, self.shapes, self.lengths, stops, strict=True
            )
        }

    def gather(self, flat: np.ndarray, *, fine: bool) -> np.ndarray:
        """The values of the tensors that are `fine`, or of the others, as one vector."""
        parts = [flat[start:stop] for start, stop, mark in self.runs if mark == fine]
        return np.concatenate(parts) if parts else flat[:0]

    def places(self, main: np.ndarray, fine: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Where the values that `gather` gave for the two kinds stand in the vector, as views."""
        done = {False: 0, True: 0}
        for start, stop, mark in self.runs:
            source = fine if mark else main
            yield slice(start, stop), source[done[mark] : done[mark] + stop - start]
            done[mark] += stop - start

    def scatter(self, main: np.ndarray, fine: np.ndarray) -> np.ndarray:
        """The vector in layout order from what `gather` gave for the two kinds."""
        flat = np.empty(self.num_parameters, dtype=np.float32)
        for place, values in self.places(main, fine):
            flat[place] = values
        return flat
