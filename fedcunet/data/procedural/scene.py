"""What surrounds a face: background, body and the camera."""

from dataclasses import dataclass

import cv2
import numpy as np

from . import draw
from .head import Pose
from .looks import FaceLook, Light, cloth_colour
from .shape import FaceShape

_BANK_SIDE = 512


def noise_bank(seed: int) -> np.ndarray:
    """Standard normal noise (512, 512, 3) float32, drawn once and used in random windows."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0xBA2C]))
    return generator.standard_normal((_BANK_SIDE, _BANK_SIDE, 3), dtype=np.float32)


def _window(
    bank: np.ndarray, height: int, width: int, generator: np.random.Generator
) -> np.ndarray:
    repeats = -(-width // (_BANK_SIDE // 2))
    tiles = []
    for _ in range(repeats):  # wide photos take several windows
        top, left = (
            generator.integers(0, _BANK_SIDE - height),
            generator.integers(0, _BANK_SIDE // 2),
        )
        tiles.append(bank[top : top + height, left : left + _BANK_SIDE // 2])
    return np.concatenate(tiles, axis=1)[:, :width]


def paint_background(
    height: int, width: int, bank: np.ndarray, generator: np.random.Generator, *, clutter: float
) -> np.ndarray:
    """A background (height, width, 3), 8 bits, from plain (`clutter` 0) to full of things (1)."""
    base, other = cloth_colour(generator), cloth_colour(generator)
    slope = generator.normal(0, 1, 2)
    # Coarse parts at half the size: quicker, and backgrounds are out of focus.
    rows, columns = (height + 1) // 2, (width + 1) // 2
    ramp = slope[0] * np.linspace(-1, 1, rows)[:, None] + slope[1] * np.linspace(-1, 1, columns)
    ramp = (0.5 + 0.5 * np.tanh(ramp)).astype(np.float32)[..., None]
    image = base.astype(np.float32) + ramp * (other - base).astype(np.float32)
    for cells in (3, 9, 36):
        across = max(2, cells * width // height)
        coarse = np.ascontiguousarray(_window(bank, cells, across, generator))
        strength = generator.uniform(0, 1) ** 2 * 60 * (0.3 + clutter)
        grain = 0.85 * coarse[..., :1] + 0.15 * coarse
        image += cv2.resize(
            grain * np.float32(strength), (columns, rows), interpolation=cv2.INTER_LINEAR
        )
    picture = image.clip(0, 255).astype(np.uint8)
    sharp_things = int(generator.poisson(3 * clutter * width / height))
    for _ in range(int(generator.poisson(7 * clutter * width / height))):
        _thing(picture, generator)
    if generator.random() < 0.6:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), float(generator.uniform(0.5, 2.5))))
    picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR))
    for _ in range(sharp_things):
        _thing(picture, generator)
    return picture


def _thing(picture: np.ndarray, generator: np.random.Generator) -> None:
    """One object of the background: a box, a blob (often the colour of skin), or lines."""
    height, width = picture.shape[:2]
    middle = generator.uniform(0, 1, 2) * (width, height)
    size = generator.uniform(0.04, 0.35, 2) * height
    angle = generator.normal(0, 0.3)
    right = np.array([np.cos(angle), np.sin(angle)])
    down = np.array([-right[1], right[0]])
    colour = cloth_colour(generator)
    kind = generator.random()
    if kind < 0.5:
        a, b = size[0] * right, size[1] * down
        draw.fill(
            picture,
            np.stack([middle - a - b, middle + a - b, middle + a + b, middle - a + b]),
            colour,
        )
    elif kind < 0.8:
        if generator.random() < 0.5:
            colour = np.array([120.0, 155.0, 205.0]) * generator.uniform(0.4, 1.1)
        draw.fill(picture, draw.ellipse(middle, size[0] * right, size[1] * down), colour)
    else:
        step, count = generator.uniform(0.03, 0.1) * height, int(generator.integers(1, 6))
        line = np.stack([middle - size[1] * 2 * down, middle + size[1] * 2 * down])
        lines = [line + i * step * right for i in range(count)]
        draw.stroke(picture, lines, colour, generator.uniform(0.005, 0.025) * height)


def paint_body(
    image: np.ndarray,
    shape: FaceShape,
    look: FaceLook,
    light: Light,
    pose: Pose,
    hair_KL3: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Hair behind the neck, neck and shoulders, below and behind the head layer to come."""
    unit = pose.scale
    if not ears_shown(look):
        hull = cv2.convexHull(pose.project(hair_KL3[3:].reshape(-1, 3)).astype(np.float32))[:, 0]
        draw.fill(
            image, hull, look.hair_cover * (light.ambient + 0.2 * light.key) * light.tint * 0.75
        )
    top = pose.project(np.array([0.0, 0.35, -0.95]))
    chin = pose.project(np.array([0.0, shape.chin_y, -0.5]))
    bottom = (
        np.array([0.6 * top[0] + 0.4 * chin[0], top[1] + 1.2 * unit])
        + generator.normal(0, 0.06, 2) * unit
    )
    wide = unit * generator.uniform(0.46, 0.62) * np.array([1.0, 0.0])
    skin = look.skin * (light.ambient + 0.45 * light.key) * light.tint * 0.88
    # The head's shadow on the neck is what shows the jaw.
    below = bottom + np.array([0.0, 0.7 * unit])
    neck = [
        top - wide,
        top + wide,
        bottom + 1.2 * wide,
        below + 1.4 * wide,
        below - 1.4 * wide,
        bottom - 1.2 * wide,
    ]
    draw.fill(image, np.stack(neck), skin)
    fall = (0.0, generator.uniform(0.1, 0.45) * unit)
    shade = np.stack([top - wide, top + wide, chin + wide + fall, chin - wide + fall])
    draw.blend(image, shade, skin * generator.uniform(0.55, 0.8), 0.9, soften=0.09 * unit)
    reach = generator.uniform(1.9, 2.5)
    drop = generator.uniform(0.35, 0.7)
    neckline = max(0.1, float(generator.normal(0.25, 0.2)))
    right_N2 = np.array(
        [(0.3, neckline), (0.75, -0.1), (0.6 * reach, 0.35 * drop), (reach, drop), (1.1 * reach, 6)]
    )
    outline = np.concatenate([right_N2[::-1] * (-1, 1), right_N2])
    body = bottom + unit * outline
    cloth = (look.clothes * (light.ambient + 0.5 * light.key) * light.tint).clip(0, 255)
    draw.fill(image, body, cloth)
    kind = generator.random()
    if kind < 0.25:  # stripes
        x = np.arange(-2.0, 2.01, 0.3)
        x = x[np.abs(x) > 0.7]
        stripes = [
            bottom + unit * np.array([(a, 0.4 + drop * abs(a) / 2), (1.2 * a, 4.0)]) for a in x
        ]
        draw.stroke(image, stripes, draw.mix(cloth, 255 - cloth, 0.5), 0.06 * unit)
    elif kind < 0.5:  # a shirt's collar
        for side in (-1.0, 1.0):
            flap = bottom + unit * np.array(
                [(side * 0.72, -0.15), (side * 0.1, 0.45), (side * 0.5, 0.6)]
            )
            draw.fill(image, flap, draw.mix(cloth, np.full(3, 255.0), generator.uniform(0.0, 0.8)))
    draw.stroke(image, [body[3:7]], cloth * 0.7, 1)


