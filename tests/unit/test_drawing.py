"""Landmarks on pictures: sides by colour."""

import numpy as np

from fedcunet.data import MPII16
from fedcunet.data.drawing import LEFT, MIDDLE, RIGHT, draw_landmarks


def _drawn(*landmarks: int) -> np.ndarray:
    """A black picture with these landmarks, each at (10 + 5 k, 20)."""
    points_K2 = np.array([(10.0 + 5 * k, 20.0) for k in range(16)])
    labelled_K = np.isin(np.arange(16), landmarks)
    return draw_landmarks(np.zeros((40, 100, 3), np.uint8), points_K2, labelled_K, MPII16)


def test_right_left_and_middle_have_their_colours() -> None:
    picture_HW3 = _drawn(10, 15, 9)  # right wrist, left wrist, head top: no lines between them
    for landmark, colour in ((10, RIGHT), (15, LEFT), (9, MIDDLE)):
        assert tuple(picture_HW3[20, 10 + 5 * landmark]) == colour


def test_a_line_from_one_side_to_the_middle_has_the_colour_of_the_side() -> None:
    picture_HW3 = _drawn(2, 6)  # right hip at x = 20, pelvis at x = 40
    red, green, blue = picture_HW3[20, 30].tolist()
    assert green > 200 > 100 > max(red, blue)  # RIGHT, but for the line's soft edge
    assert tuple(_drawn(2)[20, 30]) == (0, 0, 0)


def test_unlabelled_landmarks_are_not_drawn() -> None:
    assert not _drawn().any()
