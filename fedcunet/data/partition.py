"""Which client holds which annotations: whole photos, disjoint, everything dealt, deterministic."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedcunet.data.annotations import Annotation
from fedcunet.errors import UserError

PartitionScheme = Literal["iid", "source", "dirichlet"]
SCHEMES: tuple[PartitionScheme, ...] = ("iid", "source", "dirichlet")


def partition(
    annotations: Sequence[Annotation],
    *,
    num_clients: int,
    scheme: PartitionScheme,
    alpha: float,
    skew: float,
    seed: int,
) -> list[np.ndarray]:
    """Indices of each client's annotations: `num_clients` ascending int64 arrays, none empty.

    Args:
        annotations: all there is to deal; annotations with one `photo` stay together.
        num_clients: number of parts.
        scheme: "iid" deals photos at random. "source" gives each client photos of one source only,
            sources getting clients in proportion to their annotations (with fewer clients than
            sources, a client gets whole sources). "dirichlet" deals each source in shares drawn
            from a Dirichlet distribution over the clients (Li et al., "Federated learning on
            non-IID data silos", ICDE 2022, section 4.1, with the source in place of the class).
        alpha: concentration of "dirichlet": small gives clients of one source each, large is iid.
        skew: sizes are proportional to exp(skew * z), z standard normal: 0 makes them as equal as
            whole photos allow, 1 spreads them over a factor of about 25 (from 5 % to 95 %).
        seed: all randomness derives from it.

    Raises:
        UserError: an argument is out of range, or there are fewer photos than clients.
    """
    _check(scheme, num_clients, alpha, skew)
    photos: dict[str, list[int]] = {}
    for index, annotation in enumerate(annotations):
        photos.setdefault(annotation.photo, []).append(index)
    groups = list(photos.values())
    if len(groups) < num_clients:
        raise UserError(
            f"partition: expected at least one photo for each of {num_clients} clients, "
            f"found {len(groups)} photos"
        )
    rng = np.random.default_rng([seed, SCHEMES.index(scheme)])
    weights = np.exp(skew * rng.standard_normal(num_clients))
    size_P = np.array([len(group) for group in groups])
    names = [annotations[group[0]].source for group in groups]
    source_P = np.unique(np.array(names), return_inverse=True)[1]
    if scheme == "iid":
        owner_P = _deal(size_P, weights, rng)
    elif scheme == "source":
        owner_P = _by_source(size_P, source_P, weights, rng)
    else:
        owner_P = _by_dirichlet(size_P, source_P, weights, alpha, rng)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for group, owner in zip(groups, owner_P, strict=True):
        parts[owner].extend(group)
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


def _check(scheme: str, num_clients: int, alpha: float, skew: float) -> None:
    if scheme not in SCHEMES:
        raise UserError(f"partition: expected one of {', '.join(SCHEMES)}, found {scheme!r}")
    if num_clients < 1:
        raise UserError(f"partition: expected 1 client or more, found {num_clients}")
    if not (math.isfinite(skew) and 0 <= skew <= 10):
        raise UserError(f"partition skew: expected 0 to 10, found {skew}")
    if scheme == "dirichlet" and not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"partition alpha: expected a finite number above 0, found {alpha}")


def _deal(size_P: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Owner of each photo: shuffled, each goes to whoever is furthest below their share.

    The first len(weights) photos go round once, so that nobody stays empty.
    """
    target = weights / weights.sum() * size_P.sum()
    held = np.zeros(len(weights))
    owner_P = np.empty(len(size_P), dtype=np.int64)
    for turn, photo in enumerate(rng.permutation(len(size_P))):
        owner = turn if turn < len(weights) else int(np.argmax(target - held))
        owner_P[photo] = owner
        held[owner] += size_P[photo]
    return owner_P


def _by_source(
    size_P: np.ndarray, source_P: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    num_sources = int(source_P.max()) + 1
    size_S = np.bincount(source_P, weights=size_P)
    owner_P = np.empty(len(size_P), dtype=np.int64)
    if len(weights) < num_sources:
        held = np.zeros(len(weights))
        for source in np.argsort(-size_S, kind="stable"):
            owner = int(np.argmin(held))
            owner_P[source_P == source] = owner
            held[owner] += size_S[source]
        return owner_P
    first = 0
    for source, clients in enumerate(_allot(size_S, np.bincount(source_P), len(weights))):
        chosen = source_P == source
        part = _deal(size_P[chosen], weights[first : first + clients], rng)
        owner_P[chosen] = first + part
        first += clients
    return owner_P


def _allot(size_S: np.ndarray, photos_S: np.ndarray, num_clients: int) -> np.ndarray:
    """Clients per source: one each, then to the largest quotient (Sainte-Laguë's rule).

    No source gets more clients than it has photos.
    """
    clients_S = np.ones(len(size_S), dtype=np.int64)
    for _ in range(num_clients - len(size_S)):
        quotient_S = np.where(clients_S < photos_S, size_S / (2 * clients_S + 1), -1.0)
        clients_S[np.argmax(quotient_S)] += 1
    return clients_S


def _by_dirichlet(
    size_P: np.ndarray,
    source_P: np.ndarray,
    weights: np.ndarray,
    alpha: float,
    rng: np.random.Generator,
) -> np.ndarray:
    num_clients = len(weights)
    concentration = np.maximum(alpha * num_clients * weights / weights.sum(), 1e-6)
    owner_P = np.empty(len(size_P), dtype=np.int64)
    for source in range(int(source_P.max()) + 1):
        chosen = rng.permutation(np.flatnonzero(source_P == source))
        bounds = np.cumsum(rng.dirichlet(concentration))
        # The middle of each photo on a line from 0 to 1 falls into its owner's share.
        place = (np.cumsum(size_P[chosen]) - size_P[chosen] / 2) / size_P[chosen].sum()
        owner_P[chosen] = np.minimum(np.searchsorted(bounds, place), num_clients - 1)
    photos_C = np.bincount(owner_P, minlength=num_clients)
    for client in np.flatnonzero(photos_C == 0):
        giver = int(np.argmax(photos_C))
        owner_P[rng.choice(np.flatnonzero(owner_P == giver))] = client
        photos_C[giver] -= 1
        photos_C[client] += 1
    return owner_P
