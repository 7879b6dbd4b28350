"""Partitions: photos whole, nothing lost, nobody empty, the same every time."""

import csv
import gzip
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from fedcunet.config import FLOWER_SCHEMES, FederationConfig, RunConfig
from fedcunet.data import Annotation, load
from fedcunet.data.labels import label_of
from fedcunet.data.partition import SCHEMES, hold_back, own_parts, partition
from fedcunet.data.sizes import MPII_ACTIVITY_QUANTILES, MPII_CATEGORY_COUNTS, client_weights
from fedcunet.errors import UserError
from fedcunet.partitioners import deal


def _faces(photos_by_source: dict[str, Sequence[int]]) -> list[Annotation]:
    """Annotations by source; each number is how many faces one photo has."""
    faces = []
    for source, counts in photos_by_source.items():
        for photo, count in enumerate(counts):
            faces.extend(
                Annotation(
                    image=Path(f"{photo}_{k}.jpg"),
                    points_K2=np.zeros((14, 2)),
                    labelled_K=np.arange(14) >= photo % 3,  # all, without an ankle, and a knee
                    box_xywh=(0, 0, 1, 1),
                    box_origin="given",
                    source=source,
                    photo=f"{source}/{photo}",
                    category=f"kind {photo % 7}",
                    activity=f"activity {photo % 21}" if photo % 21 else "",
                    video=photo // 3,
                )
                for k in range(count)
            )
    return faces


_MIXED = {"afw": [5, 1, 2] * 20, "helen": [1, 2, 1, 1] * 75, "lfpw": [1] * 80}


def _part(faces: list[Annotation], **settings: object) -> list[np.ndarray]:
    defaults = {"num_clients": 12, "scheme": "iid", "alpha": 0.5, "skew": 0.0, "seed": 3}
    return partition(faces, **(defaults | settings))


def _mix(faces: list[Annotation], parts: list[np.ndarray]) -> np.ndarray:
    """(clients, sources) shares."""
    sources = sorted({face.source for face in faces})
    counts = np.array(
        [[sum(faces[i].source == s for i in part) for s in sources] for part in parts]
    )
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("skew", [0.0, 1.5])
@pytest.mark.parametrize("num_clients", [1, 2, 12, 200])
def test_every_annotation_goes_to_one_client_with_its_photo_and_nobody_is_empty(
    scheme: str, skew: float, num_clients: int
) -> None:
    faces = _faces(_MIXED)
    parts = _part(faces, scheme=scheme, skew=skew, num_clients=num_clients)
    assert len(parts) == num_clients
    assert all(len(part) and part.dtype == np.int64 for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(faces)))
    photos = [{faces[i].photo for i in part} for part in parts]
    assert sum(map(len, photos)) == len(set().union(*photos))
    assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_decides_everything(scheme: str) -> None:
    faces = _faces(_MIXED)
    one, two, other = (_part(faces, scheme=scheme, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_iid_parts_are_as_equal_as_whole_photos_allow() -> None:
    faces = _faces(_MIXED)
    sizes = [len(part) for part in _part(faces)]
    assert max(sizes) - min(sizes) <= 5
    mix = _mix(faces, _part(faces, num_clients=4))
    assert np.abs(mix - mix.mean(axis=0)).max() < 0.12


def test_skew_spreads_the_sizes() -> None:
    sizes = np.array([len(part) for part in _part(_faces(_MIXED), num_clients=40, skew=1.0)])
    ratio = np.percentile(sizes, 95) / np.percentile(sizes, 5)
    assert 8 < ratio < 60


def test_by_source_a_client_has_one_source_and_sources_get_clients_by_their_size() -> None:
    faces = _faces({"a": [1] * 600, "b": [1] * 300, "c": [1] * 100, "d": [1] * 2})
    parts = _part(faces, scheme="source", num_clients=11)
    sources = [{faces[i].source for i in part} for part in parts]
    assert all(len(names) == 1 for names in sources)
    counts = {name: sum(name in names for names in sources) for name in "abcd"}
    assert counts == {"a": 6, "b": 3, "c": 1, "d": 1}


def test_by_source_no_source_gets_more_clients_than_it_has_photos() -> None:
    faces = _faces({"a": [50, 50], "b": [1] * 8})
    parts = _part(faces, scheme="source", num_clients=10)
    assert sorted(len(part) for part in parts) == [1] * 8 + [50, 50]


def test_by_source_with_fewer_clients_than_sources_deals_whole_sources() -> None:
    faces = _faces({"a": [1] * 10, "b": [1] * 6, "c": [1] * 5})
    parts = _part(faces, scheme="source", num_clients=2)
    assert sorted(len(part) for part in parts) == [10, 11]


def test_small_alpha_separates_sources_and_large_alpha_mixes_them() -> None:
    faces = _faces({"a": [1] * 400, "b": [1] * 400})
    apart, mixed = (
        np.abs(_mix(faces, _part(faces, scheme="dirichlet", alpha=alpha))[:, 0] - 0.5).mean()
        for alpha in (0.05, 1000.0)
    )
    assert apart > 0.4
    assert mixed < 0.05


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_clients": 441}, "at least one photo for each of 441 clients, found 440 photos"),
        ({"num_clients": 0}, "expected 1 client or more"),
        ({"scheme": "place"}, "expected one of iid, source, dirichlet, category, activity, video"),
        ({"skew": -0.1}, "skew: expected 0 to 10"),
        ({"sizes": "equal"}, "sizes: expected one of log-normal, mpii-activities"),
        ({"scheme": "dirichlet", "alpha": 0.0}, "alpha: expected a finite number above 0"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, "alpha: expected a finite number above 0"),
    ],
)
def test_impossible_partitions_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        _part(_faces(_MIXED), **settings)


