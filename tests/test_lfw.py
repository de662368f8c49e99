"""LFW: the official layout and the compact one, odd entries of their lists, a split that keeps people together."""

import io
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtuning import datasets
from fairtuning.datasets import lfw
from test_images import make_tar, mirror, picture, refused  # noqa: F401  (mirror is a fixture)

PEOPLE = {"Ann_Lee": 3, "Bo": 1, "Cy_Day": 2, "Di": 1, "Ed": 1, "Flo": 1, "Gil": 1, "Hans": 1, "Ida": 1, "Jo": 1}
PEOPLE |= dict.fromkeys(("Kim", "Lou", "Mo", "Ned"), 1)
NAMES = [f"{person}_{number:04d}.jpg" for person, count in PEOPLE.items() for number in range(1, count + 1)]
WOMEN = {"Ann_Lee", "Di", "Flo", "Ida"}
FEMALE = [name for name in NAMES if name.rsplit("_", 1)[0] in WOMEN]
MALE = [name for name in NAMES if name not in FEMALE]
MAKEUP = {name: i % 3 == 0 for i, name in enumerate(NAMES)}
WITHOUT = "Jo_0001.jpg"  # has no attributes


def lists(*, female=FEMALE, male=MALE):
    both = {"male_names.txt": male, "female_names.txt": female}
    return {name: "\r\n".join([*lines, ""]).encode() for name, lines in both.items()}


def faces():
    return {f"lfw-deepfunneled/{n.rsplit('_', 1)[0]}/{n}": picture(i, (30, 30)) for i, n in enumerate(NAMES)}


def values():
    lines = ["# LFW attributes", "#\tperson\timagenum\tHeavy Makeup\t5 o' Clock Shadow"]
    for name in NAMES:
        person, number = name.removesuffix(".jpg").rsplit("_", 1)
        if name != WITHOUT:
            lines.append(f"{person.replace('_', ' ')}\t{int(number)}\t{0.7 if MAKEUP[name] else -0.2}\t-1.5")
    return "\n".join([*lines, ""]).encode()


def booleans(**changed):
    rows = [name for name in NAMES if name != WITHOUT]
    arrays = {
        "attrname": np.array([b"5 o' Clock Shadow", b"Heavy Makeup"]),
        "data": np.array([[False, MAKEUP[name]] for name in rows]),
    }
    np.savez(file := io.BytesIO(), **arrays | changed)
    members = {"lfw_binary_attributes2.npz": file.getvalue(), "filelist.txt": "\n".join(f"lfw/x/{n}" for n in rows)}
    return {name: text if isinstance(text, bytes) else text.encode() for name, text in members.items()}


def compact(**changed):
    members = faces() | {f"lfw-annotations/{k}": v for k, v in (lists() | booleans() | changed).items() if v}
    return {"lfw-deepfunneled.tar.gz": make_tar(members)}


def official(**changed):
    return {"lfw-deepfunneled.tgz": make_tar(faces()), "lfw_attributes.txt": values()} | lists() | changed


@pytest.mark.parametrize("layout", [official, compact])
def test_both_layouts_give_the_same(mirror, layout):  # noqa: F811
    mirror("lfw", layout())
    data = datasets.load("lfw", size=16)
    kept = sorted(name for name in NAMES if name != WITHOUT)
    assert data.edition == "tiny at 16x16" and data.inputs.shape == (len(kept), 3, 16, 16)
    order = [NAMES.index(name) for name in NAMES if name != WITHOUT]  # that of the archive
    assert data.label.tolist() == [int(NAMES[i] in FEMALE) for i in order]
    assert data.group.tolist() == [int(MAKEUP[NAMES[i]]) for i in order]
    assert data.label_names == ("male", "female") and data.group_names == ("not Heavy_Makeup", "Heavy_Makeup")
    assert data.notes == (f"1 of 17 images left out: {lfw.RECIPE.unlabelled} ({WITHOUT})",)
    other = datasets.load("lfw", label="Heavy_Makeup", group="gender", size=16)
    assert torch.equal(other.label, data.group) and other.digest == data.digest
    assert torch.equal(other.split, data.split)
    refused(lambda: datasets.load("lfw", label="Bald", size=16), "label is 'Bald'", "5_o'_Clock_Shadow, Heavy_Makeup")
    refused(lambda: datasets.load("lfw", label="gender", group="gender", size=16), "both 'gender'")


