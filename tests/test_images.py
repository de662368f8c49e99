"""Image data sets: small archives of the official layout, everything that can be wrong with them, the real editions."""

import hashlib
import io
import json
import os
import runpy
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

from fairtuning import datasets, paths
from fairtuning.datasets import DataError, aircraft, celeba, files, images, utkface, waterbirds

MIRROR = os.environ.get("FAIRTUNING_MIRROR", "")
PAGE = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"


# ---------------------------------------------------------------------------------------------- small archives, by hand
def picture(seed=0, size=(40, 30), mode="RGB", form="JPEG"):
    """A smooth random picture as the bytes of an image file; ``size`` is (width, height)."""
    rng = np.random.default_rng(seed)
    channels = {"L": 1, "CMYK": 4, "RGBA": 4}.get(mode, 3)
    small = rng.integers(0, 255, (4, 4, channels), dtype=np.uint8)
    bands = [Image.fromarray(small[:, :, i]).resize(size, Image.Resampling.BICUBIC) for i in range(channels)]
    image = bands[0] if mode == "L" else Image.merge("RGB" if mode == "P" else mode, bands)
    if mode == "P":
        image = image.quantize(16)
    extra = {"transparency": bytes(range(0, 160, 10))} if mode == "P" else {"quality": 90} if form == "JPEG" else {}
    image.save(file := io.BytesIO(), form, **extra)
    return file.getvalue()


def make_tar(members):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def make_zip(members):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.fixture
def mirror(folders, monkeypatch):
    """Puts files into a mirror folder, by its MANIFEST.json as ``edition``; returns the data set's folder."""
    entries = []

    def put(name, contents, *, edition="tiny"):
        folder = folders / "mirror" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            if edition:
                entries.append({"file": f"{name}/{file}", "sha256": digest, "edition": edition})
        (folder.parent / "MANIFEST.json").write_text(json.dumps(entries))
        monkeypatch.setenv("FAIRTUNING_MIRROR", str(folder.parent))
        return folder

    return put


def refused(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def left_over():
    folder = paths.data_folder()
    packed = [path for path in folder.rglob("*") if path.parent.name == "packed" and path.name != ".lock"]
    return packed + list(folder.rglob("*.part"))


# ------------------------------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize(
    "mode, form", [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("L", "PNG")]
)
@pytest.mark.parametrize("size", [(24, 24), (24, 16), (16, 32)])
def test_decode(mode, form, size):
    content = picture(mode=mode, form=form)
    reference = Image.open(io.BytesIO(content))
    reference = (reference.convert("RGBA") if mode == "P" else reference).convert("RGB")
    fitted = ImageOps.fit(reference, size[::-1], Image.Resampling.BICUBIC)
    pixels = images.decode(content, size)
    assert pixels.shape == (3, *size) and pixels.dtype == np.uint8
    assert np.abs(pixels.transpose(1, 2, 0).astype(int) - np.asarray(fitted, dtype=int)).max() <= 1
    stretched = images.decode(content, size, crop="stretch")
    expected = np.asarray(reference.resize(size[::-1], Image.Resampling.BICUBIC))
    assert np.array_equal(stretched.transpose(1, 2, 0), expected)


def test_decode_large_jpeg_at_a_fraction():
    content = picture(size=(1600, 1200))
    reference = ImageOps.fit(Image.open(io.BytesIO(content)).convert("RGB"), (56, 56), Image.Resampling.BICUBIC)
    difference = images.decode(content, (56, 56)).transpose(1, 2, 0).astype(int) - np.asarray(reference, dtype=int)
    assert np.abs(difference).max() <= 4


@pytest.mark.parametrize("size", [(60, 100), (600, 1000)])
def test_decode_cuts_the_banner_off(size):
    array = np.zeros((*size, 3), dtype=np.uint8)
    array[-20:] = 255
    Image.fromarray(array).save(file := io.BytesIO(), "PNG")
    assert images.decode(file.getvalue(), (32, 32)).max() > 200
    for crop in images.CROPS:
        assert images.decode(file.getvalue(), (32, 32), crop=crop, trim=20).max() == 0


def test_decode_refuses_what_is_no_image():
    whole = picture()
    for content in (b"", b"abc", whole[: len(whole) // 2], PAGE):
        with pytest.raises(OSError):
            images.decode(content, (24, 24))


def png_of_16_bits(values, colour):
    """A PNG file by hand (Pillow writes no colours of 16 bits) of ``values`` [height, width, channels]."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("colour, channels, alpha", [(0, 1, 0), (4, 1, 1), (2, 3, 0), (6, 3, 1)])  # grey or RGB
def test_16_bits_become_the_upper_8(colour, channels, alpha):
    gradient = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64, 1)
    values = np.concatenate([gradient] * channels + [np.full_like(gradient, 65535)] * alpha, axis=2)
    pixels = images.decode(png_of_16_bits(values, colour), (64, 64))
    assert np.array_equal(pixels, np.broadcast_to(gradient[:, :, 0] >> 8, (3, 64, 64)))
    assert abs(pixels.mean() - 127.5) < 1  # clipped instead, it was 254


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])  # what Pillow's versions make of 16 bits of grey
def test_16_bits_of_grey_in_any_mode_of_pillow(monkeypatch, mode):
    gradient = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": np.int32}[mode]
    opened = Image.fromarray(gradient.astype(dtype))
    assert opened.mode == mode
    monkeypatch.setattr(images, "_open", lambda content: opened)
    assert np.array_equal(images.decode(b"", (64, 64))[0], gradient >> 8)


def test_grey_in_16_bits_is_the_same_picture_in_8():
    content = picture(mode="L", form="PNG")
    grey = np.asarray(Image.open(io.BytesIO(content)), dtype=np.uint16)
    again = images.decode(png_of_16_bits(grey[:, :, None] * 257, 0), (30, 40))
    assert np.array_equal(again, images.decode(content, (30, 40)))
    assert np.array_equal(again[0], grey)


ENDLESS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 100 100
%%EndComments
{} loop
%%EOF
"""


def other_formats():
    """One small picture in formats that Pillow reads and this library does not; an endless program among them."""
    found = {"EPS": ENDLESS, "XBM": b"#define x_width 8\n#define x_height 1\nstatic char x_bits[] = {\n0x55 };\n"}
    for form in ("PPM", "TGA", "BMP", "GIF", "TIFF", "WEBP", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "SPIDER"):
        image = Image.new("F" if form == "SPIDER" else "RGB", (24, 24))
        image.save(file := io.BytesIO(), form)
        found[form] = file.getvalue()
    return found


@pytest.fixture
def no_process(monkeypatch):
    """Whoever starts a process, or asks Ghostscript to draw, fails in a way that nobody catches."""

    def started(*args, **rest):
        raise AssertionError(f"started: {args}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(os, "system", started)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")  # as where it is installed


@pytest.mark.parametrize("form", sorted(other_formats()))
def test_other_formats_are_refused_whatever_their_name(mirror, few, no_process, form):
    content = other_formats()[form]
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == form  # Pillow would read it
    with pytest.raises(OSError, match="no JPEG or PNG file, whatever its name; convert it"):
        images.decode(content, (24, 24))
    members = birds(spoil={"waterbirds_v1.0/001.Some Bird/Bird_0000_é.jpg": content})
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(members)})
    words = ["1 faulty image", "Bird_0000_é.jpg cannot be decoded (no JPEG or PNG file"]
    refused(lambda: datasets.load("waterbirds", size=16), *words)


