"""`data check`: what a data set's folder holds, beside what it should hold."""

import json as json_module
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedcunet.commands.data_options import Data, Root, kind_of, progress_of
from fedcunet.commands.options import JsonOption
from fedcunet.data import Annotation, load
from fedcunet.data.audit import Audit, audit
from fedcunet.data.mpii import OFFICIAL_COUNTS as MPII_COUNTS
from fedcunet.data.w300 import OFFICIAL_COUNTS, SUBSETS
from fedcunet.errors import RunFailure, UserError

_FACES = ("300w", "faces")
# Parts that are read one by one, with their official size (none for what has no official form).
_PARTS: dict[str, dict[str, int | None]] = {
    "300w": dict(OFFICIAL_COUNTS),
    "faces": dict.fromkeys(SUBSETS["train"] + SUBSETS["full"]),
    "lsp": {"train": 1000, "test": 1000},
    "lsp-oc": {"train": 1000, "test": 1000},
    "lspet": {"all": 10000},
    "mpii": dict(MPII_COUNTS),
}
_PARTS_OF_OTHERS: dict[str, int | None] = {"train": None, "test": None}
# Faces of a subset of folders; the two spellings of the private test are one.
_SUBSET_COUNTS = {"train": 3148, "common": 554, "challenge": 135, "full": 689, "private": 600}
_OTHER_SPELLINGS = ("300W/", "Test/")


def check(root: Root, data: Data = None, as_json: JsonOption = False) -> None:
    """Read every annotation and decode every image; say what is there, missing, damaged or odd."""
    kind = kind_of(data, root)
    parts, problems, found = _read_parts(root, kind)
    if not any(found.values()):
        load(kind, root, "train")  # says in its own words what is wrong
        raise UserError(f"{kind}: no annotation in {root}")
    with progress_of("images") as report:
        test_parts = ("test", *SUBSETS["full"], *SUBSETS["private"])
        audited = audit(found, test_parts=test_parts, progress=report)
    result = _result(root, kind, parts, problems, found, audited)
    if as_json:
        sys.stdout.write(json_module.dumps(result) + "\n")
    else:
        _print(result)
    damaged = [row["reason"] for row in parts if row["error"]]
    if audited.unreadable or damaged:
        first = [*audited.unreadable, *damaged][0]
        raise RunFailure(
            f"{root}: {len(audited.unreadable)} unreadable images, {len(damaged)} unreadable "
            f"folders; {first}"
        )


def _read_parts(
    root: Path, kind: str
) -> tuple[list[dict[str, Any]], list[str], dict[str, tuple[Annotation, ...]]]:
    """A row for each part, all problems, annotations by part; an unreadable part is a problem."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    by_part: dict[str, tuple[Annotation, ...]] = {}
    for part, official in _PARTS.get(kind, _PARTS_OF_OTHERS).items():
        folders = kind in _FACES
        found: tuple[Annotation, ...] = ()
        error, said = False, ""
        if not folders or (root / part).is_dir():
            try:
                part_set = load(kind, root, part)
                found = part_set.annotations
                problems.extend(part_set.problems)
            except UserError as reason:
                said = str(reason)
                problems.append(said)
                error = folders  # of lsp a subset without images is no damage
        elif part.startswith(_OTHER_SPELLINGS):
            continue  # two spellings of the private test, and few have either
        elif official is not None:
            problems.append(f"{part}: not there")
        by_part[part] = found
        photos = len({annotation.photo for annotation in found})
        row = {"part": part, "images": len(found), "photos": photos}
        rows.append(row | {"official": official, "error": error, "reason": said})
    return rows, list(dict.fromkeys(problems)), by_part


def _subsets(kind: str, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts of the usual subsets; of other sets than 300-W the parts are the subsets."""
    if kind not in _FACES:
        return [
            {"subset": row["part"], "images": row["images"], "official": row["official"]}
            for row in parts
        ]
    images = {row["part"]: row["images"] for row in parts}
    return [
        {
            "subset": subset,
            "images": sum(images.get(folder, 0) for folder in SUBSETS[subset]),
            "official": official if kind == "300w" else None,
        }
        for subset, official in _SUBSET_COUNTS.items()
    ]


def _result(
    root: Path,
    kind: str,
    parts: list[dict[str, Any]],
    problems: list[str],
    by_part: dict[str, tuple[Annotation, ...]],
    audited: Audit,
) -> dict[str, Any]:
    annotations = [annotation for part in by_part.values() for annotation in part]
    return {
        "data": kind,
        "root": str(root),
        "parts": parts,
        "subsets": _subsets(kind, parts),
        "images": len(annotations),
        "photos": len({annotation.photo for annotation in annotations}),
        "labelled_landmarks": int(sum(a.labelled_K.sum() for a in annotations)),
        "landmarks_outside_image": audited.outside,
        "unreadable": audited.unreadable,
        "problems": problems,
        "odd": [
            {
                "kind": name,
                "count": len(finding.examples),
                "examples": finding.examples[:20],
                "text": finding.sentence(),
            }
            for name, finding in audited.findings.items()
        ],
    }


def _print(result: dict[str, Any]) -> None:
    console = Console()
    console.print(f"{result['data']} in {result['root']}", markup=False, highlight=False)
    table = Table("part", "images", "photos", "official")
    for row in result["parts"]:
        table.add_row(row["part"], str(row["images"]), str(row["photos"]), _count(row["official"]))
    console.print(table)
    if result["data"] in _FACES:
        table = Table("subset", "images", "official")
        for row in result["subsets"]:
            table.add_row(row["subset"], str(row["images"]), _count(row["official"]))
        console.print(table)
    console.print(
        f"{result['images']} images of {result['photos']} photos, "
        f"{result['labelled_landmarks']} labelled landmarks, "
        f"{result['landmarks_outside_image']} of them outside their image"
    )
    groups = (
        ("Left out or missing", result["problems"]),
        ("Unreadable", result["unreadable"]),
        ("Odd", [row["text"] for row in result["odd"]]),
    )
    for title, lines in groups:
        if lines:
            console.print(f"{title}:")
        for line in lines:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _count(official: int | None) -> str:
    return "" if official is None else str(official)