def test_nobody_of_open_gender_is_kept(mirror):  # noqa: F811
    mirror("lfw", compact(**lists(female=[*FEMALE, "Bo_0001.jpg"], male=[name for name in MALE if "Gil" not in name])))
    data = datasets.load("lfw", size=16)  # Bo is in both lists, Gil in neither
    assert len(data.label) == 14 and "3 of 17 images left out" in data.notes[0] and "Bo_0001.jpg" in data.notes[0]


@pytest.mark.parametrize(
    "content, words",
    [
        (lambda: compact(**{"filelist.txt": b""}), ["neither lfw_attributes.txt nor filelist.txt"]),
        (lambda: compact(**{"lfw_binary_attributes2.npz": b"PK nothing"}), ["npz cannot be read"]),
        (lambda: compact(**booleans(data=np.zeros((3, 2), dtype=bool))), ["holds bool (3, 2)", "(16, 2)"]),
        (lambda: compact(**booleans(attrname=np.array([None, None]))), ["npz cannot be read"]),  # a pickle
        (lambda: compact(**{"male_names.txt": b""}), ["male_names.txt is not in it"]),
        (lambda: official(**{"lfw_attributes.txt": b"a\nb\n"}), ["line 2 begins with ['b']"]),
        (lambda: official(**{"lfw_attributes.txt": values().replace(b"-1.5", b"high", 1)}), ["cannot be read", "high"]),
        (lambda: official(**{"lfw_attributes.txt": values() + b"Bo\t2\t1\t1\n"} | lists(male=[*MALE, "Bo_0002.jpg"])),
         ["Bo_0002.jpg is listed and not there"]),
    ],
)  # fmt: skip
def test_bad_lists_are_one_line(mirror, content, words):  # noqa: F811
    mirror("lfw", content())
    refused(lambda: datasets.load("lfw", size=16), "lfw", *words)


def test_nothing_is_fetched(folders):
    refused(lambda: datasets.fetch("lfw"), "lfw-deepfunneled.tgz + lfw_attributes.txt", "for research", "that folder")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=40), st.integers(0, 3), st.floats(0, 1), st.floats(0, 1))
def test_people_stay_together(counts, seed, first, second):
    """Sizes are exact as long as somebody with one image is left to fill a part, and never exceeded."""
    names = [f"P{p}_Q_{i:04d}.jpg" for p, count in enumerate(counts) for i in range(count)]
    first = int(first * len(names))
    sizes = (first, int(second * (len(names) - first)), 0)
    part = lfw.split_people(names, sizes, seed=seed)
    person = np.repeat(np.arange(len(counts)), counts)
    own = [set(part[person == p].tolist()) for p in range(len(counts))]
    assert all(len(parts) == 1 for parts in own)
    for number, size in enumerate(sizes[:2]):
        found = int((part == number).sum())
        left = [p for p, count in enumerate(counts) if count == 1 and max(own[p]) > number]
        assert found == size or (found < size and not left)
    shuffled = np.random.default_rng(0).permutation(len(names))  # the order of the archive plays no role
    assert torch.equal(lfw.split_people([names[i] for i in shuffled], sizes, seed=seed), part[shuffled])


@pytest.mark.skipif(
    not os.path.isfile(os.path.join(os.environ.get("FAIRTUNING_MIRROR", ""), "lfw", "lfw-deepfunneled.tar.gz")),
    reason="FAIRTUNING_MIRROR names no folder with LFW",
)
def test_the_real_edition():
    """The sizes of arXiv 2403.00625, less the eight images of open gender in the test part."""
    data = datasets.load("lfw")
    assert data.edition == "resized-80-boolean at 80x80" and len(data.label) == 13_143 - 8
    assert torch.bincount(data.split).tolist() == [6885, 1000, 5258 - 8]
    assert torch.bincount(2 * data.label + data.group).tolist() == [10_152, 29, 1_954, 1_000]
    assert data.digest == datasets.images.digest_of(lfw.RECIPE, "resized-80-boolean", size=80)


def test_the_script(mirror, monkeypatch, capsys):  # noqa: F811
    mirror("lfw", compact())
    scripts = Path(__file__).parents[1] / "data_scripts"
    monkeypatch.syspath_prepend(str(scripts))
    monkeypatch.setattr(sys, "argv", ["lfw", "--pack", "16"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(scripts / "lfw.py"), run_name="__main__")
    assert status.value.code == 0 and "lfw: tiny at 16x16" in capsys.readouterr().out