def test_by_category_activity_and_video_a_client_has_few_of_them() -> None:
    faces = _faces({"a": [1] * 420})
    parts = _part(faces, scheme="category", num_clients=7)
    assert [len({faces[i].category for i in part}) for part in parts] == [1] * 7
    parts = _part(faces, scheme="activity", num_clients=21)
    assert [len({faces[i].activity for i in part}) for part in parts] == [1] * 21
    parts = _part(faces, scheme="video", num_clients=10)
    videos = [{faces[i].video for i in part} for part in parts]
    assert sum(map(len, videos)) == len(set().union(*videos)) == 140
    apart, mixed = (
        [
            len({faces[i].category for i in part})
            for part in _part(
                faces, scheme="dirichlet-category", num_clients=7, alpha=alpha, skew=0.0
            )
        ]
        for alpha in (0.05, 1000.0)
    )
    assert mixed == [7] * 7
    assert np.mean(apart) < 4


def test_with_fewer_clients_than_labels_the_sizes_still_follow_the_skew() -> None:
    faces = _faces({"a": [1] * 600})
    equal = [len(part) for part in _part(faces, scheme="video", num_clients=20)]
    assert set(equal) == {30}
    skewed = [len(part) for part in _part(faces, scheme="video", num_clients=20, skew=1.0)]
    iid = [len(part) for part in _part(faces, num_clients=20, skew=1.0)]
    assert max(skewed) / min(skewed) > 5
    assert max(iid) / min(iid) > 5


def test_unknown_labels_are_refused_and_photos_without_video_stand_alone() -> None:
    faces = _faces({"a": [1] * 40})
    bare = [
        replace(face, category="", activity="", video=-1, labelled_K=np.ones(68, dtype=bool))
        for face in faces
    ]
    for scheme in ("category", "activity", "video", "dirichlet-video", "visibility"):
        with pytest.raises(UserError, match=r"expected photos of known \w+, found none among 40"):
            _part(bare, scheme=scheme)
    parts = _part([*bare[:-1], faces[-1]], scheme="video", num_clients=4)
    assert [len(part) for part in parts] == [10] * 4


