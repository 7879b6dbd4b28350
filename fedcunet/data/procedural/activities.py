"""Categories of activities: how often, how near, in which poses and where people are shown."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Category:
    """One category of MPII.

    Attributes:
        people: its people of 17,372 in MPII's annotations (Andriluka et al., CVPR 2014).
        scale: median of MPII's `scale` there: a person's height is about 200 times as many pixels,
            in frames that are mostly 720 high.
        hidden: share of people whose legs something in front hides.
        place: "field", "snow", "water", "street", "hall" or "room".
        activities: names with the pose families they are drawn from, each equally often.
    """

    people: int
    scale: float
    hidden: float
    place: str
    activities: tuple[tuple[str, tuple[str, ...]], ...]


# Counts and median scales are measured on MPII's annotations, activities are some of its names.
# fmt: off
CATEGORIES = {
    "sports": Category(people=3450, scale=2.6, hidden=0.07, place="field", activities=(
        ("basketball", ("jump", "run", "reach", "lunge")),
        ("gymnastics, general", ("handstand", "cartwheel", "split", "somersault", "aerial",
                                 "hang", "layout", "bridge")),
        ("golf", ("swing", "stand", "bend")),
        ("martial arts", ("kick", "lunge", "dance")),
        ("parkour", ("vault", "jump", "aerial", "somersault", "squat", "hang", "lunge")),
        ("skateboarding", ("squat", "lunge", "jump", "dance")),
        ("soccer", ("kick", "run", "lunge", "stand")),
        ("tennis", ("swing", "reach", "lunge", "run")),
        ("track and field, jumping", ("jump", "layout", "split", "run", "aerial")),
        ("trampoline", ("somersault", "layout", "jump", "aerial")),
    )),
    "occupation": Category(people=2329, scale=3.6, hidden=0.30, place="room", activities=(
        ("carpentry, general", ("work", "bend", "stand", "kneel")),
        ("construction, outside", ("work", "squat", "bend", "reach")),
        ("cooking", ("work", "stand", "work")),
        ("police, directing traffic", ("stand", "reach", "walk", "dance")),
        ("sitting, typing", ("sit", "sit", "work")),
    )),
    "conditioning exercise": Category(people=1682, scale=3.1, hidden=0.03, place="hall",
                                      activities=(
        ("aerobic, general", ("dance", "reach", "lunge", "kick")),
        ("calisthenics", ("push up", "lie", "bridge", "jump", "hang")),
        ("pilates", ("lie", "bridge", "floor", "push up")),
        ("weight lifting", ("squat", "reach", "stand", "bend")),
        ("yoga", ("handstand", "split", "reach", "bridge", "crawl", "floor", "bend", "kick")),
    )),
    "home activities": Category(people=1377, scale=4.0, hidden=0.38, place="room", activities=(
        ("child care, standing", ("stand", "work", "bend")),
        ("cleaning, sweeping", ("work", "bend", "swing")),
        ("food preparation", ("work", "stand", "work")),
        ("playing with children", ("floor", "kneel", "sit", "crawl")),
    )),
    "lawn and garden": Category(people=1092, scale=2.8, hidden=0.07, place="field", activities=(
        ("digging, spading", ("swing", "bend", "work")),
        ("planting, potting", ("squat", "kneel", "bend")),
        ("raking lawn", ("swing", "work", "walk")),
        ("trimming shrubs", ("reach", "work", "bend")),
    )),
    "home repair": Category(people=1065, scale=4.1, hidden=0.30, place="room", activities=(
        ("carpentry, refinishing", ("kneel", "work", "squat", "bend")),
        ("painting, inside", ("reach", "work", "stand")),
        ("plumbing", ("kneel", "lie", "squat", "crawl")),
        ("roofing", ("squat", "kneel", "bend", "crawl")),
    )),
    "water activities": Category(people=1008, scale=2.7, hidden=0.14, place="water", activities=(
        ("canoeing", ("sit", "floor", "kneel")),
        ("diving, springboard", ("layout", "somersault", "reach", "handstand")),
        ("surfing", ("squat", "lunge", "ski", "push up")),
        ("swimming", ("swim", "swim", "stand")),
    )),
    "miscellaneous": Category(people=741, scale=4.1, hidden=0.38, place="room", activities=(
        ("playing cards", ("sit", "sit", "work")),
        ("standing, talking", ("stand", "play", "stand")),
        ("camping", ("squat", "stand", "floor", "walk")),
    )),
    "winter activities": Category(people=740, scale=2.7, hidden=0.07, place="snow", activities=(
        ("skating, figure", ("dance", "kick", "split", "lunge")),
        ("skiing, downhill", ("ski", "ski", "aerial")),
        ("snowboarding", ("squat", "ski", "aerial", "layout")),
        ("shoveling snow", ("swing", "bend", "work")),
    )),
    "fishing and hunting": Category(people=705, scale=3.4, hidden=0.30, place="water", activities=(
        ("fishing, standing", ("work", "stand", "swing")),
        ("fishing, sitting", ("sit", "floor", "sit")),
        ("hunting", ("work", "kneel", "squat", "walk")),
    )),
    "dancing": Category(people=697, scale=2.4, hidden=0.02, place="hall", activities=(
        ("ballet", ("dance", "kick", "split", "reach")),
        ("folk dancing", ("dance", "walk", "stand")),
        ("hip hop", ("dance", "lunge", "squat", "handstand")),
        ("ballroom", ("dance", "stand", "lunge")),
    )),
    "walking": Category(people=577, scale=3.1, hidden=0.12, place="street", activities=(
        ("walking, for exercise", ("walk", "walk", "stand")),
        ("hiking", ("walk", "lunge", "stand")),
        ("climbing hills", ("lunge", "walk", "reach")),
    )),
    "music playing": Category(people=534, scale=4.1, hidden=0.30, place="hall", activities=(
        ("guitar", ("play", "play", "sit")),
        ("drums", ("sit", "sit", "play")),
        ("violin", ("play", "stand", "sit")),
    )),
    "bicycling": Category(people=516, scale=2.9, hidden=0.03, place="street", activities=(
        ("bicycling, general", ("cycle", "cycle", "cycle", "stand")),
        ("bicycling, BMX", ("cycle", "cycle", "ski", "aerial")),
        ("unicycling", ("sit", "cycle", "dance")),
    )),
    "running": Category(people=291, scale=2.7, hidden=0.08, place="street", activities=(
        ("jogging", ("run", "run", "walk")),
        ("running, marathon", ("run", "run", "stand")),
    )),
    "inactivity quiet/light": Category(people=185, scale=3.8, hidden=0.30, place="room",
                                       activities=(
        ("lying quietly", ("lie", "floor", "sit")),
        ("sitting quietly", ("sit", "floor", "sit")),
        ("standing quietly", ("stand", "play")),
    )),
    "religious activities": Category(people=120, scale=3.6, hidden=0.38, place="hall", activities=(
        ("kneeling in church", ("kneel", "sit", "stand")),
        ("standing, singing", ("stand", "play", "reach")),
    )),
    "self care": Category(people=89, scale=7.6, hidden=0.30, place="room", activities=(
        ("grooming, brushing teeth", ("play", "stand", "work")),
        ("hairstyling", ("play", "reach", "stand")),
    )),
    "transportation": Category(people=87, scale=2.6, hidden=0.16, place="street", activities=(
        ("driving a scooter", ("sit", "cycle", "ski")),
        ("pushing a wheelchair", ("walk", "work", "sit")),
    )),
    "volunteer activities": Category(people=46, scale=2.9, hidden=0.14, place="street", activities=(
        ("picking up litter", ("bend", "walk", "squat")),
        ("serving food", ("work", "stand")),
    )),
}
# fmt: on
NAMES = tuple(CATEGORIES)
# Spread of the scales about the median of their category: 1.6, 3.1 and 6.3 are MPII's 10th, 50th
# and 90th percentile of all.
SCALE_SPREAD = 0.46


def sample_category(generator: np.random.Generator) -> str:
    """A category, as often as MPII has people of it."""
    people = np.array([category.people for category in CATEGORIES.values()], float)
    return NAMES[int(generator.choice(len(NAMES), p=people / people.sum()))]
