"""Frozen features of a backbone, computed once and kept in the data folder as a memory-mapped file (never committed).

A head on frozen features trains in seconds, so the one pass through the backbone is what costs. It is made once per
data (its digest, which holds edition and size), backbone, weights, view and precision; each later call maps the file,
in milliseconds, and needs neither the backbone nor its weights.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fairtuning.datasets import GroupedData, files
from fairtuning.paths import data_folder
from fairtuning.vision import backbones, network
from fairtuning.vision.backbones import FILES, BackboneError, find, read

#: Raised by hand when the features of a backbone change their meaning, so that older files are made again.
VERSION = 1
#: "mirrored": every image flipped left to right, for averages or for twice as many examples.
VIEWS = ("plain", "mirrored")
#: Of autocast, and what the file holds: float16 has three bits more than bfloat16, and half the bytes of float32.
PRECISIONS = {"bfloat16": torch.float16, "float32": torch.float32}
#: A ResNet-18 without its last stage: 256 features at a sixteenth of the size, averaged. Its full weights are timm's.
STAGES = "resnet18.tv_in1k.stages1-3"


def load(
    data: GroupedData,
    backbone: str = "vit-tiny",
    *,
    weights: str | Path = "pretrained",
    view: str = "plain",
    precision: str = "bfloat16",
    device: str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """What ``backbone`` gives for each image of ``data``, pooled, without a head: ``[N, d]`` in the order of ``data``.

    float16 where ``precision`` is "bfloat16", else float32; memory-mapped, and never to be written to. ``backbone`` is
    a name of ``backbones.load`` or ``STAGES``, ``weights`` "pretrained", "random" (seed 0) or a file, ``view`` one of
    VIEWS. The images go in at the size that ``data`` has them. ``device`` and ``batch_size`` change rounding alone.

    Raises BackboneError, in one line, for a view or precision that there is not, and what ``backbones.load`` raises;
    DataError for data that are no images or a file that is not what it should be.
    """
    for value, allowed, what in ((view, VIEWS, "view"), (precision, tuple(PRECISIONS), "precision")):
        if value not in allowed:
            raise BackboneError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
    if data.inputs.dtype != torch.uint8 or data.inputs.ndim != 4 or data.inputs.shape[1] != 3:
        raise BackboneError(
            f"inputs of {data.name} are {data.inputs.dtype} {list(data.inputs.shape)}; allowed: images, uint8 "
            "[N, 3, height, width]"
        )
    height, width = data.inputs.shape[-2:]
    name = backbones.BACKBONES.get(backbone, backbone)
    facts = {
        "data": data.name,
        "edition": data.edition,
        "digest": data.digest,
        "images": len(data.inputs),
        "size": [height, width],
        "backbone": name,
        "weights": weights_digest(backbone, weights),
        "view": view,
        "precision": precision,
        "version": VERSION,
    }
    mark = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    path = data_folder() / data.name / "features" / f"{name}-{height}x{width}-{mark}.npy"
    if not path.is_file():
        _write(path, facts, lambda: _compute(data, backbone, weights, view, precision, device, batch_size))
    try:
        # Copy on write: torch wants memory it may write to, and the file must never change.
        found = torch.from_numpy(np.load(path, mmap_mode="c"))
    except (OSError, ValueError, EOFError) as error:
        raise BackboneError(f"{path} cannot be read ({error}); delete it and load again") from None
    if found.ndim != 2 or len(found) != len(data.inputs) or found.dtype != PRECISIONS[precision]:
        raise BackboneError(f"{path} holds {found.dtype} {list(found.shape)}; delete it and load again")
    return found


def weights_digest(backbone: str, weights: str | Path = "pretrained") -> str:
    """SHA-256 of the weights' file, or "random". Where it is published neither the file nor a network is needed."""
    name = backbones.BACKBONES.get(backbone, backbone)
    if weights == "random":
        return "random"
    if weights != "pretrained":
        return files.sha256(Path(weights))
    if name in FILES:
        return FILES[name][1]
    settings = backbones._settings(name)
    return files.sha256(find(f"{settings.architecture}.{settings.tag}", repository=settings.hf_hub_id))


def headless(backbone: str, *, size: tuple[int, int], weights: str | Path = "pretrained") -> backbones.Backbone:
    """``backbones.load`` without a head, and ``STAGES``, whose last stage is left out."""
    if backbone != STAGES:
        return backbones.load(backbone, classes=0, size=size, weights=weights)
    whole = backbones.load("resnet18", classes=0, size=size, weights="random")
    whole.model.layer4 = nn.Identity()
    digest = weights_digest(backbone, weights)
    if weights != "random":
        file = find(backbone, repository=None) if weights == "pretrained" else Path(weights)
        try:
            whole.model.load_state_dict(read(file))
        except RuntimeError as error:
            raise BackboneError(f"{file} does not fit {backbone} ({' '.join(str(error).split())[:200]})") from None
    return backbones.Backbone(backbone, whole.model, whole.size, whole.padded, whole.mean, whole.std, digest)


@torch.inference_mode()
def _compute(
    data: GroupedData, backbone: str, weights: str | Path, view: str, precision: str, device: str, batch_size: int
) -> np.ndarray:
    from tqdm import tqdm

    made = headless(backbone, size=tuple(data.inputs.shape[-2:]), weights=weights)
    model, kind = made.model.to(device), torch.device(device).type
    found = None
    with (
        torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"),
        tqdm(total=len(data.inputs), desc=f"{data.name}: {backbone}", unit=" images", disable=None) as bar,
    ):
        for start in range(0, len(data.inputs), batch_size):
            pixels = data.inputs[start : start + batch_size].to(device)
            inputs = made.prepare(pixels.flip(-1) if view == "mirrored" else pixels)
            features = network.forward(model, inputs).to(PRECISIONS[precision])
            if found is None:  # stays on the device until the end: no batch waits for another's copy
                found = features.new_empty(len(data.inputs), features.shape[1])
            found[start : start + len(features)] = features
            bar.update(len(features))
    if not found.isfinite().all():
        raise BackboneError(f"{backbone} gives features that {found.dtype} cannot hold; try precision='float32'")
    return found.cpu().numpy()


def _write(path: Path, facts: dict, compute: Callable[[], np.ndarray]) -> None:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"):  # two runs that start together compute once
        if path.is_file():
            return
        start = time.perf_counter()
        values = compute()
        facts = facts | {"features": values.shape[1], "seconds": round(time.perf_counter() - start, 1)}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")  # for people; the name is the key
        part = files._part(path)
        try:
            with open(part, "wb") as file:
                np.save(file, values)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