def test_wherever_an_image_is_opened_its_formats_are_named():
    root = Path(__file__).parents[1]
    sources = [
        path
        for folder in ("lib", "data_scripts", "benchmarks", "notebooks", "book")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".ipynb", ".md") and "_build" not in path.parts
    ]
    opened = [line for path in sources for line in path.read_text("utf-8").splitlines() if "Image.open(" in line]
    assert len(opened) >= 2 and all("formats=" in line for line in opened), opened


@pytest.mark.parametrize("size", ["", "80x", "a", "80x64x3", 0, -3, 7, 5000, None, (1, 2, 3)])
def test_sizes_that_are_none(size):
    refused(lambda: images.parse_size(size), repr(size), "112")


# ---------------------------------------------------------------------------------------------------------- Waterbirds
METADATA = "img_id,img_filename,y,split,place,place_filename"


def birds(rows=None, *, prefix="waterbirds_v1.0/", spoil=None, order=1):
    """A tiny Waterbirds with 24 birds in nested folders: each (label, background) twice in each part."""
    rows = rows or [(y, split, place) for split in range(3) for y in range(2) for place in range(2) for _ in range(2)]
    lines, members = [METADATA], {}
    for i, (y, split, place) in enumerate(rows):
        name = f"{i % 3 + 1:03d}.Some Bird/Bird_{i:04d}_é.jpg"  # odd, and still a name
        lines.append(f'{i},"{name}",{y},{split},{place},/l/lake/{i}.jpg')
        members[prefix + name] = picture(i, mode=("RGB", "L", "CMYK")[i % 3])
    members |= spoil or {}
    members[prefix + "metadata.csv"] = "\n".join(lines).encode()
    members[prefix + "RELEASE_v1.0.txt"] = b"v1.0"
    return dict(list(members.items())[::order])


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(waterbirds, "COUNTS", dict.fromkeys(waterbirds.COUNTS, (2, 2, 2, 2)))


@pytest.mark.parametrize("prefix, order", [("waterbirds_v1.0/", 1), ("./", -1), ("a/b/c/", 1)])
def test_waterbirds(mirror, few, prefix, order, monkeypatch):
    folder = mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds(prefix=prefix, order=order))})
    data = datasets.load("waterbirds", size="24x16")
    assert data.inputs.shape == (24, 3, 24, 16) and data.inputs.dtype == torch.uint8
    assert data.edition == "tiny at 24x16" and data.notes == ()
    cells = 4 * data.split + 2 * data.label + data.group
    assert torch.bincount(cells).tolist() == [2] * 12
    names = [name for name in birds(prefix=prefix, order=order) if name.endswith(".jpg")]
    for row in (0, 7, 23):
        content = birds(prefix=prefix)[names[row]]
        assert np.array_equal(data.inputs[row].numpy(), images.decode(content, (24, 16)))
        number = int(names[row].rsplit("_", 2)[1])
        assert (data.split[row], data.label[row], data.group[row]) == (number // 8, number // 4 % 2, number // 2 % 2)
    # mapped from now on: neither the archive nor the mirror is needed, and writing to it does not change the file
    (paths.data_folder() / "waterbirds" / "waterbirds_v1.0.tar.gz").unlink()
    (folder / "waterbirds_v1.0.tar.gz").unlink()
    data.inputs[0] = 0
    monkeypatch.setattr(images, "decode", None)
    again = datasets.load("waterbirds", size=(24, 16))
    assert again.digest == data.digest and again.inputs[0].any()
    assert any("24 images" in line for line in datasets.verify("waterbirds"))


def test_kinds_of_bird_are_another_label_of_the_same_images(mirror, few):
    members = birds()
    words = {"001.Some Bird": "001.Black_footed_Albatross", "002.Some Bird": "002.Violetear"}
    words["003.Some Bird"] = "003.Laysan_Albatross"
    for old, new in words.items():
        members = {name.replace(old, new): content for name, content in members.items()}
    listed = members["waterbirds_v1.0/metadata.csv"].decode()
    for old, new in words.items():
        listed = listed.replace(old, new)
    members["waterbirds_v1.0/metadata.csv"] = listed.encode()
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(members)})
    plain, kinds = (datasets.load("waterbirds", size=16, label=label) for label in waterbirds.LABELS)
    assert kinds.label_names == ("albatross", "violetear") and kinds.digest == plain.digest
    assert torch.equal(kinds.group, plain.group) and torch.equal(kinds.split, plain.split)
    names = [name.removeprefix("waterbirds_v1.0/") for name in members if name.endswith(".jpg")]
    assert kinds.label.tolist() == [int("Violetear" in name) for name in names]
    refused(lambda: datasets.load("waterbirds", size=16, label="species"), "'species'", "bird, kind")
    refused(lambda: datasets.load("waterbirds", size=16, group="place"), "'place'", "background")


