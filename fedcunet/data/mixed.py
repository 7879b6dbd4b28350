"""Several data sets as one training set: LSP with the people of MPII, as the paper trains for LSP.

All are brought to the landmarks of the first. MPII has LSP's 14 joints and two more, pelvis and
thorax, which are the middles of hips and shoulders where both are labelled.
"""

from dataclasses import replace

import numpy as np

from fedcunet.data.annotations import (
    LSP14,
    LSP14_IN_MPII16,
    MPII16,
    Annotation,
    AnnotationSet,
    LandmarkScheme,
    square_landmark_box,
)
from fedcunet.errors import UserError

# Each middle joint of MPII with the two that it lies between: pelvis, thorax.
_MIDDLES = {6: (2, 3), 7: (12, 13)}
_MIN_LABELLED = 4  # as for LSP: fewer joints do not say where a person is


def mixed(parts: list[AnnotationSet], subset: str) -> AnnotationSet:
    """The annotations of all `parts` with the landmarks of the first.

    Raises:
        UserError: a part's landmarks cannot be told from those of the first.
    """
    first = parts[0]
    parts = [first, *(_mapped(part, first.scheme) for part in parts[1:])]
    return AnnotationSet(
        name="+".join(part.name for part in parts),
        subset=subset,
        scheme=first.scheme,
        annotations=tuple(found for part in parts for found in part.annotations),
        problems=tuple(problem for part in parts for problem in part.problems),
    )


def _mapped(part: AnnotationSet, scheme: LandmarkScheme) -> AnnotationSet:
    """`part` with the landmarks of `scheme`, its people cropped in LSP's way.

    LSP gives no boxes: the crop is 1.5 times the square box of the joints. On the 11,139 people of
    MPII with all joints in a published list, MPII's own crops (1.25 times 200 * scale) are 1.1 to
    2.7 times that box, in the median 1.50: so LSP's way fits into either set.
    """
    if part.scheme.name == scheme.name:
        return part
    if {part.scheme.name, scheme.name} != {LSP14.name, MPII16.name}:
        raise UserError(
            f"{part.name}: its landmarks are {part.scheme.name}, those of the first data set "
            f"{scheme.name}: expected both of faces, or both of people"
        )
    annotations = [
        mapped for found in part.annotations if (mapped := _mapped_person(found, scheme))
    ]
    problems, few = list(part.problems), len(part.annotations) - len(annotations)
    if few:
        problems.append(
            f"{part.name}: {few} people have fewer than {_MIN_LABELLED} of the joints of "
            f"{scheme.name}; left out"
        )
    return replace(part, scheme=scheme, annotations=tuple(annotations), problems=tuple(problems))


def _mapped_person(person: Annotation, scheme: LandmarkScheme) -> Annotation | None:
    """The person with the other landmarks and LSP's box; None with too few joints."""
    order = list(LSP14_IN_MPII16)
    if scheme.name == LSP14.name:
        points_K2, labelled_K = person.points_K2[order], person.labelled_K[order]
        shared = np.arange(len(order))
    else:
        points_K2 = np.zeros((scheme.num_landmarks, 2))
        labelled_K = np.zeros(scheme.num_landmarks, dtype=bool)
        points_K2[order], labelled_K[order] = person.points_K2, person.labelled_K
        for middle, sides in _MIDDLES.items():
            if labelled_K[list(sides)].all():
                points_K2[middle] = points_K2[list(sides)].mean(axis=0)
                labelled_K[middle] = True
        shared = np.array(order)
    if labelled_K[shared].sum() < _MIN_LABELLED:
        return None
    x, y, side, _ = square_landmark_box(points_K2[shared], labelled_K[shared])
    if not side > 0:
        return None
    margin = side * (LSP14.crop_factor / scheme.crop_factor - 1) / 2
    return replace(
        person,
        points_K2=points_K2,
        labelled_K=labelled_K,
        box_xywh=(x - margin, y - margin, side + 2 * margin, side + 2 * margin),
        box_origin="landmarks",
    )
