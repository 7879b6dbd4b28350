"""The cache of crops on disk: exact, never stale, within its budget, for many processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from fedcunet.config import RunConfig
from fedcunet.data import FACE68, load
from fedcunet.data.crops import Crops
from fedcunet.data.disk_cache import DiskCache
from fedcunet.errors import UserError
from fedcunet.training.local import crops_of as crops_of_setting

_SIDE = 160  # pixels of the test pictures: large enough to be worth a file


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def pixels(generator: np.random.Generator, height: int = 9, width: int = 7) -> np.ndarray:
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8)


def crops_of(root: Path, disk: DiskCache | None, **options: int) -> Crops:
    return Crops(load("300w", root, "afw").annotations, FACE68, size=32, disk=disk, **options)


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 2**20)


@pytest.fixture
def root(make_300w) -> Path:
    return make_300w({"afw": ["1_1.png", "2_1.jpg", "3_1.jpg"]}, side=_SIDE)


def test_what_was_put_comes_back_and_nothing_else(
    cache: DiskCache, generator: np.random.Generator
) -> None:
    image_HW3 = pixels(generator)
    key, other = cache.key("a", 1, 2.5), cache.key("a", 1, 2.6)
    assert cache.get(key) is None
    assert cache.put(key, image_HW3, (0.5, 0.25), (-3.5, 1e-9))
    found_HW3, scale_2, offset_2 = cache.get(key)
    np.testing.assert_array_equal(found_HW3, image_HW3)
    assert (scale_2, offset_2) == ((0.5, 0.25), (-3.5, 1e-9))
    assert cache.get(other) is None


def test_damaged_files_count_as_absent_and_are_made_anew(
    tmp_path: Path, cache: DiskCache, generator: np.random.Generator
) -> None:
    image_HW3, key = pixels(generator), cache.key("a")
    cache.put(key, image_HW3, (1, 1), (0, 0))
    (path,) = files_of(tmp_path / "cache")
    whole = path.read_bytes()
    damages = [whole[:at] for at in (0, 3, 40, len(whole) - 1)] + [whole + b"\0", bytes(len(whole))]
    damages += [
        whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(0, len(whole), 5)
    ]
    for damaged in damages:
        path.write_bytes(damaged)
        assert cache.get(key) is None
    assert cache.put(key, image_HW3, (1, 1), (0, 0))
    np.testing.assert_array_equal(cache.get(key)[0], image_HW3)


def test_a_fresh_process_decodes_nothing_and_has_the_same_crops(
    root: Path, cache: DiskCache
) -> None:
    first = crops_of(root, cache)
    expected = first.batch([0, 1, 2]).images_B3HW
    assert first.num_decoded == 3
    for budget in (2**20, 0):  # the disk serves a process that may keep nothing in memory too
        again = crops_of(root, cache, budget_bytes=budget)
        assert torch.equal(again.batch([0, 1, 2]).images_B3HW, expected)
        assert torch.equal(again.batch([2, 1, 0]).images_B3HW, expected.flip(0))
        assert again.num_decoded == 0


def test_an_image_that_changed_is_never_served_from_before(
    root: Path, cache: DiskCache, generator: np.random.Generator
) -> None:
    crops_of(root, cache).batch([0])
    path = root / "afw" / "1_1.png"
    before = path.stat()
    cv2.imwrite(str(path), pixels(generator, _SIDE, _SIDE))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = crops_of(root, cache)
    assert torch.equal(changed.batch([0]).images_B3HW, crops_of(root, None).batch([0]).images_B3HW)
    assert changed.num_decoded == 1
    late = crops_of(root, cache)
    path.unlink()
    with pytest.raises(UserError, match=r"1_1\.png: image cannot be read"):
        late.batch([0])


def test_other_boxes_and_sizes_have_pixels_of_their_own(root: Path, cache: DiskCache) -> None:
    crops_of(root, cache).batch([0])
    faces = load("300w", root, "afw")
    other = Crops(faces.annotations, FACE68, size=64, disk=cache)
    other.batch([0])
    assert other.num_decoded == 1


def test_the_folder_stays_within_its_budget(tmp_path: Path, generator: np.random.Generator) -> None:
    budget = 1000
    cache = DiskCache(tmp_path, budget)
    kept = [cache.put(cache.key(n), pixels(generator), (1, 1), (0, 0)) for n in range(20)]
    assert 0 < sum(kept) < 20
    assert bytes_of(tmp_path) <= budget
    for number, was_kept in enumerate(kept):
        assert (cache.get(cache.key(number)) is not None) == was_kept
    assert not cache.put(cache.key("large"), pixels(generator, 40, 40), (1, 1), (0, 0))


def test_what_nobody_used_for_a_day_gives_way(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    keys = [DiskCache.key(n) for n in range(5)]
    for key in keys[:4]:
        assert DiskCache(tmp_path, 1000).put(key, pixels(generator), (1, 1), (0, 0))
    two_days_ago = (tmp_path / "total").stat().st_mtime - 2 * 24 * 3600
    for path in files_of(tmp_path):
        os.utime(path, (two_days_ago, two_days_ago))
    cache = DiskCache(tmp_path, 1000)
    assert cache.get(keys[0]) is not None  # used again
    assert cache.put(keys[4], pixels(generator), (1, 1), (0, 0))
    there = [DiskCache(tmp_path, 1000).get(key) is not None for key in keys]
    assert there[0]
    assert there[4]
    assert sum(there) == 4
    assert bytes_of(tmp_path) <= 1000


def test_making_room_removes_what_a_dead_writer_left_and_nothing_of_others(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    cache = DiskCache(tmp_path, 1000)
    key = cache.key("a")
    (tmp_path / key[:2]).mkdir()
    others = [tmp_path / key[:2] / name for name in ("notes.txt", ".hidden")]
    for path in others:
        path.write_text("mine")
    left = tmp_path / key[:2] / ".unfinished-1"
    left.write_bytes(b"half")
    assert cache.put(key, pixels(generator), (1, 1), (0, 0))  # counts the folder: it is new
    assert [path.read_text() for path in others] == ["mine", "mine"]
    assert not left.exists()


@pytest.mark.parametrize("content", [b"", b"-1", b"many", b"\xff"])
def test_a_damaged_total_is_counted_again(
    tmp_path: Path, generator: np.random.Generator, content: bytes
) -> None:
    cache = DiskCache(tmp_path, 1000)
    for number in range(2):
        cache.put(cache.key(number), pixels(generator), (1, 1), (0, 0))
    (tmp_path / "total").write_bytes(content)
    for number in range(2, 9):
        DiskCache(tmp_path, 1000).put(cache.key(number), pixels(generator), (1, 1), (0, 0))
    assert 500 < bytes_of(tmp_path) <= 1000
    assert int((tmp_path / "total").read_bytes()) == bytes_of(tmp_path)


def test_a_folder_that_cannot_be_made_costs_nothing_but_the_cache(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    crops = crops_of(root, DiskCache(tmp_path / "taken" / "cache", 2**20))
    expected = crops_of(root, None).batch([0, 1]).images_B3HW
    assert torch.equal(crops.batch([0, 1]).images_B3HW, expected)


def test_every_process_of_a_setting_shares_its_cache(root: Path, tmp_path: Path) -> None:
    faces = load("300w", root, "afw")
    data = RunConfig().replace(data__cache_dir=str(tmp_path / "shared")).data
    first, second = (crops_of_setting(data, faces) for _ in range(2))
    assert torch.equal(first.batch([0, 1]).images_B3HW, second.batch([0, 1]).images_B3HW)
    assert (first.num_decoded, second.num_decoded) == (2, 0)
    none = RunConfig().replace(data__cache_dir=str(tmp_path / "no"), data__disk_cache_bytes=0).data
    crops_of_setting(none, faces).batch([0])
    assert not (tmp_path / "no").exists()


def test_small_images_are_not_worth_a_file(tmp_path: Path, make_300w, cache: DiskCache) -> None:
    crops_of(make_300w({"afw": ["1_1.png"]}, side=48), cache).batch([0])
    assert not (tmp_path / "cache").exists()


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from fedcunet.data.disk_cache import DiskCache
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
cache, generator = DiskCache(folder, 60_000), np.random.default_rng(seed)
for _ in range(400):
    number = int(generator.integers(100))
    key = cache.key(number)
    expected = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    found = cache.get(key)
    if found is None:
        cache.put(key, expected, (1, 1), (0, 0))
    else:
        assert (found[0] == expected).all()
"""


def test_many_processes_share_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    writers = [
        subprocess.Popen([sys.executable, "-c", _WRITER, str(folder), str(seed)])
        for seed in range(3)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    assert 0.5 * 60_000 < bytes_of(folder) <= 60_000
    assert all(path.suffix == ".crop" for path in files_of(folder))