def ears_shown(look: FaceLook) -> bool:
    """Whether hair or cloth leaves the ears free."""
    return look.style not in ("bob", "long", "long fringe", "scarf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """What a camera did to one photo; drawn per photo from its source's ranges."""

    gain: float
    gamma: float
    saturation: float
    cast: np.ndarray
    blur: float
    motion: float
    noise: float
    jpeg: int

    def develop(
        self, image: np.ndarray, bank: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """The photo of a painted scene, 8 bits."""
        height, width = image.shape[:2]
        if self.blur > 0.3:
            image = cv2.GaussianBlur(image, (0, 0), self.blur)
        if self.motion > 1.5:
            side = 2 * int(self.motion / 2) + 1
            kernel = np.zeros((side, side), np.float32)
            angle = generator.uniform(0, np.pi)
            half = side / 2 * np.array([np.cos(angle), np.sin(angle)])
            cv2.polylines(
                kernel,
                [draw.fixed(np.stack([side // 2 - half, side // 2 + half]))],
                False,
                1.0,
                1,
                cv2.LINE_8,
                4,
            )
            image = cv2.filter2D(image, -1, kernel / kernel.sum())
        # One table a channel: gain, cast, contrast.
        level = np.linspace(0, 1, 256)[:, None] * self.gain * self.cast
        table = 255 * np.clip(level, 0, 1.4) ** self.gamma
        image = cv2.LUT(image, table.clip(0, 255).astype(np.uint8)[:, None])
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        image = cv2.addWeighted(image, self.saturation, grey, 1.0 - self.saturation, 0.0)
        noise = np.ascontiguousarray(_window(bank, height, width, generator))
        noise = noise if self.saturation else np.repeat(noise[..., :1], 3, axis=2)
        return np.asarray(cv2.addWeighted(image, 1.0, noise, self.noise, 0.0, dtype=cv2.CV_8U))
