"""The embedded set of people on disk: drawn by numbers, in the files of MPII Human Pose.

`ROOT/images/*.jpg`, `ROOT/mpii_human_pose_v1_u12_1.mat` with 16 joints, head rectangles, activities
and videos, and `ROOT/detections.mat` with the places of the test people, so that the MPII reader
loads it as it is. A video shows the same people at the same place in one activity.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from ...errors import UserError
from ..mpii_files import Person
from ..mpii_writer import ReleaseImage, write_places, write_release
from .activities import CATEGORIES, sample_category
from .folders import make_once
from .scene import noise_bank
from .snapshots import Mark, Snapshot, Video, sample_video, take_snapshot

VERSION = 2  # of the drawing: other numbers, other bytes
MANIFEST = "people.json"
_MAT = "mpii_human_pose_v1_u12_1.mat"
_MAX_PICTURES = 6  # of one video


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """One video to draw: how many annotated people stand in each of its pictures."""

    folder: Path
    seed: int
    part: int  # 0 train, 1 test
    number: int  # of the video in its part
    category: str
    people: tuple[int, ...]
    first_image: int


def make_people(
    root: Path,
    *,
    num_train: int = 1500,
    num_test: int = 300,
    seed: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the set of people to the folder `root`, or return at once where it already is.

    A picture depends on `seed` and its place in its video alone, so the same arguments give the
    same bytes with any number of processes, and no video of the test people is one of the training
    people.

    Args:
        root: Folder to make; absent, empty, or holding a set made with the same arguments.
        num_train: Training people, at least 1.
        num_test: Test people, at least 1.
        seed: At least 0.
        processes: How many draw at the same time, at least 1.
        progress: Called with (people done, people in all) after each video.

    Returns:
        Number of people in "train" and "test".

    Raises:
        UserError: For counts or a seed that cannot be, and where `root` holds anything else.
    """
    for name, value, least in (
        ("num_train", num_train, 1),
        ("num_test", num_test, 1),
        ("seed", seed, 0),
        ("processes", processes, 1),
    ):
        if value < least:
            raise UserError(f"make_people: {name} must be at least {least}, found {value}")
    make_once(
        Path(root),
        kind="set of people",
        manifest=MANIFEST,
        wanted={"version": VERSION, "seed": seed, "num_train": num_train, "num_test": num_test},
        write=lambda work: _write_all(work, (num_train, num_test), seed, processes, progress),
    )
    return {"train": num_train, "test": num_test}


