"""What looks wrong in annotations that read without error: for a person to look at."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedcunet.data.annotations import FACE68, Annotation
from fedcunet.data.images import read_image
from fedcunet.errors import UserError

# A landmark this many box sides outside its image is no hidden joint but damage or a mix-up.
_FAR_SHARE = 0.5
_EXAMPLES = 3
# Inner lips and eyelids of the 68 points, which meet when mouth or eye is closed (0-based).
_TOUCHING = {(61, 67), (62, 66), (63, 65), (37, 41), (38, 40), (43, 47), (44, 46)}


@dataclass(kw_only=True, slots=True)
class Finding:
    """Annotations with one oddity.

    Attributes:
        what: the oddity, after a count: "annotations with ...".
        advice: what a person can do about it.
        examples: of all, in their order.
    """

    what: str
    advice: str
    examples: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """Count, oddity, some examples and the advice, on one line."""
        more = f", … {len(self.examples) - _EXAMPLES} more" * (len(self.examples) > _EXAMPLES)
        shown = "; ".join(self.examples[:_EXAMPLES])
        return f"{len(self.examples)} {self.what} ({shown}{more}): {self.advice}"


@dataclass(kw_only=True, slots=True)
class Audit:
    """What was found.

    Attributes:
        unreadable: reasons why images cannot be decoded.
        outside: labelled landmarks outside their image.
        findings: those with an example, by their name.
    """

    unreadable: list[str]
    outside: int
    findings: dict[str, Finding]


def audit(
    annotations_by_part: Mapping[str, Sequence[Annotation]],
    *,
    test_parts: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Decodes every image and looks at every annotation.

    Args:
        annotations_by_part: the data set, part by part.
        test_parts: those that training must not see; the others are for training.
        progress: called with the number done and of all.
    """
    findings = _kinds_of_findings()
    unreadable: list[str] = []
    outside = done = 0
    total = sum(map(len, annotations_by_part.values()))
    files: dict[bytes, tuple[str, Annotation]] = {}  # by the hash of the pixels
    points: dict[bytes, Annotation] = {}
    for part, annotations in annotations_by_part.items():
        for annotation in annotations:
            name = f"{annotation.source}/{annotation.image.name}"
            _look_at_points(annotation, name, findings, points)
            try:
                image_HW3 = read_image(annotation.image)
            except UserError as error:
                unreadable.append(str(error))
            else:
                outside += _look_at_places(annotation, name, image_HW3.shape, findings)
                key = hashlib.sha256(str(image_HW3.shape).encode() + image_HW3.tobytes()).digest()
                first_part, first = files.setdefault(key, (part, annotation))
                crosses = (first_part in test_parts) != (part in test_parts)
                if crosses or first.photo != annotation.photo:
                    pair = f"{name} = {first.source}/{first.image.name}"
                    findings["leak" if crosses else "same-image"].examples.append(pair)
            done += 1
            progress(done, total)
    found = {key: finding for key, finding in findings.items() if finding.examples}
    return Audit(unreadable=unreadable, outside=outside, findings=found)


def _kinds_of_findings() -> dict[str, Finding]:
    return {
        "far-outside": Finding(
            what="annotations with a landmark far outside the image",
            advice="the file is damaged or belongs to another image or scale; look at it with "
            "`fedcunet data show`",
        ),
        "empty-box": Finding(
            what="annotations whose box has no area or lies outside the image",
            advice="they cannot be cropped; correct the box or remove the files",
        ),
        "same-place": Finding(
            what="annotations with two landmarks in exactly one place",
            advice="often clicked twice by mistake; look at the points",
        ),
        "same-points": Finding(
            what="annotations whose landmarks equal another's exactly",
            advice="a copy, or a file under a wrong name; keep one",
        ),
        "same-image": Finding(
            what="images whose pixels equal another file's",
            advice="if they are copies, keep one: they count twice",
        ),
        "leak": Finding(
            what="images that stand in training and in test",
            advice="a score on them says nothing; remove them from training",
        ),
    }


def _look_at_points(
    annotation: Annotation, name: str, findings: dict[str, Finding], points: dict[bytes, Annotation]
) -> None:
    """What the annotation itself shows."""
    labelled_L2 = annotation.points_K2[annotation.labelled_K]
    numbers_L = np.flatnonzero(annotation.labelled_K)
    _, first_L, place_L = np.unique(labelled_L2, axis=0, return_index=True, return_inverse=True)
    pairs = zip(numbers_L[first_L[place_L.ravel()]].tolist(), numbers_L.tolist(), strict=True)
    face = len(annotation.labelled_K) == FACE68.num_landmarks
    twice = [(a, b) for a, b in pairs if a != b and not (face and (a, b) in _TOUCHING)]
    if twice:
        first, second = twice[0]
        findings["same-place"].examples.append(f"{name}: landmarks {first + 1} and {second + 1}")
    owner = points.setdefault(labelled_L2.tobytes(), annotation)
    if owner is not annotation:
        pair = f"{name} = {owner.source}/{owner.image.name}"
        findings["same-points"].examples.append(pair)


def _look_at_places(
    annotation: Annotation, name: str, shape: tuple[int, ...], findings: dict[str, Finding]
) -> int:
    """What the annotation shows on its image; returns the number of landmarks outside it."""
    size_2 = np.array([shape[1], shape[0]])
    x, y, width, height = annotation.box_xywh
    seen = (
        min(width, height) > 0
        and x < size_2[0]
        and y < size_2[1]
        and x + width > 0
        and y + height > 0
    )
    if not seen:
        box = ", ".join(f"{value:.0f}" for value in annotation.box_xywh)
        findings["empty-box"].examples.append(f"{name}: box {box}")
    points_L2 = annotation.points_K2[annotation.labelled_K]
    # How far each landmark is beyond the image's edge, negative inside.
    beyond_L = np.maximum(-0.5 - points_L2, points_L2 - (size_2 - 0.5)).max(axis=1)
    if len(beyond_L) and beyond_L.max() > _FAR_SHARE * max(width, height, 1.0):
        worst = int(np.flatnonzero(annotation.labelled_K)[beyond_L.argmax()]) + 1
        findings["far-outside"].examples.append(
            f"{name}: landmark {worst} is {beyond_L.max():.0f} pixels outside"
        )
    return int((beyond_L > 0).sum())
