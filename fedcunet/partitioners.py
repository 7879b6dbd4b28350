"""Partitions of a setting: the project's own schemes, and partitioners of `flwr-datasets`.

The latter are an optional extra (`pip install 'fedcunet[partitioners]'`). They deal the rows of a
table; here a row is a photo with its label, so that photos stay whole.
"""

import importlib
import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from fedcunet.config import FLOWER_SCHEMES, FederationConfig
from fedcunet.data.annotations import Annotation
from fedcunet.data.labels import labels_of
from fedcunet.data.partition import PartitionScheme, partition, parts_of, photos_of
from fedcunet.errors import UserError

_ROW, _LABEL = "row", "label"

# Those that cut the table in its order and take no seed.
_BY_SIZE = ("LinearPartitioner", "SquarePartitioner", "ExponentialPartitioner")


def deal(
    annotations: Sequence[Annotation], setting: FederationConfig, *, num_clients: int, seed: int
) -> list[np.ndarray]:
    """Indices of each client's annotations by the setting's scheme, as `partition` gives them.

    Raises:
        UserError: as `partition`; a scheme "flwr:…" without its package, or one that fails on
            these photos, leaves some out or a client empty.
    """
    if setting.partition not in FLOWER_SCHEMES:
        return partition(
            annotations,
            num_clients=num_clients,
            scheme=cast(PartitionScheme, setting.partition),
            alpha=setting.partition_alpha,
            skew=setting.partition_skew,
            seed=seed,
            sizes=setting.partition_sizes,
        )
    if num_clients < 1:
        raise UserError(f"partition: expected 1 client or more, found {num_clients}")
    groups = photos_of(annotations, num_clients)
    name = setting.partition.removeprefix("flwr:")
    labels, arguments = [""] * len(groups), {}
    if name not in _BY_SIZE:
        labels = labels_of([annotations[group[0]] for group in groups], setting.partition_label)
        arguments = _arguments(name, setting, len(groups) / num_clients)
        arguments |= {"partition_by": _LABEL, "seed": seed}
    owner_P = _owners(name, labels, num_clients, seed, arguments)
    return parts_of(groups, owner_P, num_clients)


def _arguments(
    name: str, setting: FederationConfig, photos_per_client: float
) -> dict[str, str | int | float | bool]:
    """What a partitioner by label is told beside the label and the seed."""
    labels = setting.partition_labels_per_client
    if name == "DirichletPartitioner":
        alpha = setting.partition_alpha
        return {"alpha": alpha, "min_partition_size": 1, "self_balancing": False}
    if name == "PathologicalPartitioner":
        # Its "random" assignment would lose the photos of a label that no client drew.
        assignment = "first-deterministic"
        return {"num_classes_per_partition": labels, "class_assignment_mode": assignment}
    # A number of shards a client instead of their size would lose what the division leaves.
    return {"shard_size": math.ceil(photos_per_client / labels), "keep_incomplete_shard": True}


def _owners(
    name: str, labels: list[str], num_clients: int, seed: int, arguments: dict[str, Any]
) -> np.ndarray:
    """The client of each photo, by a partitioner of `flwr-datasets`."""
    datasets, partitioners = _modules(name)
    # The table's order is by the seed, for partitioners by size cut it as it is.
    order_P = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    table = {_ROW: order_P.tolist(), _LABEL: [labels[row] for row in order_P]}
    owner_P = np.full(len(labels), -1, dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pandas and pyarrow about their callers
        try:
            partitioner = getattr(partitioners, name)(num_partitions=num_clients, **arguments)
            partitioner.dataset = datasets.Dataset.from_dict(table)
            for client in range(num_clients):
                owner_P[partitioner.load_partition(client)[_ROW]] = client
        except (ValueError, KeyError, IndexError, ArithmeticError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"partition flwr:{name}: cannot deal {len(labels)} photos to {num_clients} "
                f"clients: {reason}"
            ) from error
    lost = int((owner_P < 0).sum())
    empty = np.flatnonzero(np.bincount(owner_P[owner_P >= 0], minlength=num_clients) == 0)
    if lost or len(empty):
        raise UserError(
            f"partition flwr:{name}: expected every photo at a client and no client empty, "
            f"found {lost} of {len(labels)} photos at none and {len(empty)} empty clients"
        )
    return owner_P


def _modules(name: str) -> tuple[Any, Any]:
    # Nothing is fetched, nothing reported, and standard error is for one line a problem.
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TQDM_DISABLE"):
        os.environ.setdefault(variable, "1")
    try:
        datasets = importlib.import_module("datasets")
        return datasets, importlib.import_module("flwr_datasets.partitioner")
    except ImportError as error:
        raise UserError(
            f"partition flwr:{name}: expected the package flwr-datasets, found none; "
            "pip install 'fedcunet[partitioners]'"
        ) from error
