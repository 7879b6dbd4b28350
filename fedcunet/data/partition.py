"""Which client holds which annotations: whole photos, disjoint, everything dealt, deterministic."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import numpy as np

from fedcunet.data.annotations import Annotation
from fedcunet.data.labels import Label, labels_of
from fedcunet.data.sizes import SIZES, Sizes, client_weights
from fedcunet.errors import UserError

# "dirichlet" is over the source.
PartitionScheme = Literal[
    "iid",
    "source",
    "dirichlet",
    "category",
    "activity",
    "video",
    "dirichlet-category",
    "dirichlet-activity",
    "dirichlet-video",
    "visibility",
    "dirichlet-visibility",
]
# In this order: the place of a scheme seeds its draws.
SCHEMES: tuple[PartitionScheme, ...] = get_args(PartitionScheme)


def partition(
    annotations: Sequence[Annotation],
    *,
    num_clients: int,
    scheme: PartitionScheme,
    alpha: float,
    skew: float,
    seed: int,
    sizes: Sizes = "log-normal",
) -> list[np.ndarray]:
    """Indices of each client's annotations: `num_clients` ascending int64 arrays, none empty.

    Args:
        annotations: all there is to deal; annotations with one `photo` stay together.
        num_clients: number of parts.
        scheme: "iid" deals photos at random. "source", "category" and "activity" (of MPII's
            people), "video" and "visibility" (how many ankles and knees are labelled) give each
            client photos of one such label only, labels getting clients in proportion to their
            annotations (with fewer clients than labels, a client gets whole labels). A photo of
            several people has the label of the first. "dirichlet" deals each source,
            "dirichlet-category" and so on each of those labels, in shares drawn from a Dirichlet
            distribution over the clients (Li et al., "Federated learning on non-IID data silos",
            ICDE 2022, section 4.1, with the label in place of the class). Photos without activity
            are a label of their own; each photo without video is a video of its own.
        alpha: concentration of "dirichlet": small gives clients of one source each, large is iid.
        skew: log-normal sizes are proportional to exp(skew * z), z standard normal: 0 makes them
            as equal as whole photos allow, 1 spreads them over a factor of about 25 (from 5 % to
            95 %).
        seed: all randomness derives from it.
        sizes: what the clients' sizes follow; `client_weights` explains the names.

    Raises:
        UserError: an argument is out of range, there are fewer photos than clients, or no photo
            has the label.
    """
    _check(scheme, num_clients, alpha, skew, sizes)
    groups = photos_of(annotations, num_clients)
    rng = np.random.default_rng([seed, SCHEMES.index(scheme)])
    weights = client_weights(sizes, num_clients, skew, rng)
    size_P = np.array([len(group) for group in groups])
    if scheme == "iid":
        owner_P = _deal(size_P, weights, rng)
    else:
        first_P = [annotations[group[0]] for group in groups]
        names_P = labels_of(first_P, _label_of(scheme))
        label_P = np.asarray(np.unique(np.array(names_P), return_inverse=True)[1])
        if scheme.startswith("dirichlet"):
            owner_P = _by_dirichlet(size_P, label_P, weights, alpha, rng)
        else:
            owner_P = _by_label(size_P, label_P, weights, rng)
    return parts_of(groups, owner_P, num_clients)


def photos_of(annotations: Sequence[Annotation], num_clients: int) -> list[list[int]]:
    """Indices of the annotations of each photo. Raises UserError if clients outnumber photos."""
    photos: dict[str, list[int]] = {}
    for index, annotation in enumerate(annotations):
        photos.setdefault(annotation.photo, []).append(index)
    if len(photos) < num_clients:
        raise UserError(
            f"partition: expected at least one photo for each of {num_clients} clients, "
            f"found {len(photos)} photos"
        )
    return list(photos.values())


def parts_of(
    groups: Sequence[Sequence[int]], owner_P: np.ndarray, num_clients: int
) -> list[np.ndarray]:
    """Each client's indices in ascending order, of whole photos with the given owners."""
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for group, owner in zip(groups, owner_P, strict=True):
        parts[owner].extend(group)
    return [np.array(sorted(part), dtype=np.int64) for part in parts]