def test_another_size_or_crop_is_another_edition(mirror, few):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())})
    found = [
        datasets.load("waterbirds", size=16),
        datasets.pack("waterbirds", size=24),
        datasets.load("waterbirds", size=24, crop="stretch"),
    ]
    assert len({data.digest for data in found}) == len({data.edition for data in found}) == 3
    assert datasets.load("waterbirds", size=16).digest == found[0].digest
    refused(lambda: datasets.load("waterbirds", size=16, crop="round"), "'round'", "center, stretch")
    refused(lambda: datasets.load("waterbirds", size=16, faulty="ignore"), "'ignore'", "refuse, skip")
    refused(lambda: datasets.pack("adult", size=16), "adult has no images")


def test_counts_that_are_not_the_published_ones(mirror):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())})
    refused(lambda: datasets.load("waterbirds", size=16), "training", "(2, 2, 2, 2)", "(3498, 184, 56, 1057)")


@pytest.mark.parametrize(
    "old, new, words",
    [
        (",0,0,0,", ",2,0,0,", ["line 2", "y is '2'", "0 to 1"]),
        (",0,0,0,", ",0,x,0,", ["line 2", "split is 'x'", "0 to 2"]),
        (",0,0,0,/l/lake/0.jpg", "", ["line 2", "y is ''"]),
        (",place,", ",background,", ["no column place"]),
    ],
)
def test_bad_metadata(mirror, few, old, new, words):
    members = birds()
    name = "waterbirds_v1.0/metadata.csv"
    members[name] = members[name].decode().replace(old, new, 1).encode()
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(members)})
    refused(lambda: datasets.load("waterbirds", size=16), "metadata.csv", *words)
    assert left_over() == []


def test_pack_by_the_command_line(mirror, few, capsys):
    from fairtuning import cli

    bird = "waterbirds_v1.0/001.Some Bird/Bird_0000_é.jpg"
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds(spoil={bird: b"no image"}))})
    command = ["data", "pack", "waterbirds", "--size", "24x16"]
    refused(lambda: cli.app(command, standalone_mode=False), "1 faulty image", "Bird_0000_é.jpg cannot be decoded")
    cli.app([*command, "--faulty", "skip"], standalone_mode=False)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("waterbirds: 23 images, edition tiny at 24x16, digest ")
    assert "left out: 001.Some Bird" in second
    assert datasets.load("waterbirds", size="24x16", faulty="skip").digest.startswith(first.rpartition(" ")[2])


# -------------------------------------------------------------------------------------------- faulty images, one by one
def test_faulty_images_are_named_and_counted(mirror, few):
    bird = "waterbirds_v1.0/001.Some Bird/Bird_0000_é.jpg"
    whole = picture()
    spoil = {bird: whole[: len(whole) // 2], "waterbirds_v1.0/001.Some Bird/Nobody.jpg": whole}
    members = birds(spoil=spoil)
    del members["waterbirds_v1.0/002.Some Bird/Bird_0001_é.jpg"]
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(members)})
    words = ["3 faulty images", "Bird_0000_é.jpg cannot be decoded", "Bird_0001_é.jpg is listed and not there"]
    words += ["Nobody.jpg has no label", "faulty='skip'"]
    refused(lambda: datasets.load("waterbirds", size=16), *words)
    assert left_over() == []
    data = datasets.load("waterbirds", size=16, faulty="skip")
    assert len(data.label) == 22 and "3 faulty images left out: 001.Some Bird/Bird_0000_é.jpg" in data.notes[0]
    # the images after those left out have moved up, each with its own label
    assert np.array_equal(data.inputs[0].numpy(), images.decode(picture(2, mode="CMYK"), (16, 16)))
    assert np.array_equal(data.inputs[-1].numpy(), images.decode(picture(23, mode="CMYK"), (16, 16)))
    assert (data.split[0], data.label[0], data.group[0]) == (0, 0, 1)
    assert sum(path.suffix == ".npy" for path in left_over()) == 1
    refused(lambda: datasets.load("waterbirds", size=16), *words)  # packed, and still refused unless asked for
    assert any("3 faulty" in line for line in datasets.verify("waterbirds"))


def test_skipping_changes_the_digest(mirror, few):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())})
    whole = datasets.load("waterbirds", size=16, faulty="skip").digest
    assert whole == datasets.load("waterbirds", size=16).digest


# -------------------------------------------------------------------------------------------------------- bad archives
def bad_tar(entry):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz") as archive:
        archive.addfile(entry)
    return file.getvalue()


def link(target):
    entry = tarfile.TarInfo("waterbirds_v1.0/x.jpg")
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    return entry


@pytest.mark.parametrize(
    "content, words",
    [
        (make_tar({"../../evil.jpg": picture()}), ["evil.jpg", "refused"]),
        (make_tar({"/etc/evil.jpg": picture()}), ["evil.jpg", "refused"]),
        (make_zip({"../evil.jpg": picture()}), ["../evil.jpg", "refused"]),
        (make_zip({"C:/evil.jpg": picture()}), ["C:/evil.jpg", "refused"]),
        (bad_tar(link("/etc/passwd")), ["x.jpg", "refused"]),
        (bad_tar(link("../../secret")), ["x.jpg", "refused"]),
        (make_tar(birds())[:-200], ["cannot be read to its end"]),
        (make_tar(birds())[:-8] + bytes(8), ["cannot be read to its end"]),  # the checksum alone is wrong
        (make_zip(birds())[:-100], ["cannot be read to its end"]),
        (make_zip(birds()).replace(b"img_id", b"IMG_ID"), ["cannot be read to its end", "CRC"]),
        (b"", ["cannot be read to its end"]),
        (b"neither", ["cannot be read to its end"]),
        (PAGE, ["HTML page", "quota page", "delete it"]),
        (b"\n <html>", ["HTML page"]),
        (make_tar({"a/001.Bird/x.jpg": picture()}), ["metadata.csv is not in it"]),
        (make_tar({"metadata.csv": METADATA.encode()}), ["no image with a label"]),
        (make_tar({f"{i}/001.Bird/x.jpg": picture() for i in range(2)}), ["'001.Bird/x.jpg' is there twice"]),
    ],
)
def test_a_bad_archive(mirror, content, words):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": content})
    refused(lambda: datasets.load("waterbirds", size=16), "waterbirds", *words)
    assert left_over() == []
    assert not list(paths.data_folder().parent.rglob("evil.jpg"))


