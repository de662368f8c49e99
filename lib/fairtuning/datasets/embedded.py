"""Data for the classroom: generated or shipped with scikit-learn, the same from the same seed, no network.

They are teaching material. Nothing measured on them says anything about a paper's data.
"""

import hashlib
import json

import numpy as np

from fairtuning.datasets import DataError, GroupedData, check_choice

SPLITS = ("pretraining", "training", "validation", "test")
GROUNDS = (230, 159, 0), (0, 114, 178)  # orange and blue that colour-blind readers tell apart


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def census(*, n: int = 6000, bias: float = 1.0, seed: int = 0, split_seed: int = 0) -> GroupedData:
    """A synthetic census: who earns "high", given eight attributes, in two groups A and B.

    Latent skill is normal and equally distributed in both groups. Four attributes are noisy readings of skill, two
    are proxies of the group, two are noise. The label is drawn from
    ``logit P(high) = 2 skill - 1.2 + bias (group - 1/2)``: at ``bias = 0`` both groups have the same rate of "high"
    labels, and a larger ``bias`` is a larger unjust gap in the labels themselves. inputs ``[n, 8]`` float64.
    """
    if n < 100:
        raise DataError(f"n is {n}; a census needs at least 100 examples")
    rng = np.random.default_rng(seed)
    group = (rng.random(n) < 0.6).astype(np.int64)
    skill = rng.normal(size=n)
    readings = skill[:, None] + rng.normal(scale=0.8, size=(n, 4))
    proxies = (group[:, None] - 0.5) * np.array([2.0, 1.0]) + rng.normal(size=(n, 2))
    noise = rng.normal(size=(n, 2))
    chance = 1 / (1 + np.exp(-(2 * skill - 1.2 + bias * (group - 0.5))))
    label = (rng.random(n) < chance).astype(np.int64)
    inputs = np.concatenate([readings, proxies, noise], axis=1)
    split = np.searchsorted(np.array([0.40, 0.66, 0.77]), (np.arange(n) + 0.5) / n, side="right")
    split = split[np.random.default_rng([split_seed, 1]).permutation(n)]
    kinds = ("test score", "schooling", "reference", "interview", "district", "club", "noise 1", "noise 2")
    made = "census", "synthetic", _digest("census", 1, n, bias, seed, split_seed), inputs
    named = {"label": (label, ("low", "high")), "group": (group, ("A", "B")), "split": (split, SPLITS)}
    return GroupedData.of(*made, **named, feature_names=kinds)


def digits(*, alignment: float = 0.9, seed: int = 0, split_seed: int = 0) -> GroupedData:
    """scikit-learn's 1,797 digits (8 x 8 grey levels 0 to 16) on one of two backgrounds.

    The background, plain or bright in its lower half, is the group. Among pre-training, training and validation images
    even digits lie on the plain one with probability ``alignment`` and odd digits on the bright one, so that the
    background is a shortcut to the digit's parity; every test image appears twice, once on each background.
    inputs ``[N, 64]`` float64 in [0, 1], label = the digit.
    """
    images, label, split = _read_digits(alignment, split_seed)
    rng = np.random.default_rng(seed)
    group = (label % 2) ^ (rng.random(len(label)) >= alignment)
    test = np.flatnonzero(split == 3)
    images = np.concatenate([images, images[test]])
    label = np.concatenate([label, label[test]])
    split = np.concatenate([split, split[test]])
    group = np.concatenate([group, 1 - group[test]])
    bright = np.zeros((8, 8))
    bright[4:] = 8.0
    images = np.maximum(images, group[:, None] * bright.reshape(1, 64))
    made = "digits", "background-shortcut", _digest("digits", 1, alignment, seed, split_seed), images / 16.0
    return GroupedData.of(*made, label=(label, range(10)), group=(group, ("plain", "bright")), split=(split, SPLITS))


def parity(*, label: str = "parity", alignment: float = 0.95, seed: int = 0, split_seed: int = 0) -> GroupedData:
    """scikit-learn's 1,797 digits, even or odd, each on an orange or a blue ground.

    The ground is the group. Among the training images even digits lie on orange with probability ``alignment``, odd
    ones on blue: the ground is a shortcut to the label. Every other image appears twice, once on each ground.
    ``label`` is "parity", or "digit" for the digit itself. inputs ``[N, 3, 8, 8]`` uint8, ink white.
    """
    check_choice("label", label, ("parity", "digit"))
    images, digit, split = _read_digits(alignment, split_seed)
    group = (digit % 2) ^ (np.random.default_rng(seed).random(len(digit)) >= alignment)
    twins = np.flatnonzero(split != SPLITS.index("training"))
    index = np.concatenate([np.arange(len(digit)), twins])
    digit, split, group = digit[index], split[index], np.concatenate([group, 1 - group[twins]])
    ink = images[index].reshape(-1, 1, 8, 8) / 16
    pixels = 255 * ink + (1 - ink) * np.array(GROUNDS)[group][:, :, None, None]
    made = "parity", "coloured-ground", _digest("parity", 1, label, alignment, seed, split_seed)
    labels = (digit % 2, ("even", "odd")) if label == "parity" else (digit, range(10))
    inputs, grounds = pixels.round().astype(np.uint8), ("orange", "blue")
    return GroupedData.of(*made, inputs, label=labels, group=(group, grounds), split=(split, SPLITS))


def _read_digits(alignment: float, split_seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images ``[1797, 64]`` (0 to 16), digits and splits, for a habit of strength ``alignment``."""
    if not 0.5 <= alignment <= 1:
        raise DataError(f"alignment is {alignment}; allowed: 0.5 (no shortcut) to 1")
    from sklearn.datasets import load_digits

    images, digit = load_digits(return_X_y=True)
    order = np.random.default_rng([split_seed, 1]).permutation(len(digit))
    split = np.empty(len(digit), dtype=np.int64)
    split[order] = np.searchsorted(np.array([0.40, 0.66, 0.77]), (np.arange(len(digit)) + 0.5) / len(digit), "right")
    return images, digit, split
