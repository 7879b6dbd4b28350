"""Several data sets as one: joints brought to the first one's, crops alike, tested on the first."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fedcunet.config import RunConfig
from fedcunet.data import FACE68, LSP14, MPII16, Annotation, AnnotationSet, LandmarkScheme, load
from fedcunet.data.annotations import LSP14_IN_MPII16
from fedcunet.data.crops import crop_square
from fedcunet.data.mixed import mixed
from fedcunet.errors import UserError
from tests.mpii_files import hrnet_record, joints, write_images


def people(
    name: str, scheme: LandmarkScheme, points_NK2: np.ndarray, labelled_NK: np.ndarray
) -> AnnotationSet:
    annotations = tuple(
        Annotation(
            image=Path(f"{name}{n}.jpg"),
            points_K2=points_K2,
            labelled_K=labelled_K,
            box_xywh=(5.0, 6.0, 70.0, 70.0),
            box_origin="given",
            source=name,
            photo=f"{name}/{n}",
            head_size=12.0 if scheme is MPII16 else math.nan,
        )
        for n, (points_K2, labelled_K) in enumerate(zip(points_NK2, labelled_NK, strict=True))
    )
    return AnnotationSet(
        name=name, subset="train", scheme=scheme, annotations=annotations, problems=()
    )


def random_people(
    generator: np.random.Generator, scheme: LandmarkScheme, count: int = 2
) -> AnnotationSet:
    points = generator.uniform(10, 200, (count, scheme.num_landmarks, 2))
    labelled = np.ones((count, scheme.num_landmarks), dtype=bool)
    return people("mpii" if scheme is MPII16 else "lsp", scheme, points, labelled)


def test_the_joints_of_lsp_have_the_same_names_in_mpii() -> None:
    lsp_pairs = {tuple(sorted(LSP14_IN_MPII16[k] for k in pair)) for pair in LSP14.flip_pairs}
    assert lsp_pairs == {tuple(sorted(pair)) for pair in MPII16.flip_pairs}
    assert sorted({*LSP14_IN_MPII16, 6, 7}) == list(range(16))


def test_people_of_mpii_get_the_joints_and_the_crop_of_lsp(
    generator: np.random.Generator,
) -> None:
    lsp, mpii = random_people(generator, LSP14), random_people(generator, MPII16)
    found = mixed([lsp, mpii], "train")
    assert (found.name, found.scheme) == ("lsp+mpii", LSP14)
    assert found.annotations[:2] == lsp.annotations
    for before, after in zip(mpii.annotations, found.annotations[2:], strict=True):
        np.testing.assert_array_equal(after.points_K2, before.points_K2[list(LSP14_IN_MPII16)])
        assert after.labelled_K.all()
        low, high = after.points_K2.min(axis=0), after.points_K2.max(axis=0)
        centre_2, side = crop_square(after, LSP14)
        assert side == pytest.approx(1.5 * (high - low).max())
        np.testing.assert_allclose(centre_2, (low + high) / 2)
        assert (after.image, after.photo, after.source) == (
            before.image,
            before.photo,
            before.source,
        )


def test_people_of_lsp_get_a_pelvis_and_a_thorax_where_both_sides_are_labelled(
    generator: np.random.Generator,
) -> None:
    lsp = random_people(generator, LSP14)
    lsp.annotations[1].labelled_K[[2, 9]] = False  # right hip, left shoulder
    found = mixed([random_people(generator, MPII16), lsp], "train").annotations[2:]
    whole, partial = found
    before = lsp.annotations[0].points_K2
    np.testing.assert_allclose(whole.points_K2[6], (before[2] + before[3]) / 2)
    np.testing.assert_allclose(whole.points_K2[7], (before[8] + before[9]) / 2)
    assert whole.labelled_K.all()
    assert [k for k in range(16) if not partial.labelled_K[k]] == [2, 6, 7, 13]
    # The crop is the one that LSP's own annotation would give: 1.5 times the box of its joints.
    low, high = before.min(axis=0), before.max(axis=0)
    assert crop_square(whole, MPII16)[1] == pytest.approx(1.5 * (high - low).max())
    assert math.isnan(whole.head_size)


def test_people_with_too_few_joints_are_left_out_and_counted(
    generator: np.random.Generator,
) -> None:
    mpii = random_people(generator, MPII16)
    mpii.annotations[0].labelled_K[:] = [k in (3, 6, 7, 8, 9) for k in range(16)]
    found = mixed([random_people(generator, LSP14), mpii], "train")
    assert len(found.annotations) == 3
    assert found.problems == ("mpii: 1 people have fewer than 4 of the joints of lsp14; left out",)


def test_faces_and_people_do_not_mix(generator: np.random.Generator) -> None:
    faces = AnnotationSet(name="300w", subset="train", scheme=FACE68, annotations=(), problems=())
    with pytest.raises(UserError, match="300w: its landmarks are face68"):
        mixed([random_people(generator, LSP14), faces], "train")


@pytest.fixture
def roots(tmp_path: Path, generator: np.random.Generator) -> str:
    """LSP with one training and one test image, MPII with two people: `DIR1,DIR2`."""
    lsp = write_images(tmp_path / "lsp", ["im0001.jpg", "im1001.jpg"])
    savemat(lsp / "joints.mat", {"joints": generator.uniform(10, 90, (3, 14, 2000))})
    mpii = write_images(tmp_path / "mpii", ["1.jpg", "2.jpg"])
    (mpii / "annot").mkdir()
    (mpii / "annot" / "train.json").write_text(json.dumps([hrnet_record("1.jpg")]))
    (mpii / "annot" / "valid.json").write_text(json.dumps([hrnet_record("2.jpg")]))
    return f"{lsp},{mpii}"


def test_by_name_training_has_all_sets_and_a_test_the_first_alone(roots: str) -> None:
    # The same two values stand in a setting file.
    data = RunConfig().replace(data__name="lsp+mpii", data__root=roots).data
    train = load(data.name, data.root, data.train_subset)
    assert [a.photo for a in train.annotations] == ["lsp/im0001", "mpii/1"]
    expected = np.array(list(joints().values()))[list(LSP14_IN_MPII16)] - 1
    np.testing.assert_allclose(train.annotations[1].points_K2, expected)
    test = load(data.name, data.root, data.test_subset)
    assert [a.photo for a in test.annotations] == ["lsp/im1001"]
    other = ",".join(reversed(roots.split(",")))
    assert load("mpii+lsp", other, "train").scheme is MPII16
    assert [a.photo for a in load("mpii+lsp", other, "test").annotations] == ["mpii/2"]


@pytest.mark.parametrize("name", ["lsp-oc+mpii", "lsp+lsp-oc"])
def test_observer_centric_joints_mix_with_no_others(roots: str, name: str) -> None:
    with pytest.raises(UserError, match="left and right are the picture's in lsp-oc"):
        load(name, roots, "train")


def test_every_set_needs_its_folder(roots: str) -> None:
    with pytest.raises(UserError, match=r"lsp\+mpii: expected 2 folders with a comma"):
        load("lsp+mpii", roots.split(",")[0], "train")
    with pytest.raises(UserError, match=r"expected one of .*, found 'coco'"):
        load("lsp+coco", roots, "train")