def test_a_member_too_large_and_an_image_too_large(mirror, few, monkeypatch):
    bomb = io.BytesIO()
    Image.new("1", (400, 400)).save(bomb, "PNG")
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds(spoil={"a/001.Bird/b.png": bomb.getvalue()}))})
    for pixels, text in ((100_000, "too many pixels"), (50_000, "cannot be decoded")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
        refused(lambda: datasets.load("waterbirds", size=16), "001.Bird/b.png", text)
    monkeypatch.setattr(files, "LARGEST_MEMBER", 100)
    refused(lambda: datasets.load("waterbirds", size=16), "Bird_0000", "allowed: 100 bytes")
    monkeypatch.setattr(files, "MOST_MEMBERS", 3)
    monkeypatch.setattr(files, "LARGEST_MEMBER", 10**6)
    refused(lambda: datasets.load("waterbirds", size=16), "number 4", "3 members")


def test_a_full_disk_leaves_nothing(mirror, few, monkeypatch):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())})

    def full(*arguments, **columns):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", full)
        refused(lambda: datasets.load("waterbirds", size=16), "could not write", "No space left")
    assert left_over() == []
    with monkeypatch.context() as patched:
        patched.setattr(images, "decode", lambda *arguments, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            datasets.load("waterbirds", size=16)
    assert left_over() == []
    assert len(datasets.load("waterbirds", size=16).label) == 24


# ------------------------------------------------------------------------------------------------------------- editions
def test_an_unknown_file_until_it_is_accepted(mirror, few):
    folder = mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())}, edition="")
    words = ["no known edition", "resized-128", "--accept"]
    refused(lambda: datasets.fetch("waterbirds"), *words)
    assert not (paths.data_folder() / "waterbirds").exists()
    refused(lambda: files.accept(waterbirds.RECIPE, "mine"), "is not in")
    (paths.data_folder() / "waterbirds").mkdir(parents=True)
    path = paths.data_folder() / "waterbirds" / "waterbirds_v1.0.tar.gz"
    path.write_bytes((folder / path.name).read_bytes())
    refused(lambda: datasets.verify("waterbirds"), *words)
    refused(lambda: files.accept(waterbirds.RECIPE, "../x"), "'../x'")
    assert [archive.edition for archive in files.accept(waterbirds.RECIPE, "mine-16")] == ["mine-16"]
    assert datasets.load("waterbirds", size=16).edition == "mine-16 at 16x16"
    assert "edition mine-16" in datasets.verify("waterbirds")[0]
    path.write_bytes(path.read_bytes() + b"\0")
    refused(lambda: datasets.load("waterbirds", size=16), *words)
    path.write_bytes(PAGE)
    refused(lambda: files.accept(waterbirds.RECIPE, "mine-16"), "HTML page")


def test_the_mirror_is_not_needed_afterwards(mirror, few, monkeypatch):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())})
    datasets.fetch("waterbirds")
    monkeypatch.delenv("FAIRTUNING_MIRROR")
    assert datasets.load("waterbirds", size=16).edition == "tiny at 16x16"
    path = paths.data_folder() / "waterbirds" / "waterbirds_v1.0.tar.gz"
    os.utime(path, (1, 1))  # touched, not changed: the packed file is still its
    with monkeypatch.context() as patched:
        patched.setattr(images, "decode", None)
        datasets.load("waterbirds", size=16)
        patched.setattr(files, "sha256", None)  # and its new time is remembered
        datasets.load("waterbirds", size=16)
    for text in ("", "{}", "[1]", '[{"file": "x"}]'):
        (paths.data_folder() / "MANIFEST.json").write_text(text)
        os.utime(path, (2, 2))
        if text != "{}":
            refused(lambda: datasets.load("waterbirds", size=16), "MANIFEST.json", "sha256")


def test_two_packed_editions_without_their_archives(mirror, few):
    for edition, seed in (("one", 1), ("two", 2)):
        members = birds(spoil={"waterbirds_v1.0/002.Some Bird/Bird_0001_é.jpg": picture(100 + seed)})
        mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(members)}, edition=edition)
        datasets.load("waterbirds", size=16)
        (paths.data_folder() / "waterbirds" / "waterbirds_v1.0.tar.gz").unlink()
        if edition == "one":  # another folder's archive takes its place; the mirror has the other one
            here = files.find(waterbirds.RECIPE)
            assert here[0].edition == "one"
            here[0].path.unlink()
            packed = paths.data_folder() / "waterbirds" / "packed"
            packed.rename(packed.with_name("aside"))
    for path in (paths.data_folder() / "waterbirds" / "aside").iterdir():
        path.rename(paths.data_folder() / "waterbirds" / "packed" / path.name)
    refused(lambda: datasets.load("waterbirds", size=16), "several editions", "one, two")
    one, two = (datasets.load("waterbirds", size=16, edition=edition) for edition in ("one", "two"))
    assert one.digest != two.digest and not torch.equal(one.inputs[1], two.inputs[1])
    refused(lambda: datasets.load("waterbirds", size=24, edition="three"), "'three' is not here", "'two'")


