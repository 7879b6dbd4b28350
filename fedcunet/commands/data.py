"""The commands `data make|check|show|partition`: what a data set holds and how it is dealt."""

import json as json_module
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedcunet.data import DATASETS, Annotation, load
from fedcunet.data.crops import Augmentation, Crops
from fedcunet.data.drawing import contact_sheet, draw_landmarks
from fedcunet.data.images import read_image, write_image
from fedcunet.data.mpii import OFFICIAL_COUNTS as MPII_COUNTS
from fedcunet.data.partition import SCHEMES, partition
from fedcunet.data.w300 import OFFICIAL_COUNTS, SUBSETS
from fedcunet.errors import RunFailure, UserError

app = typer.Typer(help="Make, check, show and deal data sets.", no_args_is_help=True)
make_app = typer.Typer(help="Make a procedural data set.", no_args_is_help=True)
app.add_typer(make_app, name="make")

_Root = Annotated[Path, typer.Argument(metavar="ROOT", help="The folder of the data set.")]
_Data = Annotated[str, typer.Option("--data", help=f"Its kind: {', '.join(DATASETS)}.")]
_Subset = Annotated[str, typer.Option("--subset", help="A subset, or for faces one folder.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON value.")]
_Seed = Annotated[int, typer.Option("--seed", min=0, help="Of all randomness.")]

# Parts that are read one by one, with their official size (none for what has no official form).
_PARTS: dict[str, dict[str, int | None]] = {
    "300w": dict(OFFICIAL_COUNTS),
    "faces": dict.fromkeys(SUBSETS["train"] + SUBSETS["full"]),
    "lsp": {"train": 1000, "test": 1000},
    "lspet": {"all": 10000},
    "mpii": dict(MPII_COUNTS),
    "people": {"train": None, "test": None},
}


@make_app.command("faces")
def make_faces_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    num_train: Annotated[int, typer.Option("--num-train", help="Training faces.")] = 720,
    num_test: Annotated[int, typer.Option("--num-test", help="Test faces.")] = 160,
    seed: _Seed = 0,
) -> None:
    """Draw procedural faces with 68 landmarks, in the folders of 300-W."""
    from fedcunet.data.procedural import make_faces

    with _progress("faces") as report:
        counts = make_faces(out, num_train=num_train, num_test=num_test, seed=seed, progress=report)
    shown = ", ".join(f"{folder} {count}" for folder, count in counts.items())
    _say(f"{out}: {sum(counts.values())} faces ({shown})")


@make_app.command("people")
def make_people_command(
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    num_train: Annotated[int, typer.Option("--num-train", help="Training people.")] = 1500,
    num_test: Annotated[int, typer.Option("--num-test", help="Test people.")] = 300,
    seed: _Seed = 0,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="Drawing at once; as many as cores, at most 8."),
    ] = None,
) -> None:
    """Draw procedural people with 16 joints, in the files of MPII."""
    from fedcunet.data.procedural import default_processes, make_people

    with _progress("people") as report:
        counts = make_people(
            out,
            num_train=num_train,
            num_test=num_test,
            seed=seed,
            processes=default_processes() if processes is None else processes,
            progress=report,
        )
    shown = ", ".join(f"{part} {count}" for part, count in counts.items())
    _say(f"{out}: {sum(counts.values())} people ({shown})")


@app.command()
def check(root: _Root, data: _Data = "300w", as_json: _Json = False) -> None:
    """Read every annotation and decode every image; say what is there, missing or damaged."""
    _known(data)
    parts, problems, annotations = _read_parts(root, data)
    if not annotations:
        load(data, root, "train")  # says in its own words what is wrong
        raise UserError(f"{data}: no annotation in {root}")
    unreadable, outside = _decode_all(annotations)
    result: dict[str, Any] = {
        "data": data,
        "root": str(root),
        "parts": parts,
        "images": len(annotations),
        "photos": len({annotation.photo for annotation in annotations}),
        "labelled_landmarks": int(sum(a.labelled_K.sum() for a in annotations)),
        "landmarks_outside_image": outside,
        "unreadable": unreadable,
        "problems": problems,
    }
    if as_json:
        sys.stdout.write(json_module.dumps(result) + "\n")
    else:
        _print_check(result)
    damaged = [row["part"] for row in parts if row["error"]]
    if unreadable or damaged:
        first = [*unreadable, *damaged][0]
        raise RunFailure(
            f"{root}: {len(unreadable)} unreadable images, {len(damaged)} unreadable folders; "
            f"{first}"
        )


