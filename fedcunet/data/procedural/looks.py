"""How a face looks apart from its shape: skin, hair, beard, glasses, light; sampled, then drawn."""

from dataclasses import dataclass

import numpy as np

# Skin from light to dark and hair, (red, green, blue) as they would look in even light.
_SKIN = np.array(
    [
        (242, 210, 190),
        (230, 188, 160),
        (212, 162, 130),
        (184, 134, 100),
        (150, 103, 75),
        (112, 75, 55),
        (80, 54, 43),
    ],
    float,
)
_HAIR = np.array(
    [
        (22, 18, 18),
        (38, 28, 24),
        (62, 42, 30),
        (94, 64, 42),
        (140, 100, 62),
        (196, 158, 104),
        (226, 200, 150),
        (120, 56, 30),
        (130, 128, 126),
        (205, 203, 200),
    ],
    float,
)
_HAIR_WEIGHT = np.array([0.24, 0.2, 0.16, 0.1, 0.07, 0.06, 0.04, 0.04, 0.06, 0.03])
_IRIS = np.array([(60, 38, 26), (84, 58, 36), (40, 26, 20), (96, 112, 84), (104, 132, 160)], float)
# Lower edge of the hair (height y) at these angles from the front, in degrees.
HAIR_ANGLES = np.array([0.0, 35.0, 58.0, 72.0, 82.0, 95.0, 112.0, 130.0, 175.0])
HAIR_STYLES = {
    "short": (-1.28, -1.3, -1.06, -0.8, -0.42, -0.5, -0.6, 0.05, 0.4),
    "receding": (-1.6, -1.42, -1.22, -0.85, -0.45, -0.5, -0.6, 0.05, 0.4),
    "fringe": (-0.98, -0.94, -0.86, -0.7, -0.35, -0.35, -0.4, 0.1, 0.5),
    "bald": (-1.86, -1.86, -1.86, -1.86, -0.9, -0.6, -0.6, -0.1, 0.2),
    "bob": (-1.25, -1.15, -0.9, -0.55, 0.2, 0.55, 0.7, 0.75, 0.75),
    "long": (-1.3, -1.24, -0.95, -0.6, 0.5, 1.5, 1.7, 1.7, 1.7),
    "long fringe": (-0.98, -0.96, -0.82, -0.5, 0.6, 1.5, 1.7, 1.7, 1.7),
    "cap": (-0.98, -0.96, -0.9, -0.82, -0.72, -0.64, -0.6, -0.5, -0.4),
    "scarf": (-1.12, -1.05, -0.8, -0.35, 0.55, 1.3, 1.5, 1.5, 1.5),
}
_STYLE_WEIGHT = {
    True: (0.02, 0.0, 0.06, 0.0, 0.2, 0.42, 0.16, 0.06, 0.08),  # long-haired people
    False: (0.56, 0.12, 0.1, 0.09, 0.02, 0.03, 0.0, 0.08, 0.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceLook:
    """Colours are (blue, green, red) in 0..255; strengths 0..1."""

    skin: np.ndarray
    hair: np.ndarray
    hair_cover: np.ndarray  # the hair's colour, or the hat's
    lips: np.ndarray
    iris: np.ndarray
    clothes: np.ndarray
    style: str
    hairline: np.ndarray  # heights at HAIR_ANGLES
    hair_volume: float
    parting: float  # hairline lower on one side
    beard: float
    moustache: float
    brow: float  # how dark
    brow_thickness: float
    makeup: float
    age: float  # folds
    freckles: float
    gaze: tuple[float, float]
    glasses: str  # "", "clear", "sun"
    occluder: str  # "", "hand", "bar", "cup", "microphone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Light:
    """One photo's light: all faces in it share it."""

    direction: np.ndarray  # unit vector towards the light, camera axes
    ambient: float
    key: float
    tint: np.ndarray  # colour of the direct light, (blue, green, red) about 1
    gloss: float


def sample_light(generator: np.random.Generator, *, hardness: float) -> Light:
    """Light mostly from the front and above; `hardness` 0..1 is how much is direct."""
    toward = np.array([generator.normal(0, 0.75), -abs(generator.normal(0.35, 0.4)), 1.0])
    key = float(np.clip(generator.normal(0.25 + 0.35 * hardness, 0.12), 0.12, 0.75))
    warm = generator.normal(0.01, 0.04)
    return Light(
        direction=toward / np.linalg.norm(toward),
        ambient=1.02 - key,
        key=key * 1.15,
        tint=np.array([1 - warm, 1.0, 1 + warm]),
        gloss=float(generator.uniform(0.0, 0.35)),
    )


def cloth_colour(generator: np.random.Generator) -> np.ndarray:
    """A colour of things: mostly greyish or dark, now and then strong, (3,)."""
    spread = 0.12 if generator.random() < 0.65 else 0.5
    colour = generator.uniform(12, 235) * (1.0 + spread * generator.standard_normal(3))
    return np.asarray(colour.clip(5, 245))


def sample_look(
    generator: np.random.Generator, *, occluders: float = 0.08, glasses: float = 0.16
) -> FaceLook:
    """A random look; `occluders` and `glasses` are the shares of faces that have them."""
    tone = float(generator.beta(1.1, 1.6)) * (len(_SKIN) - 1)
    low = int(min(tone, len(_SKIN) - 2))
    skin = _SKIN[low] + (tone - low) * (_SKIN[low + 1] - _SKIN[low])
    skin = skin * generator.normal(1.0, (0.05, 0.03, 0.05)) * generator.normal(1.0, 0.05)
    weight = _HAIR_WEIGHT.copy()
    if tone > 2.6:  # dark skin goes with dark hair, or grey
        weight[3:8] *= 0.05
    hair = _HAIR[generator.choice(len(_HAIR), p=weight / weight.sum())]
    hair = hair * generator.normal(1.0, 0.12) + generator.uniform(0, 10)
    feminine = bool(generator.random() < 0.5)
    style = str(generator.choice(list(HAIR_STYLES), p=_STYLE_WEIGHT[feminine]))
    makeup = float(generator.uniform(0.2, 1.0)) if feminine and generator.random() < 0.6 else 0.0
    redness = np.array([0.88, 0.62, 0.64]) + generator.normal(0, 0.035, 3)
    lips = skin * (redness - 0.08 * makeup * np.array([0.0, 3.5, 2.4]))
    hairy = not feminine and generator.random() < 0.45
    iris = _IRIS[
        generator.choice(
            len(_IRIS), p=[0.4, 0.2, 0.15, 0.1, 0.15] if tone < 2 else [0.5, 0.1, 0.4, 0, 0]
        )
    ]
    bright = style in ("cap", "scarf")
    kind = ""
    if generator.random() < glasses:
        kind = "sun" if generator.random() < 0.2 else "clear"
    blocked = generator.random() < occluders
    choice = str(generator.choice(["hand", "bar", "cup", "microphone"], p=[0.5, 0.15, 0.2, 0.15]))
    return FaceLook(
        skin=np.clip(skin, 20, 250)[::-1],
        hair=np.clip(hair[::-1], 8, 240),
        hair_cover=np.clip(cloth_colour(generator) if bright else hair[::-1], 8, 240),
        lips=np.clip(lips, 15, 235)[::-1],
        iris=iris[::-1],
        clothes=cloth_colour(generator),
        style=style,
        hairline=np.array(HAIR_STYLES[style])
        + generator.normal(0, 0.04)
        + generator.normal(0, 0.02, 9),
        hair_volume=float(generator.uniform(0.07, 0.26))
        * (0.25 if style in ("bald", "receding") else 1.0),
        parting=float(generator.normal(0, 0.08)),
        beard=float(generator.uniform(0.1, 0.9)) if hairy else 0.0,
        moustache=float(generator.uniform(0.1, 0.9))
        if hairy or (not feminine and generator.random() < 0.08)
        else 0.0,
        brow=float(generator.uniform(0.45, 0.95)),
        brow_thickness=float(
            generator.uniform(0.045, 0.075) if feminine else generator.uniform(0.06, 0.11)
        ),
        makeup=makeup,
        age=float(generator.beta(1.2, 2.0)),
        freckles=float(generator.beta(1.0, 3.0)),
        gaze=(float(generator.normal(0, 0.03)), float(generator.normal(0, 0.012))),
        glasses=kind,
        occluder=choice if blocked else "",
    )