def test_packed_files_that_are_changed(mirror, few):
    mirror("waterbirds", {"waterbirds_v1.0.tar.gz": make_tar(birds())})
    datasets.load("waterbirds", size=16)
    [pixels] = (paths.data_folder() / "waterbirds" / "packed").glob("*.npy")
    content = pixels.read_bytes()
    pixels.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(lambda: datasets.verify("waterbirds"), pixels.name, "is changed")
    pixels.write_bytes(content[:-100])
    refused(lambda: datasets.load("waterbirds", size=16), pixels.name, "cannot be read")
    pixels.with_suffix(".json").write_text("{")
    refused(lambda: datasets.load("waterbirds", size=16), "is not JSON", "delete it")
    pixels.with_suffix(".json").unlink()
    assert len(datasets.load("waterbirds", size=16).label) == 24  # made again
    datasets.verify("waterbirds")


# --------------------------------------------------------------------------------------------------------------- CelebA
ATTRIBUTES = ("Blond_Hair", "Male", "Wavy_Hair")


def faces(numbers=range(1, 13), listed=20):
    rows = [[1 if i >> bit & 1 else -1 for bit in range(3)] for i in range(listed)]
    attributes = [str(listed), " ".join(ATTRIBUTES) + " "]
    attributes += [f"{i + 1:06d}.jpg " + " ".join(f"{v:2d}" for v in row) for i, row in enumerate(rows)]
    partition = [f"{i + 1:06d}.jpg {i * 3 // 12 if i < 12 else 2}" for i in range(listed)]
    texts = {"list_attr_celeba.txt": attributes, "list_eval_partition.txt": partition}
    texts = {name: ("\r\n".join(lines) + "\r\n").encode() for name, lines in texts.items()}
    return {f"img_align_celeba/{i:06d}.jpg": picture(i, (16, 20)) for i in numbers}, texts


def test_celeba_official_layout(mirror):
    found, texts = faces()
    junk = {"__MACOSX/img_align_celeba/._000001.jpg": b"x", "img_align_celeba/.DS_Store": b"x"}
    mirror("celeba", {"img_align_celeba.zip": make_zip(found | junk)} | texts)
    data = datasets.load("celeba", size="20x16")
    assert data.inputs.shape == (12, 3, 20, 16) and torch.bincount(data.split).tolist() == [4, 4, 4]
    assert data.label.tolist() == [i & 1 for i in range(12)] and data.group.tolist() == [i >> 1 & 1 for i in range(12)]
    assert data.label_names == ("not Blond_Hair", "Blond_Hair") and data.group_names == ("not Male", "Male")
    other = datasets.load("celeba", label="Wavy_Hair", group="Blond_Hair", size="20x16")
    assert other.label.tolist() == [i >> 2 & 1 for i in range(12)] and torch.equal(other.group, data.label)
    assert other.digest == data.digest
    refused(lambda: datasets.load("celeba", label="Bald", size="20x16"), "label is 'Bald'", "Blond_Hair, Male")
    refused(lambda: datasets.load("celeba", group="Blond_Hair", size="20x16"), "both 'Blond_Hair'")


def test_celeba_subset_and_compact_layout(mirror, monkeypatch):
    found, texts = faces()
    chosen = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    monkeypatch.setattr(celeba, "numbers", lambda subset: np.array(chosen))
    celeba._subset.cache_clear()
    mirror("celeba", {"img_align_celeba.zip": make_zip(found)} | texts)
    data = datasets.load("celeba", subset="celeba-20000", size="20x16")
    celeba._subset.cache_clear()
    assert data.edition == "tiny-celeba-20000 at 20x16" and len(data.label) == 11
    assert len(datasets.load("celeba", size="20x16").label) == 12
    for path in (paths.data_folder() / "celeba").glob("*.*"):
        path.unlink()
    for path in (paths.data_folder() / "celeba" / "packed").glob("*.*"):
        path.unlink()
    folder = mirror("celeba", {"celeba.tar.gz": make_tar({f"celeba/{k}": v for k, v in (texts | found).items()})})
    (folder / "img_align_celeba.zip").unlink()
    assert torch.equal(datasets.load("celeba", size="20x16").label[1:], data.label)


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        ("list_attr_celeba.txt", "20\r\n", "21\r\n", ["20 rows", "21"]),
        ("list_attr_celeba.txt", "000002.jpg  1", "000002.jpg  2", ["attribute is 2", "-1, 1"]),
        ("list_attr_celeba.txt", "000002.jpg  1", "000002.jpg", ["cannot be read"]),
        ("list_attr_celeba.txt", "000002.jpg  1", "000002.jpg  x", ["cannot be read", "'x'"]),
        ("list_eval_partition.txt", "000002.jpg 0", "000002.jpg 3", ["partition is 3"]),
        ("list_eval_partition.txt", "000002.jpg 0\r\n", "", ["does not name 000002.jpg"]),
    ],
)
def test_celeba_bad_lists(mirror, file, old, new, words):
    found, texts = faces()
    assert old in texts[file].decode()
    texts[file] = texts[file].decode().replace(old, new, 1).encode()
    mirror("celeba", {"img_align_celeba.zip": make_zip(found)} | texts)
    refused(lambda: datasets.load("celeba", size="20x16"), "celeba", *words)
    assert left_over() == []


def test_celeba_by_hand(mirror, folders, monkeypatch):
    refused(lambda: datasets.fetch("celeba"), "img_align_celeba.zip", "agreement", "mmlab", "no redistribution")
    found, texts = faces()
    folder = folders / "data" / "celeba"
    folder.mkdir(parents=True)
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    refused(lambda: datasets.fetch("celeba"), "img_align_celeba.zip", "agreement")
    (folder / "img_align_celeba.zip").write_bytes(PAGE)
    refused(lambda: datasets.fetch("celeba"), "img_align_celeba.zip is an HTML page", "quota page", "a day later")
    # the official files are known by the MD5 that is published
    content = make_zip(found)
    (folder / "img_align_celeba.zip").write_bytes(content)
    refused(lambda: datasets.fetch("celeba"), "no known edition (official)")
    known = {
        k: {hashlib.md5(v).hexdigest(): "official"} for k, v in (texts | {"img_align_celeba.zip": content}).items()
    }
    monkeypatch.setattr(celeba, "RECIPE", replace(celeba.RECIPE, known=known))
    assert datasets.load("celeba", size="20x16").edition == "official at 20x16"


