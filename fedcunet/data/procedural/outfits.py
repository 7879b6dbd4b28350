"""What people wear, and the colours of skin and hair; sampled, then drawn."""

from dataclasses import dataclass

import numpy as np

from .looks import cloth_colour, sample_look

HAIR_STYLES = ("short", "long", "tail", "bald", "cap", "helmet")
_STYLE_WEIGHT = (0.42, 0.17, 0.12, 0.06, 0.12, 0.11)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outfit:
    """Colours are (blue, green, red) in 0..255; sleeves and legs are shares of the limb covered."""

    skin: np.ndarray
    hair: np.ndarray
    hat: np.ndarray
    lips: np.ndarray
    style: str  # of HAIR_STYLES
    beard: float
    top: np.ndarray
    front: np.ndarray  # of a strip or badge on the chest; seen from the front only
    back: np.ndarray  # of a badge on the back
    badge: str  # "", "badge", "open", "stripes"
    sleeves: float  # 0 none, 0.5 to the elbow, 1 to the wrist
    bare_top: bool
    bottom: np.ndarray
    legs: float  # 0.1 trunks, 0.5 to the knee, 1 to the ankle
    side_stripe: np.ndarray | None
    skirt: float  # length in thighs, 0 none
    shoes: np.ndarray
    gloves: np.ndarray | None
    loose: float  # factor on the width of clothes


def sample_outfit(place: str, generator: np.random.Generator) -> Outfit:
    """A random outfit that goes with the place."""
    face = sample_look(generator)
    cold, warm = place == "snow", place == "water"
    style = str(generator.choice(HAIR_STYLES, p=_STYLE_WEIGHT))
    top, bottom = cloth_colour(generator), cloth_colour(generator)
    if generator.random() < 0.3:  # blue trousers are everywhere
        bottom = np.array([110.0, 75.0, 50.0]) * generator.uniform(0.5, 1.5)
    one_piece = generator.random() < 0.14
    if one_piece:
        bottom = top.copy()
    sleeves = float(generator.choice((0.0, 0.32, 0.5, 1.0), p=(0.2, 0.18, 0.24, 0.38)))
    legs = float(generator.choice((0.12, 0.42, 0.62, 1.0), p=(0.12, 0.18, 0.12, 0.58)))
    if one_piece and generator.random() < 0.5:
        legs, sleeves = 0.05, float(generator.choice((0.0, 1.0)))
    if cold:
        sleeves, legs = 1.0, 1.0
    bare = (not cold) and bool(generator.random() < (0.3 if warm else 0.06))
    if warm and bare:
        legs = float(generator.choice((0.1, 0.4)))
    skirt = float(generator.uniform(0.5, 1.2)) if generator.random() < 0.07 and not cold else 0.0
    dark_shoes = generator.random() < 0.5
    shoes = generator.uniform(15, 70) if dark_shoes else generator.uniform(120, 240)
    barefoot = generator.random() < (0.6 if warm or bare else 0.12)
    gloved = cold and generator.random() < 0.8
    return Outfit(
        skin=face.skin,
        hair=face.hair,
        hat=cloth_colour(generator),
        lips=face.lips,
        style=style,
        beard=face.beard,
        top=top,
        front=cloth_colour(generator),
        back=cloth_colour(generator),
        badge=str(generator.choice(("", "badge", "open", "stripes"), p=(0.45, 0.27, 0.15, 0.13))),
        sleeves=sleeves,
        bare_top=bare,
        bottom=bottom,
        legs=legs,
        side_stripe=cloth_colour(generator) if generator.random() < 0.15 else None,
        skirt=skirt,
        shoes=face.skin if barefoot else np.full(3, shoes) * generator.uniform(0.85, 1.15, 3),
        gloves=cloth_colour(generator) if gloved else None,
        loose=float(generator.uniform(1.0, 1.25)) * (1.12 if cold else 1.0),
    )
