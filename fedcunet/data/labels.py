"""What annotations can be told apart by: the labels of partitions and of their pictures."""

from collections.abc import Sequence
from typing import Literal, get_args

from fedcunet.data.annotations import SCHEMES, Annotation, LandmarkScheme
from fedcunet.errors import UserError

Label = Literal["source", "category", "activity", "video", "visibility"]
LABELS: tuple[Label, ...] = get_args(Label)
# The joints that photos of people lack most: ankles in 28 % of MPII's validation people, knees in
# 16 %, all others in 3 % or less (measured on Tompson's 2958).
_OFTEN_MISSING = ("ankles", "knees")


def scheme_of(annotation: Annotation) -> LandmarkScheme | None:
    """The landmark scheme with the annotation's number of landmarks."""
    count = len(annotation.labelled_K)
    return next((scheme for scheme in SCHEMES.values() if scheme.num_landmarks == count), None)


def label_of(annotation: Annotation, label: Label) -> str:
    """The annotation's label as a text, "" where it is unknown.

    "visibility" is how many ankles and knees are labelled, such as "2 ankles, 1 knees".
    """
    if label == "visibility":
        scheme = scheme_of(annotation)
        groups = dict(scheme.groups) if scheme is not None else {}
        if not groups.keys() >= set(_OFTEN_MISSING):
            return ""
        counts = [int(annotation.labelled_K[list(groups[name])].sum()) for name in _OFTEN_MISSING]
        return ", ".join(f"{n} {name}" for n, name in zip(counts, _OFTEN_MISSING, strict=True))
    if label == "video":
        return "" if annotation.video == -1 else f"{annotation.video:09d}"
    return str(getattr(annotation, label))


def labels_of(annotations: Sequence[Annotation], label: Label) -> list[str]:
    """The label of each annotation; a photo without video is a video of its own.

    Raises:
        UserError: none of them has the label.
    """
    names = [label_of(annotation, label) for annotation in annotations]
    if not any(names):
        raise UserError(
            f"partition: expected photos of known {label}, found none among {len(names)}"
        )
    if label == "video":
        return [
            name or f"photo {annotation.photo}"
            for name, annotation in zip(names, annotations, strict=True)
        ]
    return names