def test_the_committed_numbers():
    numbers = celeba.numbers("celeba-20000")
    assert len(numbers) == 20_000 and numbers[0] == 34 and numbers[-1] == 202_599 and (np.diff(numbers) > 0).all()
    refused(lambda: celeba.numbers("celeba-2"), "'celeba-2'", "celeba-20000")


# -------------------------------------------------------------------------------------------------------------- UTKFace
def utk_faces():
    """40 faces of all ages, genders and races, five names with a fault, and one picture under three names."""
    names = [f"{20 + i}_{i % 2}_{i % 5}_201701161{i:08d}.jpg.chip.jpg" for i in range(40)]
    members = {f"UTKFace/{name}": picture(i, (20, 20)) for i, name in enumerate(names)}
    members |= {f"UTKFace/{age}_1_2_20170116000000000.jpg.chip.jpg": picture(99, (20, 20)) for age in (1, 50, 90)}
    odd = ["24_0_1_2017011622 .jpg.chip.jpg", "55_0_0_20170116232725357jpg.chip.jpg"]  # a date of any kind will do
    bad = ["39_1_20170116174525125.jpg.chip.jpg", "61_3_1_20170109142408075.jpg.chip.jpg", "x.jpg"]
    return members | {f"UTKFace/{name}": picture(200 + i, (20, 20)) for i, name in enumerate(odd + bad)}


def test_utkface(mirror):
    members = utk_faces()
    mirror("utkface", {"UTKFace.tar.gz": make_tar(members)})
    data = datasets.load("utkface", size=16)
    assert len(data.label) == 45 and "3 of 48 images left out" in data.notes[0] and "39_1_2017" in data.notes[0]
    names = [name for name in members if not any(bad in name for bad in ("/39_1_201", "/61_3_1", "/x.jpg"))]
    ages = torch.tensor([int(name.split("/")[1].split("_")[0]) for name in names])
    bound = int(ages[data.split == 0].median())
    assert data.label.tolist() == (ages >= bound).long().tolist() and data.label_names[1] == f"{bound} or older"
    copies = data.split[(data.inputs == data.inputs[40]).flatten(1).all(1)]
    assert len(copies) == 3 and len(copies.unique()) == 1
    by_race = datasets.load("utkface", label="gender", group="race", size=16)
    assert by_race.group_names == utkface.RACES and by_race.group[:7].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert by_race.label[:4].tolist() == [0, 1, 0, 1] and torch.equal(by_race.split, data.split)
    white = datasets.load("utkface", label="age>=30", group="white", size=16)
    assert white.group[:7].tolist() == [1, 0, 0, 0, 0, 1, 0] and white.label_names == ("under 30", "30 or older")
    assert not torch.equal(datasets.load("utkface", size=16, split_seed=1).split, data.split)
    refused(lambda: datasets.load("utkface", label="age"), "label is 'age'", "age>=median")
    refused(lambda: datasets.load("utkface", group="age"), "group is 'age'", "gender, race, white")
    refused(lambda: datasets.load("utkface", label="race", group="race"), "both 'race'")
    refused(lambda: datasets.load("utkface", label="age>=999", size=16), "no example with label '999 or older'")


def test_utkface_splits_by_name_whatever_the_order_and_the_size(mirror, folders, monkeypatch):
    def splits(members):
        data = images.read(utkface.RECIPE, size=16).columns
        split = images.random_split(data["name"], data["content"], shares=(0.7, 0.1, 0.2))
        return dict(zip(data["name"].tolist(), split.tolist(), strict=True))

    found = []
    for i, members in enumerate((utk_faces(), dict(reversed(utk_faces().items())))):
        monkeypatch.setenv("FAIRTUNING_DATA", str(folders / f"data {i}"))
        mirror("utkface", {"UTKFace.tar.gz": make_tar(members)})
        found.append(splits(members))
    assert found[0] == found[1]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=300), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_random_split(content, seed):
    names = np.array([f"{i:03d}" for i in range(len(content))])
    content = np.array(content)
    split = images.random_split(names, content, shares=(0.7, 0.1, 0.2), seed=seed).numpy()
    for value in set(content.tolist()):
        assert len(set(split[content == value])) == 1
    order = np.random.default_rng(seed).permutation(len(names))
    again = images.random_split(names[order], content[order], shares=(0.7, 0.1, 0.2), seed=seed).numpy()
    assert np.array_equal(again, split[order])


def test_random_split_shares():
    names = np.array([f"{i:05d}" for i in range(10_000)])
    split = images.random_split(names, np.arange(10_000), shares=(0.7, 0.1, 0.2))
    assert torch.bincount(split).tolist() == [7000, 1000, 2000]


