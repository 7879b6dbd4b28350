"""`data partition`: what each client would hold, in words and as a picture."""

import json as json_module
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from fedcunet.commands.data_options import Data, Root, Seed, Subset, kind_of, say
from fedcunet.commands.options import JsonOption
from fedcunet.config import FLOWER_SCHEMES, RunConfig
from fedcunet.data import Annotation, load
from fedcunet.data.labels import LABELS, scheme_of
from fedcunet.data.partition import SCHEMES, OwnParts, own_parts
from fedcunet.data.sizes import SIZES
from fedcunet.errors import UserError
from fedcunet.partitioners import deal

# With more clients than this a row each is no longer read: a table of quantiles then.
_MAX_ROWS = 40
_BY_SHARES = ("flwr:PathologicalPartitioner", "flwr:ShardPartitioner")
_BY_LABEL = ("flwr:DirichletPartitioner", *_BY_SHARES)
_QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}
_SHOWN_LABELS = 3
_KEPT_BACK = {"validation_images": "validation", "test_images": "test"}


def partition_command(
    root: Root,
    num_clients: Annotated[int, typer.Option("--num-clients", help="Number of parts.")],
    data: Data = None,
    subset: Subset = "train",
    scheme: Annotated[
        str, typer.Option("--scheme", help=" | ".join((*SCHEMES, *FLOWER_SCHEMES)))
    ] = "iid",
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Concentration of dirichlet.", show_default="0.5"),
    ] = None,
    sizes: Annotated[
        str, typer.Option("--sizes", help=f"{' | '.join(SIZES)}: what the sizes follow.")
    ] = "log-normal",
    skew: Annotated[
        float, typer.Option("--skew", help="Spread of log-normal sizes; 0: equal.")
    ] = RunConfig().federation.partition_skew,
    label: Annotated[
        str | None,
        typer.Option(
            "--label",
            help=f"{' | '.join(LABELS)}: of flwr: schemes by label.",
            show_default="source",
        ),
    ] = None,
    labels_per_client: Annotated[
        int | None,
        typer.Option(
            "--labels-per-client", help="Of flwr:Pathological and flwr:Shard.", show_default="2"
        ),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option("--validation-fraction", help="Share that each client keeps back.")
    ] = 0.0,
    test_fraction: Annotated[
        float, typer.Option("--test-fraction", help="And for the final model alone.")
    ] = 0.0,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw it too (.png, .pdf or .svg).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what each client would hold: images, sources, activities, labelled joints."""
    if out is not None and out.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--out {out}: expected a name ending in .png, .pdf or .svg")
    setting = RunConfig().replace(
        federation__partition=scheme,
        federation__partition_alpha=alpha,
        federation__partition_sizes=sizes,
        federation__partition_skew=float(skew),
        federation__partition_label=label,
        federation__partition_labels_per_client=labels_per_client,
        federation__validation_fraction=float(validation_fraction),
        federation__test_fraction=float(test_fraction),
    )
    for option, value, has_effect in (
        ("--alpha", alpha, "dirichlet" in scheme.lower()),
        ("--label", label, scheme in _BY_LABEL),
        ("--labels-per-client", labels_per_client, scheme in _BY_SHARES),
    ):
        if value is not None and not has_effect:
            say(f"{option} has no effect with --scheme {scheme}")
    kind = kind_of(data, root)
    annotations = load(kind, root, subset).annotations
    parts = deal(annotations, setting.federation, num_clients=num_clients, seed=seed)
    rows = [
        _row(
            client,
            [annotations[index] for index in part],
            own_parts(
                annotations,
                part,
                validation=validation_fraction,
                test=test_fraction,
                seed=seed,
            ),
        )
        for client, part in enumerate(parts)
    ]
    title = f"{kind} {subset}: {len(annotations)} images on {num_clients} clients, {scheme}"
    if out is not None:
        from fedcunet.commands.partition_picture import draw_partition

        draw_partition(out, rows, title)
        say(f"{out}: {title}")
    if as_json:
        sys.stdout.write(json_module.dumps(rows) + "\n")
    elif num_clients <= _MAX_ROWS:
        _print_rows(rows, title)
    else:
        _print_quantiles(rows, title)


def _row(client: int, annotations: Sequence[Annotation], own: OwnParts) -> dict[str, Any]:
    """What a client holds; labels by name with the number of its images."""

    def counts(label: str) -> dict[str, int]:
        names = Counter(str(getattr(annotation, label)) for annotation in annotations)
        return dict(sorted((name, count) for name, count in names.items() if name))

    return {
        "client": client,
        "images": len(annotations),
        "photos": len({annotation.photo for annotation in annotations}),
        "validation_images": len(own.validation),
        "test_images": len(own.test),
        "sources": counts("source"),
        "categories": counts("category"),
        "activities": counts("activity"),
        "visibility": _visibility(annotations),
    }


def _visibility(annotations: Sequence[Annotation]) -> dict[str, float]:
    """Share of labelled landmarks of each group of the landmark scheme."""
    scheme = scheme_of(annotations[0])
    if scheme is None:
        return {}
    labelled_NK = np.stack([annotation.labelled_K for annotation in annotations])
    return {name: float(labelled_NK[:, list(group)].mean()) for name, group in scheme.groups}


def _print_rows(rows: list[dict[str, Any]], title: str) -> None:
    """A table for each aspect, so that each fits a terminal."""
    console = Console()
    counts = {"images": "images", "photos": "photos"}
    counts |= {key: words for key, words in _KEPT_BACK.items() if any(row[key] for row in rows)}
    table = Table("client", *counts.values(), "sources", title=title)
    for row in rows:
        cells = (str(row[key]) for key in ("client", *counts))
        table.add_row(*cells, _listed(row["sources"]))
    console.print(table)
    for key in ("categories", "activities"):
        if any(row[key] for row in rows):
            table = Table("client", f"number of {key}", "most images")
            for row in rows:
                table.add_row(str(row["client"]), str(len(row[key])), _listed(row[key]))
            console.print(table)
    groups = _varying_groups(rows)
    if groups:
        table = Table("client", *groups, title="labelled landmarks in percent")
        for row in rows:
            shares = (f"{100 * row['visibility'][group]:.0f}" for group in groups)
            table.add_row(str(row["client"]), *shares)
        console.print(table)


def _listed(counts: dict[str, int]) -> str:
    """The largest first."""
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name} {count}" for name, count in largest[:_SHOWN_LABELS])
    return f"{shown}, …" if len(largest) > _SHOWN_LABELS else shown


def _varying_groups(rows: list[dict[str, Any]]) -> list[str]:
    """Groups of which some client lacks some landmarks: the others say nothing."""
    names = list(rows[0]["visibility"])
    return [name for name in names if any(row["visibility"][name] < 1 for row in rows)]


def _print_quantiles(rows: list[dict[str, Any]], title: str) -> None:
    figures: dict[str, list[float]] = {
        "images": [row["images"] for row in rows],
        "photos": [row["photos"] for row in rows],
    }
    for key, words in _KEPT_BACK.items():
        if any(row[key] for row in rows):
            figures[f"images for {words}"] = [row[key] for row in rows]
    for key in ("sources", "categories", "activities"):
        if any(row[key] for row in rows):
            figures[f"number of {key}"] = [len(row[key]) for row in rows]
            figures[f"largest of the {key}, %"] = [_largest_percent(row[key]) for row in rows]
    for name in _varying_groups(rows):
        figures[f"labelled {name}, %"] = [100 * row["visibility"][name] for row in rows]
    table = Table("of a client", *_QUANTILES, title=title)
    for name, values in figures.items():
        quantiles = np.quantile(values, list(_QUANTILES.values()))
        table.add_row(name, *(f"{value:.0f}" for value in quantiles))
    Console().print(table)


def _largest_percent(counts: dict[str, int]) -> float:
    return 100 * max(counts.values(), default=0) / max(sum(counts.values()), 1)
