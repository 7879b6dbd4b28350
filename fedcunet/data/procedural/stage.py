"""Where people are shown: ground and sky or wall, shadows, and things that stand in front."""

from dataclasses import dataclass

import cv2
import numpy as np

from . import draw
from .looks import cloth_colour
from .scene import paint_background

# Ground and what is above it, (blue, green, red).
_GROUND = {
    "field": (60.0, 120.0, 95.0),
    "snow": (240.0, 232.0, 225.0),
    "water": (165.0, 130.0, 85.0),
    "street": (125.0, 125.0, 130.0),
    "hall": (90.0, 125.0, 165.0),
    "room": (105.0, 130.0, 155.0),
}
_SKY = (235.0, 200.0, 165.0)
_OUTDOORS = ("field", "snow", "water", "street")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What all pictures of one video share; colours are (blue, green, red)."""

    place: str
    ground: np.ndarray
    sky: np.ndarray | None
    clutter: float
    texture: float  # of the ground
    thing: np.ndarray  # colour of what stands in front


def sample_stage(place: str, generator: np.random.Generator) -> Stage:
    """A place of this kind; one in five videos is taken somewhere else."""
    if generator.random() < 0.2:
        place = str(generator.choice(list(_GROUND)))
    ground = np.array(_GROUND[place]) * generator.normal(1.0, 0.18)
    sky = None
    if place in _OUTDOORS and generator.random() < 0.6:
        sky = np.array(_SKY) * generator.uniform(0.35, 1.1) * generator.normal(1.0, 0.08, 3)
    return Stage(
        place=place,
        ground=(ground * generator.normal(1.0, 0.1, 3)).clip(5, 250),
        sky=None if sky is None else sky.clip(5, 250),
        clutter=float(generator.uniform(0.1, 0.9)),
        texture=float(generator.uniform(2, 22)),
        thing=cloth_colour(generator),
    )


def paint_stage(
    stage: Stage,
    height: int,
    width: int,
    horizon: float,
    bank: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """The empty stage (height, width, 3), 8 bits; the ground begins at the row `horizon`."""
    picture = paint_background(height, width, bank, generator, clutter=stage.clutter)
    edge = int(np.clip(horizon, 0, height))
    if stage.sky is not None and edge > 2:
        # Whatever was painted shows through as hills, trees and houses near the horizon.
        fade = np.linspace(1.3, generator.uniform(-0.6, 0.7), edge).clip(0, 1)[:, None, None]
        above = picture[:edge]
        above[:] = (above + fade * (stage.sky - above)).astype(np.uint8)
    if edge < height - 2:
        rows = height - edge
        fade = np.linspace(0.75, 1.1, rows, dtype=np.float32)[:, None, None]
        top, left = generator.integers(0, 200, 2)
        window = bank[top : top + 160, left : left + 160, 0] * np.float32(stage.texture)
        grain = cv2.resize(window, (width, rows), interpolation=cv2.INTER_LINEAR)[..., None]
        under = picture[edge:].astype(np.float32)
        floor = fade * stage.ground.astype(np.float32) + grain
        mixed = under + np.float32(generator.uniform(0.7, 1.0)) * (floor - under)
        picture[edge:] = mixed.clip(0, 255).astype(np.uint8)
        if stage.place in ("hall", "street", "room") and generator.random() < 0.5:
            _paint_lines(picture, edge, generator)
    return picture


def _paint_lines(picture: np.ndarray, edge: int, generator: np.random.Generator) -> None:
    """Boards, tiles or marks that run to a vanishing point on the horizon."""
    height, width = picture.shape[:2]
    vanish = np.array([generator.uniform(0, width), edge - 0.1 * height])
    feet = np.linspace(-width, 2 * width, int(generator.integers(3, 22)))
    lines = []
    for x in feet:
        foot = np.array([x, height + 5.0])
        near = vanish + (foot - vanish) * 0.1 * height / max(height - vanish[1], 1.0)
        lines.append(np.stack([near, foot]))
    shade = generator.uniform(20, 230)
    draw.stroke(picture, lines, np.full(3, shade), generator.uniform(0.4, 2.5))


def paint_shadow(
    view: np.ndarray, foot: np.ndarray, size: float, generator: np.random.Generator
) -> None:
    """A dark place on the ground below a person."""
    right = np.array([size * generator.uniform(0.5, 1.2), 0.0])
    down = np.array([0.0, size * generator.uniform(0.08, 0.2)])
    shadow = draw.ellipse(foot, right, down)
    draw.blend(view, shadow, np.zeros(3), generator.uniform(0.2, 0.5), soften=0.06 * size)


def paint_front(
    view: np.ndarray, box: np.ndarray, level: float, stage: Stage, generator: np.random.Generator
) -> np.ndarray:
    """Something that hides the person below row `level`; returns its outline (N, 2).

    Args:
        view: painted in place.
        box: left, top, right, bottom of the person, pixels.
        level: the row where it begins.
        stage: says what it is: water, snow and grass outdoors, furniture indoors.
        generator: the source of all randomness.
    """
    height, width = view.shape[:2]
    soft = stage.place in ("water", "snow", "field") and generator.random() < 0.7
    if soft:
        x = np.linspace(-5, width + 5, 24)
        wave = generator.normal(0, 0.012 * height, 24)
        edge = np.stack([x, level + wave], axis=1)
    else:
        reach = (box[2] - box[0]) * generator.uniform(0.2, 1.5)
        slope = generator.normal(0, 0.04) * (box[2] - box[0] + 2 * reach)
        edge = np.array([(box[0] - reach, level), (box[2] + reach, level + slope)])
    low = max(height, float(box[3])) + 10
    if not soft and generator.random() < 0.3:
        low = float(box[3]) + 0.02 * height
    outline = np.concatenate([edge, [(edge[-1, 0], low), (edge[0, 0], low)]])
    colour = stage.ground if soft else stage.thing
    draw.fill(view, outline, colour)
    if not soft:  # the lit top of a table or wall
        thick = np.array([0.0, generator.uniform(0.01, 0.05) * height])
        draw.fill(view, np.concatenate([edge, (edge + thick)[::-1]]), colour * 1.25)
    return outline


def paint_bar(
    view: np.ndarray, box: np.ndarray, stage: Stage, generator: np.random.Generator
) -> np.ndarray:
    """A post, rail or rope across the person; returns its outline (4, 2)."""
    middle = generator.uniform(box[:2], box[2:])
    reach = np.array([box[2] - box[0], box[3] - box[1]])
    angle = generator.choice((0.0, np.pi / 2)) + generator.normal(0, 0.15)
    along = np.array([np.cos(angle), np.sin(angle)]) * reach.max() * generator.uniform(0.3, 1.5)
    across = np.array([-along[1], along[0]]) / np.linalg.norm(along)
    across *= reach.max() * generator.uniform(0.01, 0.035)
    outline = np.stack(
        [
            middle - along - across,
            middle + along - across,
            middle + along + across,
            middle - along + across,
        ]
    )
    draw.fill(view, outline, stage.thing)
    return outline