# ------------------------------------------------------------------------------------------------------------- Aircraft
def aircraft_members(spoil=None):
    root = "fgvc-aircraft-2013b/data/"
    members, lists = {}, {}
    for i in range(12):
        array = np.full((50, 60, 3), 20 * i, dtype=np.uint8)
        array[-20:] = 255  # the banner
        Image.fromarray(array).save(file := io.BytesIO(), "JPEG", quality=95)
        members[f"{root}images/{i:07d}.jpg"] = file.getvalue()
        values = {"variant": f"707-{i % 3}20", "family": "Boeing 707", "manufacturer": "Boeing" if i % 3 else "ATR"}
        for level, value in values.items():
            part = aircraft.PARTS[i // 3 % 3 if i < 9 else 0]
            lists.setdefault(f"images_{level}_{part}.txt", []).append(f"{i:07d} {value}")
    members |= {root + name: ("\n".join(lines) + "\n").encode() for name, lines in lists.items()}
    members[root + "variants.txt"] = b"707-320\n"
    return members | (spoil or {})


def test_aircraft(mirror):
    mirror("aircraft", {"fgvc-aircraft-2013b.tar.gz": make_tar(aircraft_members())})
    data = datasets.load("aircraft", size=30)
    assert data.label_names == ("707-020", "707-120", "707-220") == data.group_names
    assert torch.equal(data.label, data.group) and data.label.tolist() == [0, 1, 2] * 4
    assert torch.bincount(data.split).tolist() == [6, 3, 3]
    assert [int(data.inputs[i].float().mean()) for i in range(12)] == pytest.approx([20 * i for i in range(12)], abs=2)
    by_maker = datasets.load("aircraft", label="manufacturer", size=30)
    assert by_maker.label_names == ("ATR", "Boeing") and by_maker.label[:3].tolist() == [0, 1, 1]
    assert datasets.load("aircraft", group="manufacturer", size=30).group_names == ("ATR", "Boeing")
    refused(lambda: datasets.load("aircraft", label="colour", size=30), "'colour'", "variant, family, manufacturer")


@pytest.mark.parametrize(
    "file, old, new, words",
    [
        ("images_variant_train.txt", "0000000 707-020\n", "", ["0000000 has no variant"]),
        ("images_variant_train.txt", "0000000 707-020", "0000000", ["line 1", "expected an image and its variant"]),
        ("images_family_val.txt", "0000003", "0000000", ["line 1", "0000000 is in two parts"]),
        (None, None, None, ["9999999 has no label", "1 faulty image:"]),
    ],
)
def test_aircraft_bad_lists(mirror, file, old, new, words):
    members = aircraft_members({} if file else {"fgvc-aircraft-2013b/data/images/9999999.jpg": picture()})
    if file:
        name = f"fgvc-aircraft-2013b/data/{file}"
        assert old.encode() in members[name]
        members[name] = members[name].decode().replace(old, new, 1).encode()
    mirror("aircraft", {"fgvc-aircraft-2013b.tar.gz": make_tar(members)})
    refused(lambda: datasets.load("aircraft", size=30), *words)
    if not file:
        assert len(datasets.load("aircraft", size=30, faulty="skip").label) == 12


# ---------------------------------------------------------------------------------------------------------------- GeoDE
def objects(spoil=None, region=""):
    regions = ["Africa", "Americas", "EastAsia", "Europe", "SouthEastAsia", "WestAsia"]
    lines, members = ["file_path,object,region,ip_country"], {}
    for i in range(24):
        name = f"country_{i}/plate of food_{i}.jpg" if i % 2 else f"hat_{i}.JPEG"
        lines.append(f"{name},{'plate_of_food' if i % 2 else 'hat'},{region or regions[i % 6]},Nowhere")
        members[f"geode/images/{name}"] = picture(i, mode=("RGB", "L", "CMYK")[i % 3])
    members |= {"__MACOSX/geode/images/._hat_0.JPEG": b"junk", "geode/readme.txt": b""} | (spoil or {})
    return members | {"geode/index.csv": "\n".join(lines).encode()}


def test_geode(mirror):
    mirror("geode", {"geode.zip": make_zip(objects())})
    data = datasets.load("geode", size=16)
    assert data.label_names == ("hat", "plate of food") and data.label.tolist() == [0, 1] * 12
    assert data.group.tolist() == [0, 1, 2, 3, 4, 5] * 4
    assert torch.bincount(data.split).tolist() == [17, 2, 5]
    assert data.digest == datasets.load("geode", size=16).digest


@pytest.mark.parametrize(
    "members, words",
    [
        (objects(region="Oceania"), ["line 2", "region 'Oceania'", "WestAsia"]),
        (objects({"geode/images/new.jpg": picture()}), ["new.jpg has no label"]),
        (objects({"geode/images/hat_0.JPEG": b"\xff\xd8 no"}), ["hat_0.JPEG cannot be decoded", "1 faulty image:"]),
        ({k: v.replace(b"object", b"thing") for k, v in objects().items()}, ["no column object"]),
        ({k: v.replace(b"hat_0.JPEG,hat,", b"hat_0.JPEG,,") for k, v in objects().items()}, ["line 2", "no object"]),
    ],
)
def test_geode_bad_archive(mirror, members, words):
    mirror("geode", {"geode.zip": make_zip(members)})
    refused(lambda: datasets.load("geode", size=16), "geode", *words)
    assert left_over() == []


# -------------------------------------------------------------------------------------------------------------- by HTTP
@pytest.fixture
def server(folders, monkeypatch):
    """Answers with ``content``; ``behaviour`` says how badly. What was asked for, with its range, is in ``asked``."""
    content = make_zip(objects({"geode/readme.txt": bytes(10**6)}))
    state = {"content": content, "behaviour": "well", "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            start = int(self.headers.get("Range", "bytes=0-")[6:-1])
            state["asked"].append((self.path, start))
            content, behaviour = state["content"], state["behaviour"]
            if behaviour == "page":
                content, start = PAGE, 0
            if behaviour == "no ranges":
                start = 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(404 if behaviour == "missing" else 206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = start + (len(content) - start) // 2 if behaviour == "breaks off" else len(content)
            self.wfile.write(content[start:end])

        def log_message(self, *arguments):
            pass

    here = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the pause between attempts
    monkeypatch.setitem(
        datasets.source("geode").call("RECIPE").address, "geode.zip", f"http://127.0.0.1:{here.server_port}/geode.zip"
    )
    yield state
    here.shutdown()
    thread.join()
    here.server_close()


def test_a_download_goes_on_where_it_broke_off(server):
    server["behaviour"] = "breaks off"
    for _ in range(2):
        refused(lambda: datasets.fetch("geode"), "geode.zip", "go on from there")
    server["behaviour"] = "well"
    [path] = datasets.fetch("geode")
    assert path.read_bytes() == server["content"] and left_over() == []
    starts = [start for _, start in server["asked"]]
    assert starts[0] == 0 < starts[1] < starts[2]
    assert datasets.load("geode", size=16).edition == "official at 16x16"
    datasets.fetch("geode")
    assert len(server["asked"]) == len(starts)


def test_two_that_fetch_at_once_fetch_once(server):
    with ThreadPoolExecutor(2) as pool:
        found = [job.result() for job in [pool.submit(datasets.fetch, "geode") for _ in range(2)]]
    assert found[0] == found[1] and found[0][0].read_bytes() == server["content"] and len(server["asked"]) == 1


def test_a_server_without_ranges(server):
    server["behaviour"] = "breaks off"
    refused(lambda: datasets.fetch("geode"), "go on from there")
    server["behaviour"] = "no ranges"
    [path] = datasets.fetch("geode")
    assert path.read_bytes() == server["content"]


def test_a_page_or_nothing_instead(server, monkeypatch):
    server["behaviour"] = "page"
    refused(lambda: datasets.fetch("geode"), "http://127.0.0.1", "HTML page")
    server["behaviour"] = "missing"
    refused(lambda: datasets.fetch("geode"), "could not fetch", "HTTPError", "FAIRTUNING_MIRROR")
    assert left_over() == [] and not (paths.data_folder() / "geode" / "geode.zip").exists()
    part = paths.data_folder() / "geode" / "geode.zip.part"
    part.write_bytes(bytes(10**7))  # something else's: longer than the file
    refused(lambda: datasets.fetch("geode"), "try again")
    server["behaviour"] = "well"
    datasets.fetch("geode")


def test_a_mirror_address(server, monkeypatch, mirror):
    address = datasets.source("geode").call("RECIPE").address["geode.zip"].rsplit("/", 1)[0]
    monkeypatch.setenv("FAIRTUNING_MIRROR", address + "/")
    refused(lambda: datasets.fetch("geode"), f"{address}/geode/geode.zip", "no known edition")
    assert left_over() == []
    server["behaviour"] = "missing"
    refused(lambda: datasets.fetch("celeba"), "img_align_celeba.zip", "celeba.tar.gz", "HTTPError")


# -------------------------------------------------------------------------------------------------------------- scripts
@pytest.mark.parametrize("name", ["waterbirds", "celeba", "utkface", "aircraft", "geode"])
def test_scripts(mirror, few, monkeypatch, capsys, name):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data_scripts"))
        with pytest.raises(SystemExit) as status:
            runpy.run_path(str(Path(__file__).parents[1] / "data_scripts" / f"{name}.py"), run_name="__main__")
        return status.value.code, *capsys.readouterr()

    with monkeypatch.context() as patched:  # "--verify" fetches nothing
        patched.setattr(files, "_download", None)
        code, out, error = run("--verify")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and name in error
    found, texts = faces()
    mirror(
        name,
        {
            "waterbirds": {"waterbirds_v1.0.tar.gz": make_tar(birds())},
            "celeba": {"img_align_celeba.zip": make_zip(found)} | texts,
            "utkface": {"UTKFace.tar.gz": make_tar(utk_faces())},
            "aircraft": {"fgvc-aircraft-2013b.tar.gz": make_tar(aircraft_members())},
            "geode": {"geode.zip": make_zip(objects())},
        }[name],
    )
    code, out, error = run("--pack", "16")
    assert code == 0 and "tiny at 16x16" in out and "as packed" in out and "training" in out
    code, out, _ = run("--verify", "--accept", "mine")
    assert code == 0 and "edition tiny" in out  # what is known already keeps its name
    assert run("--pack", "x")[0] == 2


# -------------------------------------------------------------------------------------------------- the real editions
real = pytest.mark.skipif(
    not MIRROR or "://" in MIRROR, reason="FAIRTUNING_MIRROR names no folder with the image archives"
)


def real_members(origin, most=8):
    """(edition, all image names, lists, the first images) of an archive of the mirror, without packing it."""
    path = Path(MIRROR) / origin.name / origin.sets[-1 if origin.name == "celeba" else 0][0]
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    names, texts, contents, first = [], {}, [], []
    for name, content in files.members(path):
        if name.endswith(".jpg"):
            names.append(PurePosixPath(name))
            contents.append(hashlib.sha256(content()).digest() if origin.name == "utkface" else None)
            if len(first) < most:
                first.append(images.decode(content(), (64, 48)))
        else:
            texts[PurePosixPath(name).name] = content().decode()
    return files.identify(origin, path).edition, names, texts, contents, first


@real
def test_real_waterbirds():
    edition, names, texts, _, first = real_members(waterbirds.RECIPE)
    assert edition == "resized-128" and len(first) == 8
    listed, columns = waterbirds._labels(texts, [])
    assert set(listed) == {waterbirds.RECIPE.image(name) for name in names} and len(listed) == len(names) == 11_788
    cells = np.bincount(4 * columns["split"] + 2 * columns["label"] + columns["group"]).reshape(3, 4)
    assert cells.tolist() == [list(counts) for counts in waterbirds.COUNTS.values()]


@real
def test_real_celeba():
    edition, names, texts, _, _ = real_members(celeba.RECIPE)
    assert edition == "resized-64-20000"
    assert sorted(int(name.stem) for name in names) == celeba.numbers("celeba-20000").tolist()
    for file in celeba.TEXTS:
        assert hashlib.md5(texts[file].encode()).hexdigest() in celeba.RECIPE.known[file]
    listed, columns = celeba._labels(texts, [])
    assert len(listed) == 202_599 and np.bincount(columns["split"]).tolist() == [162_770, 19_867, 19_962]
    cells = 2 * (columns["Blond_Hair"] > 0) + (columns["Male"] > 0)
    assert np.bincount(cells[columns["split"] == 0]).tolist() == [71_629, 66_874, 22_880, 1_387]


@real
def test_real_utkface():
    edition, names, _, contents, _ = real_members(utkface.RECIPE)
    listed, columns = utkface._labels({}, [name.name for name in names])
    assert edition == "resized-112" and len(names) == 23_708 and len(listed) == 23_705
    assert columns["age"].min() == 1 and columns["age"].max() == 116
    assert len(contents) - len(set(contents)) == 390  # copies of another file