def _write_all(
    work: Path,
    counts: tuple[int, int],
    seed: int,
    processes: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    folder = work / "images"
    folder.mkdir()
    jobs: list[_Job] = []
    for part, count in enumerate(counts):
        jobs += _plan(folder, seed, part, count, sum(len(job.people) for job in jobs))
    images: list[ReleaseImage] = []
    places: list[tuple[int, int]] = []
    done = 0
    with _mapped(processes) as run:
        for video, (job, drawn) in enumerate(zip(jobs, run(_draw_video, jobs), strict=True)):
            for image in _release_images(job, drawn, video + 1):
                images.append(image)
                if job.part == 1:
                    places += [(len(images), person + 1) for person in range(len(image.people))]
            done += sum(job.people)
            if progress is not None:
                progress(done, sum(counts))
    write_release(
        work / _MAT,
        images,
        videos=[f"video-{number + 1:05d}" for number in range(len(jobs))],
        activities=[name for kind in CATEGORIES.values() for name, _ in kind.activities],
    )
    write_places(work / "detections.mat", places)


def _plan(folder: Path, seed: int, part: int, count: int, first_image: int) -> list[_Job]:
    """The videos of one part, `count` people in all."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, part]))
    jobs: list[_Job] = []
    while count > 0:
        people: list[int] = []
        for _ in range(min(1 + int(generator.poisson(1.2)), _MAX_PICTURES)):
            together = min(int(generator.choice((1, 2, 3), p=(0.8, 0.15, 0.05))), count)
            if together:
                people.append(together)
                count -= together
        jobs.append(
            _Job(
                folder=folder,
                seed=seed,
                part=part,
                number=len(jobs),
                category=sample_category(generator),
                people=tuple(people),
                first_image=first_image,
            )
        )
        first_image += len(people)
    return jobs


@contextmanager
def _mapped(
    processes: int,
) -> Iterator[Callable[[Callable[[_Job], "_Drawn"], Sequence[_Job]], Iterator["_Drawn"]]]:
    """`map`, in this process or over several; results come in the order of the jobs."""
    if processes == 1:
        yield map
        return
    # Forking a process that has threads (torch's, OpenCV's) can hang.
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_worker
    )
    try:
        yield lambda function, jobs: pool.map(function, jobs, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    cv2.setNumThreads(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """What is to be told of a drawn video; its pictures are on disk."""

    activity: str
    marks: list[tuple[Mark, ...]]


def _draw_video(job: _Job) -> _Drawn:
    key = [job.seed, job.part, job.number]
    video = sample_video(job.category, np.random.default_rng(np.random.SeedSequence(key)))
    marks = []
    for picture, num_people in enumerate(job.people):
        snapshot = _whole_snapshot(video, num_people, job.seed, [*key, picture])
        _, coded = cv2.imencode(".jpg", snapshot.picture, [cv2.IMWRITE_JPEG_QUALITY, snapshot.jpeg])
        (job.folder / _image_name(job, picture)).write_bytes(coded.tobytes())
        marks.append(snapshot.marks)
    return _Drawn(activity=video.activity, marks=marks)


def _whole_snapshot(video: Video, num_people: int, seed: int, key: list[int]) -> Snapshot:
    """A picture in which everybody can be annotated: not too much of them is hidden."""
    attempt = 0
    while True:
        generator = np.random.default_rng(np.random.SeedSequence([*key, attempt]))
        snapshot = take_snapshot(video, num_people, _bank(seed), generator)
        if len(snapshot.marks) == num_people:
            return snapshot
        attempt += 1


@lru_cache(maxsize=1)
def _bank(seed: int) -> np.ndarray:
    return noise_bank(seed)


def _image_name(job: _Job, picture: int) -> str:
    return f"{job.first_image + picture + 1:09d}.jpg"


def _release_images(job: _Job, drawn: _Drawn, video: int) -> Iterator[ReleaseImage]:
    for picture, marks in enumerate(drawn.marks):
        name = _image_name(job, picture)
        yield ReleaseImage(
            name=name,
            people=[_person(mark, name, job.category, drawn.activity, video) for mark in marks],
            visible_PK=np.array([mark.seen_K for mark in marks]),
            frame_seconds=float(picture + 1),
        )


def _person(mark: Mark, image: str, category: str, activity: str, video: int) -> Person:
    """The person as MPII tells of one.

    Measured on MPII's 2958 validation people: the head rectangle lies around the middle of upper
    neck and head top, its diagonal is 1.25 times their distance, and scale x 200 is 4.8 diagonals.
    """
    points_K2, labelled_K = mark.points_K2, mark.labelled_K
    diagonal = 1.25 * mark.head_length
    half = 0.5 * diagonal * np.array([0.6, 0.8])
    middle = 0.5 * (points_K2[8] + points_K2[9]) + 1.0  # the rectangle is told 1-based
    x1, y1 = (middle - half).tolist()
    x2, y2 = (middle + half).tolist()
    labelled = points_K2[labelled_K]
    centre = 0.5 * (labelled.min(axis=0) + labelled.max(axis=0))
    return Person(
        image=image,
        points_K2=np.where(labelled_K[:, None], points_K2, 0.0),
        labelled_K=labelled_K,
        centre=(float(centre[0]), float(centre[1])),
        scale=4.8 * diagonal / 200,
        head_box=(x1, y1, x2, y2),
        activity=activity,
        category=category,
        video=video,
    )


def default_processes() -> int:
    """As many as there are cores for this process, at most 8."""
    return min(len(os.sched_getaffinity(0)), 8)