class OwnParts(NamedTuple):
    """A client's images: three ascending int64 arrays of indices, disjoint, of whole photos."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def own_parts(
    annotations: Sequence[Annotation],
    part: np.ndarray,
    *,
    validation: float,
    test: float,
    seed: int,
) -> OwnParts:
    """What a client does with its images; both shares are of all of them, taken by `hold_back`."""
    rest, test_part = hold_back(annotations, part, test, seed)
    share = validation * len(part) / max(len(rest), 1)
    train, validation_part = hold_back(annotations, rest, share, seed)
    return OwnParts(train, validation_part, test_part)


def hold_back(
    annotations: Sequence[Annotation], part: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """A client's part split into what it trains on and what it keeps back.

    Photos stay whole. Their order is that of a hash of seed and name, so that a photo does not
    change sides when another joins the client. Photos are held back while that brings their
    annotations closer to `fraction` of all; a client of two photos or more holds back one at
    least and never all of them, one of a single photo none.

    Args:
        annotations: what the indices of `part` refer to.
        part: the client's indices.
        fraction: 0 holds nothing back.
        seed: of the order.

    Returns:
        Two ascending int64 arrays.
    """
    photos: dict[str, list[int]] = {}
    for index in part.tolist():
        photos.setdefault(annotations[index].photo, []).append(index)
    order = sorted(photos, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    held: list[int] = []
    if fraction > 0:
        for name in order[:-1]:
            if held and len(held) + len(photos[name]) / 2 > fraction * len(part):
                break
            held.extend(photos[name])
    kept = sorted(set(part.tolist()) - set(held))
    return np.array(kept, dtype=np.int64), np.array(sorted(held), dtype=np.int64)


def _label_of(scheme: PartitionScheme) -> Label:
    return cast(Label, scheme.removeprefix("dirichlet").removeprefix("-") or "source")


def _check(scheme: str, num_clients: int, alpha: float, skew: float, sizes: str) -> None:
    if scheme not in SCHEMES:
        raise UserError(f"partition: expected one of {', '.join(SCHEMES)}, found {scheme!r}")
    if sizes not in SIZES:
        raise UserError(f"partition sizes: expected one of {', '.join(SIZES)}, found {sizes!r}")
    if num_clients < 1:
        raise UserError(f"partition: expected 1 client or more, found {num_clients}")
    if not (math.isfinite(skew) and 0 <= skew <= 10):
        raise UserError(f"partition skew: expected 0 to 10, found {skew}")
    if scheme.startswith("dirichlet") and not (math.isfinite(alpha) and alpha > 0):
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


def _by_label(
    size_P: np.ndarray, label_P: np.ndarray, weights: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    num_labels = int(label_P.max()) + 1
    size_L = np.bincount(label_P, weights=size_P)
    owner_P = np.empty(len(size_P), dtype=np.int64)
    if len(weights) < num_labels:
        # The largest first, each to whoever is furthest below their share; everybody gets one
        # before anybody gets a second.
        target = weights / weights.sum() * size_P.sum()
        held = np.zeros(len(weights))
        shuffled_L = rng.permutation(num_labels)  # decides among labels of one size
        order_L = shuffled_L[np.argsort(-size_L[shuffled_L], kind="stable")]
        for turn, label in enumerate(order_L):
            free = held == 0 if turn < len(weights) else np.ones(len(weights), dtype=bool)
            owner = int(np.argmax(np.where(free, target - held, -np.inf)))
            owner_P[label_P == label] = owner
            held[owner] += size_L[label]
        return owner_P
    first = 0
    for label, clients in enumerate(_allot(size_L, np.bincount(label_P), len(weights))):
        chosen = label_P == label
        part = _deal(size_P[chosen], weights[first : first + clients], rng)
        owner_P[chosen] = first + part
        first += clients
    return owner_P


def _allot(size_L: np.ndarray, photos_L: np.ndarray, num_clients: int) -> np.ndarray:
    """Clients per label: one each, then to the largest quotient (Sainte-Laguë's rule).

    No label gets more clients than it has photos.
    """
    clients_L = np.ones(len(size_L), dtype=np.int64)
    for _ in range(num_clients - len(size_L)):
        quotient_L = np.where(clients_L < photos_L, size_L / (2 * clients_L + 1), -1.0)
        clients_L[np.argmax(quotient_L)] += 1
    return clients_L


def _by_dirichlet(
    size_P: np.ndarray,
    label_P: np.ndarray,
    weights: np.ndarray,
    alpha: float,
    rng: np.random.Generator,
) -> np.ndarray:
    num_clients = len(weights)
    concentration = np.maximum(alpha * num_clients * weights / weights.sum(), 1e-6)
    owner_P = np.empty(len(size_P), dtype=np.int64)
    for label in range(int(label_P.max()) + 1):
        chosen = rng.permutation(np.flatnonzero(label_P == label))
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