@app.command()
def show(
    root: _Root,
    out: Annotated[Path, typer.Option("--out", help="The picture to write (.png or .jpg).")],
    data: _Data = "300w",
    subset: _Subset = "train",
    count: Annotated[int, typer.Option("--count", min=1, help="How many crops.")] = 24,
    size: Annotated[int, typer.Option("--size", min=8, help="Side of a crop in pixels.")] = 64,
    augment: Annotated[bool, typer.Option("--augment", help="As in training.")] = False,
    seed: _Seed = 0,
) -> None:
    """Draw crops chosen at random with their landmarks on one sheet."""
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{out}: expected a name ending in .png or .jpg")
    chosen_set = load(data, root, subset)
    scheme = chosen_set.scheme
    crops = Crops(chosen_set.annotations, scheme, size=size)
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(crops))[:count]
    augmentation = Augmentation(flip=not scheme.is_face) if augment else None
    batch = crops.batch(chosen.tolist(), augmentation=augmentation, generator=generator)
    images_NHW3 = (batch.images_B3HW * 255).round().byte().permute(0, 2, 3, 1).numpy()
    zoom = max(1, round(192 / size))
    pictures = [
        draw_landmarks(image_HW3, points_K2, labelled_K, scheme, zoom=zoom)
        for image_HW3, points_K2, labelled_K in zip(
            images_NHW3, batch.points_BK2.numpy(), batch.labelled_BK.numpy(), strict=True
        )
    ]
    write_image(out, contact_sheet(pictures))
    _say(f"{out}: {len(pictures)} of {len(crops)} crops")


@app.command("partition")
def partition_command(
    root: _Root,
    num_clients: Annotated[int, typer.Option("--num-clients", help="Number of parts.")],
    data: _Data = "300w",
    subset: _Subset = "train",
    scheme: Annotated[str, typer.Option("--scheme", help=" | ".join(SCHEMES))] = "iid",
    alpha: Annotated[float, typer.Option("--alpha", help="Concentration of dirichlet.")] = 0.5,
    skew: Annotated[float, typer.Option("--skew", help="Spread of the sizes; 0 = equal.")] = 0.0,
    seed: _Seed = 0,
    as_json: _Json = False,
) -> None:
    """Say what each client would hold."""
    annotations = load(data, root, subset).annotations
    parts = partition(
        annotations,
        num_clients=num_clients,
        scheme=scheme,  # type: ignore[arg-type]  # checked by partition
        alpha=alpha,
        skew=skew,
        seed=seed,
    )
    rows = [
        {
            "client": client,
            "images": len(part),
            "photos": len({annotations[index].photo for index in part}),
            "sources": dict(sorted(Counter(annotations[index].source for index in part).items())),
        }
        for client, part in enumerate(parts)
    ]
    if as_json:
        sys.stdout.write(json_module.dumps(rows) + "\n")
        return
    table = Table("client", "images", "photos", "sources")
    for row in rows:
        sources = row["sources"]
        assert isinstance(sources, dict)
        shown = ", ".join(f"{name} {number}" for name, number in sources.items())
        table.add_row(str(row["client"]), str(row["images"]), str(row["photos"]), shown)
    Console().print(table)


def _known(data: str) -> None:
    if data not in DATASETS:
        raise UserError(f"--data: expected one of {', '.join(DATASETS)}, found {data!r}")


def _read_parts(root: Path, data: str) -> tuple[list[dict[str, Any]], list[str], list[Annotation]]:
    """A row for each part, all problems, all annotations; an unreadable part is a problem."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    annotations: list[Annotation] = []
    for part, official in _PARTS[data].items():
        folders = data in ("300w", "faces")
        found: tuple[Annotation, ...] = ()
        error = False
        if not folders or (root / part).is_dir():
            try:
                part_set = load(data, root, part)
                found = part_set.annotations
                problems.extend(part_set.problems)
            except UserError as reason:
                problems.append(str(reason))
                error = folders  # of lsp a subset without images is no damage
        elif part.startswith(("300W/", "Test/")):
            continue  # two spellings of the private test, and few have either
        annotations.extend(found)
        photos = len({annotation.photo for annotation in found})
        rows.append(
            {
                "part": part,
                "images": len(found),
                "photos": photos,
                "official": official,
                "error": error,
            }
        )
    return rows, problems, annotations


def _decode_all(annotations: list[Annotation]) -> tuple[list[str], int]:
    """Reasons why images cannot be decoded, and labelled landmarks that lie outside theirs."""
    unreadable: list[str] = []
    outside = 0
    with _progress("images") as report:
        for done, annotation in enumerate(annotations, start=1):
            try:
                height, width = read_image(annotation.image).shape[:2]
            except UserError as error:
                unreadable.append(str(error))
            else:
                points_K2 = annotation.points_K2[annotation.labelled_K]
                inside_K2 = (points_K2 >= -0.5) & (points_K2 <= np.array([width, height]) - 0.5)
                outside += int((~inside_K2.all(axis=1)).sum())
            report(done, len(annotations))
    return unreadable, outside


def _print_check(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("part", "images", "photos", "official")
    for row in result["parts"]:
        official = "" if row["official"] is None else str(row["official"])
        table.add_row(row["part"], str(row["images"]), str(row["photos"]), official)
    console.print(table)
    console.print(
        f"{result['images']} images of {result['photos']} photos, "
        f"{result['labelled_landmarks']} labelled landmarks, "
        f"{result['landmarks_outside_image']} of them outside their image"
    )
    for line in [*result["problems"], *result["unreadable"]]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A bar on standard error; yields report(done, total)."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
