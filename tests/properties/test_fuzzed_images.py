"""Damaged and odd image files: one line of explanation each, or the pixels another library finds.

A changed byte within the coded pixels may give another picture that is whole: then it must be the
one that Pillow decodes from the same bytes. A picture that is there in part only is refused.
"""

import io
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from fedcunet.data import images
from fedcunet.data.images import MAX_PIXELS, read_image
from fedcunet.errors import UserError
from tests.properties.test_fuzzed_annotations import mutated_bytes, read_or_refusal

_MUTATIONS = 60  # of each kind of image


def encoded(image_HW3: np.ndarray, suffix: str, *options: int) -> bytes:
    _, data = cv2.imencode(suffix, image_HW3, options)
    return bytes(data.tobytes())


def originals(generator: np.random.Generator) -> dict[str, bytes]:
    """Small pictures of each kind that data sets hold, and BMP."""
    noise_HW3 = generator.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image_HW3 = cv2.GaussianBlur(noise_HW3, (0, 0), 2)
    deep_HW3 = image_HW3.astype(np.uint16) * 257
    return {
        "jpeg": encoded(image_HW3, ".jpg"),
        "progressive jpeg": encoded(image_HW3, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "jpeg with restarts": encoded(image_HW3, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
        "grey jpeg": encoded(image_HW3[:, :, 0], ".jpg"),
        "png": encoded(image_HW3, ".png"),
        "grey png": encoded(image_HW3[:, :, 0], ".png"),
        "png of 16 bits": encoded(deep_HW3, ".png"),
        "bmp": encoded(image_HW3, ".bmp"),
    }


def mutated_image(data: bytes, generator: np.random.Generator) -> bytes:
    """Changed bytes, a flipped bit, another size, or PNG chunks whose checksums hold again."""
    kind = generator.integers(4)
    if kind == 0:
        at = int(generator.integers(len(data)))
        return data[:at] + bytes([data[at] ^ (1 << int(generator.integers(8)))]) + data[at + 1 :]
    if kind == 1:
        size = [int(generator.choice([0, 1, 39, 57, 4000, 65535])) for _ in range(2)]
        return with_size(data, *size)
    if kind == 2 and data.startswith(b"\x89PNG"):
        return with_true_checksums(mutated_bytes(data, generator))
    return mutated_bytes(data, generator)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The file with other numbers where its header says how large it is."""
    if data.startswith(b"\x89PNG"):
        changed = data[:16] + struct.pack(">II", width, height) + data[24:]
        return with_true_checksums(changed)
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<ii", width, height) + data[26:]
    frame = next(at for at in range(len(data)) if data[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def with_true_checksums(data: bytes) -> bytes:
    """A PNG whose chunks all have the checksum of what they hold now."""
    found, position = data[:8], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        body = data[position + 4 : position + 8 + length]
        found += data[position : position + 4] + body + struct.pack(">I", zlib.crc32(body))
        position += 12 + length
    return found


def fuzz_images(
    folder: Path, generator: np.random.Generator, kind: str, count: int
) -> Counter[str]:
    """How many of `count` damaged files of a kind were refused, and how many read right."""
    original, outcomes = originals(generator)[kind], Counter[str]()
    path = folder / "face.img"
    path.write_bytes(original)
    assert read_image(path).shape == (40, 56, 3)
    for _ in range(count):
        data = mutated_image(original, generator)
        path.write_bytes(data)
        found = read_or_refusal(path, read_image)
        outcomes["refused" if found is None else "read right"] += 1
        if found is not None:
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, pillow_pixels(data))
    return outcomes


def pillow_pixels(data: bytes) -> np.ndarray:
    """RGB by Pillow; of 16 bits the upper eight, as OpenCV takes them."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", list(originals(np.random.default_rng(0))))
def test_damaged_images_are_refused_or_read_as_another_library_reads_them(
    tmp_path: Path,
    generator: np.random.Generator,
    kind: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    outcomes = fuzz_images(tmp_path, generator, kind, _MUTATIONS)
    assert outcomes["refused"] > 0.3 * _MUTATIONS
    # libpng speaks for itself where only its decoder can notice: checksums hold, the data do not.
    said = capfd.readouterr()
    assert said.out == ""
    assert [line for line in said.err.splitlines() if not line.startswith("libpng ")] == []


@pytest.mark.parametrize("kind", list(originals(np.random.default_rng(0))))
def test_a_picture_that_declares_a_huge_size_is_refused_before_any_memory_is_taken(
    tmp_path: Path, generator: np.random.Generator, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the picture was decoded")

    monkeypatch.setattr(images.cv2, "imdecode", never)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", never)
    path = tmp_path / "bomb.img"
    path.write_bytes(with_size(originals(generator)[kind], 65000, 65000))
    assert MAX_PIXELS < 65000 * 65000
    with pytest.raises(UserError, match=r"bomb\.img: expected an image of 1 to .* 65000×65000"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_picture_cut_off_anywhere_is_refused(
    tmp_path: Path, generator: np.random.Generator, suffix: str, share: float
) -> None:
    data = encoded(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8), suffix)
    path = tmp_path / f"face{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="expected a whole"):
        read_image(path)


def test_a_jpeg_with_a_gap_in_its_codes_is_refused(
    tmp_path: Path, generator: np.random.Generator
) -> None:
    data = encoded(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8), ".jpg")
    path = tmp_path / "face.jpg"
    path.write_bytes(data[: len(data) // 2] + data[len(data) // 2 + 500 :])
    # OpenCV takes it: half of the picture is grey or in the wrong place.
    assert cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR) is not None
    with pytest.raises(UserError, match="expected a whole JPEG image"):
        read_image(path)


def test_what_is_no_picture_is_refused(tmp_path: Path, generator: np.random.Generator) -> None:
    image_HW3 = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    with_run_lengths = bytearray(encoded(image_HW3, ".bmp"))
    with_run_lengths[30] = 1
    contents = {
        "empty": b"",
        "text": b"a picture",
        "zeros": bytes(1000),
        "webp": encoded(image_HW3, ".webp"),
        "tiff": encoded(image_HW3, ".tiff"),
        "other bmp": bytes(with_run_lengths),
        "start of a jpeg": b"\xff\xd8",
        "start of a png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.jpg"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.jpg: expected a"):
            read_image(path)
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UserError, match=r"folder\.jpg: image cannot be read: Is a directory"):
        read_image(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg: expected an image file"):
        read_image(tmp_path / "pipe.jpg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_picture_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "face.jpg"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(UserError, match=r"face\.jpg: image cannot be read: Permission denied"):
        read_image(path)


@pytest.mark.parametrize("tag", range(1, 9))
def test_an_orientation_tag_is_applied_where_it_is_asked_for(
    tmp_path: Path, generator: np.random.Generator, tag: int
) -> None:
    path = tmp_path / "phone.jpg"
    stored_HW3 = cv2.GaussianBlur(
        generator.integers(0, 256, (24, 40, 3), dtype=np.uint8), (0, 0), 2
    )
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(stored_HW3).save(path, exif=exif, quality=95)
    plain_HW3, shown_HW3 = read_image(path), read_image(path, oriented=True)
    assert plain_HW3.shape == (24, 40, 3)
    with Image.open(path) as image:
        expected_HW3 = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(shown_HW3, expected_HW3)
    assert (tag == 1) == (shown_HW3.shape == plain_HW3.shape and (shown_HW3 == plain_HW3).all())