def test_the_setting_knows_every_scheme() -> None:
    assert get_args(get_type_hints(FederationConfig)["partition"]) == SCHEMES + FLOWER_SCHEMES


@pytest.mark.parametrize("scheme", SCHEMES[:3])
def test_real_faces_keep_photos_whole(data_root: Path, scheme: str) -> None:
    faces = list(load("300w", data_root / "300w", "train").annotations)
    parts = _part(faces, scheme=scheme, num_clients=50, skew=0.5)
    photos = [{faces[i].photo for i in part} for part in parts]
    assert sum(map(len, photos)) == len(set().union(*photos))


def test_visibility_is_which_of_ankles_and_knees_are_labelled() -> None:
    faces = _faces({"a": [1] * 420})
    names = {label_of(face, "visibility") for face in faces}
    assert names == {"2 ankles, 2 knees", "1 ankles, 2 knees", "1 ankles, 1 knees"}
    parts = _part(faces, scheme="visibility", num_clients=6)
    seen = [{label_of(faces[i], "visibility") for i in part} for part in parts]
    assert [len(labels) for labels in seen] == [1] * 6
    assert set().union(*seen) == names
    apart = _part(faces, scheme="dirichlet-visibility", num_clients=6, alpha=0.02)
    assert np.mean([len({label_of(faces[i], "visibility") for i in p}) for p in apart]) < 2


def test_sizes_follow_the_activity_table_of_mpii(seed: int) -> None:
    weights = client_weights("mpii-activities", 20_000, 0.0, np.random.default_rng(seed))
    assert 1 <= weights.min() < 1.1
    assert 270 < weights.max() <= 283
    quantiles = np.quantile(weights, (0.1, 0.5, 0.9))
    assert quantiles == pytest.approx((8, 31, 88), rel=0.05)
    faces = _faces({"a": [1] * 4000})
    real, equal = (
        sorted(len(part) for part in _part(faces, num_clients=50, sizes=sizes))
        for sizes in ("mpii-activities", "log-normal")
    )
    assert equal == [80] * 50
    assert real[-5] / real[5] > 5


def test_sizes_follow_the_category_table_of_mpii_exactly_for_20_clients(seed: int) -> None:
    weights = client_weights("mpii-categories", 20, 0.0, np.random.default_rng(seed))
    assert sorted(weights, reverse=True) == list(MPII_CATEGORY_COUNTS)
    assert len(client_weights("mpii-categories", 45, 0.0, np.random.default_rng(seed))) == 45


def test_tables_of_sizes_are_those_of_the_real_annotations(data_root: Path) -> None:
    path = data_root / "annotations" / "mpii" / "mpii_human_pose_17372.csv.gz"
    if not path.is_file():
        pytest.skip(f"no table of MPII's activities: {path}")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    categories = Counter(row["Category"] for row in rows if row["Category"] != "[]")
    assert sorted(categories.values(), reverse=True) == list(MPII_CATEGORY_COUNTS)
    activities = Counter(row["Activity"] for row in rows)  # no activity counts as one
    assert len(activities) == 397
    shares, counts = MPII_ACTIVITY_QUANTILES
    assert np.quantile(list(activities.values()), shares).round() == pytest.approx(counts, abs=1)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_a_client_keeps_back_whole_photos_that_it_does_not_train_on(fraction: float) -> None:
    faces = _faces(_MIXED)
    for part in _part(faces, scheme="dirichlet", num_clients=30, skew=1.0):
        train, held = hold_back(faces, part, fraction, seed=7)
        assert sorted([*train, *held]) == part.tolist()
        assert not {faces[i].photo for i in train} & {faces[i].photo for i in held}
        photos = len({faces[i].photo for i in part})
        assert len(train) > 0
        assert (len(held) > 0) == (fraction > 0 and photos > 1)
        if photos > 10:
            assert len(held) == pytest.approx(fraction * len(part), abs=3)


