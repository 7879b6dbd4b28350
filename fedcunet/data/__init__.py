"""Data sets by name: `load("300w", root, "train")` gives annotations, crops.py makes batches."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedcunet.data.annotations import (
    FACE68,
    LSP14,
    MPII16,
    SCHEMES,
    Annotation,
    AnnotationSet,
    LandmarkScheme,
)
from fedcunet.data.lsp import load_lsp, load_lspet
from fedcunet.data.mixed import mixed
from fedcunet.data.mpii import load_mpii
from fedcunet.data.w300 import load_300w
from fedcunet.errors import UserError

__all__ = [
    "DATASETS",
    "FACE68",
    "LSP14",
    "MPII16",
    "SCHEMES",
    "Annotation",
    "AnnotationSet",
    "LandmarkScheme",
    "load",
]

# "faces" and "people" are procedural, written in the folders of 300-W and the files of MPII.
DATASETS: dict[str, Callable[..., AnnotationSet]] = {
    "300w": load_300w,
    "faces": partial(load_300w, name="faces"),
    "lsp": load_lsp,
    "lsp-oc": partial(load_lsp, name="lsp-oc"),
    "lspet": load_lspet,
    "mpii": load_mpii,
    "people": partial(load_mpii, name="people"),
}


def load(name: str, root: Path | str, subset: str, *, boxes: str = "landmarks") -> AnnotationSet:
    """The annotations of one subset of the data set `name` below the folder `root`.

    Args:
        name: a key of `DATASETS`; or several joined by "+", such as "lsp+mpii": the people of all
            for training (subsets "train" and "all"), of the first alone otherwise, with the
            landmarks of the first.
        root: the data set's folder; of several, the folders in the same order, with commas.
        subset: as the reader defines it; all know "train" and "test".
        boxes: "landmarks", or for 300-W "given" or "ground-truth". MPII's people come with their
            own boxes, which are always used.

    Raises:
        UserError: the name, the folder or the subset does not exist, or a file cannot be used.
    """
    if "+" in name:
        return _load_several(name.split("+"), str(root).split(","), subset, boxes)
    if name not in DATASETS:
        raise UserError(f"data set: expected one of {', '.join(DATASETS)}, found {name!r}")
    return DATASETS[name](Path(root), subset, boxes=boxes)


def _load_several(names: list[str], roots: list[str], subset: str, boxes: str) -> AnnotationSet:
    if len(roots) != len(names):
        raise UserError(
            f"data set {'+'.join(names)}: expected {len(names)} folders with a comma between them, "
            f"found {len(roots)}: {','.join(roots)}"
        )
    if "lsp-oc" in names:  # where a person turns away, left and right are exchanged
        raise UserError(
            f"data set {'+'.join(names)}: left and right are the picture's in lsp-oc and the "
            "person's in all others; expected lsp"
        )
    for name in names:
        if name not in DATASETS:
            raise UserError(f"data set: expected one of {', '.join(DATASETS)}, found {name!r}")
    wanted = len(names) if subset in ("train", "all") else 1
    pairs = list(zip(names, roots, strict=True))[:wanted]
    return mixed([load(name, root, subset, boxes=boxes) for name, root in pairs], subset)