def test_what_is_kept_back_follows_from_the_seed_and_the_photos_alone() -> None:
    faces = _faces({"a": [1] * 200})
    part = np.arange(200)
    _, held = hold_back(faces, part, 0.2, seed=7)
    assert hold_back(faces, part, 0.2, seed=7)[1].tolist() == held.tolist()
    assert hold_back(faces, part, 0.2, seed=8)[1].tolist() != held.tolist()
    # A photo that leaves changes sides for few of the others.
    _, without = hold_back(faces, part[1:], 0.2, seed=7)
    assert len(set(held) ^ set(without)) <= 2


def test_training_validation_and_test_images_share_no_photo() -> None:
    faces = _faces({"a": [1, 2] * 50})
    part = np.arange(0, 150, 2)
    own = own_parts(faces, part, validation=0.2, test=0.3, seed=7)
    assert sorted(np.concatenate(own).tolist()) == part.tolist()
    photos = [{faces[index].photo for index in indices} for indices in own]
    assert not photos[0] & photos[1] | photos[0] & photos[2] | photos[1] & photos[2]
    assert len(own.validation) == pytest.approx(0.2 * len(part), abs=2)
    assert len(own.test) == pytest.approx(0.3 * len(part), abs=2)
    alone = own_parts(faces, part, validation=0.2, test=0.0, seed=7)
    assert alone.test.size == 0
    assert alone.validation.tolist() == hold_back(faces, part, 0.2, seed=7)[1].tolist()


@pytest.mark.parametrize("scheme", FLOWER_SCHEMES)
def test_flowers_partitioners_deal_whole_photos_and_lose_none(scheme: str, seed: int) -> None:
    pytest.importorskip("flwr_datasets", reason="flwr-datasets, an optional extra, is not there")
    faces = _faces(_MIXED)
    num_clients = 5 if "Exponential" in scheme else 9
    setting = RunConfig().replace(federation__partition=scheme).federation
    parts = deal(faces, setting, num_clients=num_clients, seed=seed)
    assert sorted(np.concatenate(parts)) == list(range(len(faces)))
    assert all(len(part) for part in parts)
    photos = [{faces[i].photo for i in part} for part in parts]
    assert sum(map(len, photos)) == len(set().union(*photos))
    again = deal(faces, setting, num_clients=num_clients, seed=seed)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]
    other = deal(faces, setting, num_clients=num_clients, seed=seed + 1)
    assert [part.tolist() for part in parts] != [part.tolist() for part in other]
    if "Pathological" in scheme:
        assert max(len({faces[i].source for i in part}) for part in parts) == 2
    if "Square" in scheme:
        assert len(parts[-1]) > 5 * len(parts[2])


def test_flowers_partitioners_that_cannot_deal_say_so(seed: int) -> None:
    pytest.importorskip("flwr_datasets", reason="flwr-datasets, an optional extra, is not there")
    setting = RunConfig().replace(federation__partition="flwr:ExponentialPartitioner").federation
    with pytest.raises(UserError, match="ExponentialPartitioner: cannot deal 440 photos to 40"):
        deal(_faces(_MIXED), setting, num_clients=40, seed=seed)


@pytest.mark.parametrize("scheme", ["iid", "flwr:ShardPartitioner"])
def test_nothing_is_dealt_to_no_client(scheme: str) -> None:
    setting = RunConfig().replace(federation__partition=scheme).federation
    with pytest.raises(UserError, match="expected 1 client or more, found 0"):
        deal(_faces({"a": [1] * 20}), setting, num_clients=0, seed=0)


def test_without_flwr_datasets_its_schemes_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    setting = RunConfig().replace(federation__partition="flwr:LinearPartitioner").federation
    with pytest.raises(UserError, match=r"pip install 'fedcunet\[partitioners\]'"):
        deal(_faces({"a": [1] * 20}), setting, num_clients=2, seed=0)
