"""Vision backbones: timm models by name, with the normalisation that each checkpoint was trained with.

Pretrained weights come from a folder of ``<timm name>.safetensors``, else from the Hugging Face hub. timm is imported
where it is needed: it takes seconds.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairtuning import FairtuningError
from fairtuning.datasets.files import check, sha256

#: Short names: the backbones of arXiv 2410.17358 (which checkpoints they are is our reading), and the compact one.
BACKBONES = {
    "clip": "vit_base_patch32_clip_224.laion2b",  # "LAION-5B": its English part; the image tower alone
    "dino": "vit_base_patch16_224.dino",
    "vit": "vit_base_patch16_224.orig_in21k_ft_in1k",  # google/vit-base-patch16-224
    "vit-tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}

#: Files known by their SHA-256. Any other timm name is looked for as ``<name>.safetensors``.
FILES = {
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": (
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors",
        "41ed9fa53d10074b2dcac3d2a1974b4fa7c8ea9a2e7c489a9dc17eed443c73ba",
    ),
    "mobilenetv2_100.onnxzoo_in1k": (  # not one of timm's checkpoints
        "mobilenetv2_100.onnxzoo_in1k.headless.safetensors",
        "c443e553c66d2d13927562bfb6eb851e7e59764fa7c150705052cdb2166a3825",
    ),
    "resnet18.tv_in1k.stages1-3": (  # without layer4 and fc: for frozen features alone (features.STAGES)
        "resnet18.tv_in1k.stages1-3.safetensors",
        "dc8d2a562ceee3716617d62f06bb3ce31c7ce4f71b49182a53f4ab7a8bc1f1d2",
    ),
}


class BackboneError(FairtuningError):
    """A backbone that cannot be made: unknown, without weights, or with weights of something else."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A timm model and what it has to be fed. ``digest`` is the SHA-256 of the weights' file, or "random"."""

    name: str
    model: nn.Module
    size: tuple[int, int]  # height and width of the images
    padded: tuple[int, int]  # what the model sees: whole patches
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    def prepare(self, images: Tensor) -> Tensor:
        """What the model takes: uint8 ``[n, 3, height, width]`` -> float32 ``(image / 255 - mean) / std``.

        Where patches do not fill the image exactly, zeros (the checkpoint's mean colour) below and to the right.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[-3:]) != (3, *self.size):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; permitted: torch.uint8 [n, 3, {self.size[0]}, "
                f"{self.size[1]}]"
            )
        mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        inputs = (images.float() - 255 * mean) / (255 * std)
        below, right = (whole - given for whole, given in zip(self.padded, self.size, strict=True))
        return nn.functional.pad(inputs, (0, right, 0, below)) if below or right else inputs


def load(
    name: str,
    *,
    classes: int,
    size: tuple[int, int] | None = None,
    weights: str | Path = "pretrained",
    seed: int = 0,
) -> Backbone:
    """The timm model ``name`` (or a key of BACKBONES) for images of ``size``, with a head of ``classes`` outputs.

    ``weights`` is "pretrained", "random" or the path of a safetensors file with timm's keys. ``seed`` draws the new
    head (and random weights). A checkpoint's own head stays where it has ``classes`` outputs; ``classes=0`` gives
    pooled features. timm resamples the position embeddings to ``size``. The model is float32, in evaluation mode.

    Raises BackboneError, in one line, for an unknown name, weights found nowhere, a checkpoint of another
    architecture, and a size or number of classes that the model cannot have.
    """
    settings = _settings(BACKBONES.get(name, name))
    name = f"{settings.architecture}.{settings.tag}".rstrip(".")
    size = tuple(size or settings.input_size[-2:])
    if classes < 0 or len(size) != 2 or min(size) < 1:
        raise BackboneError(f"classes {classes}, size {size}: allowed are 0 or more, (height, width) of 1 or more")
    file = None
    if weights != "random":
        file = find(name, repository=settings.hf_hub_id) if weights == "pretrained" else Path(weights)
    state = read(file) if file else None
    model = _make(settings, classes, size, state, seed, file)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    padded = tuple(math.ceil(s / p) * p for s, p in zip(size, patch, strict=True))
    if padded != size:
        model = _make(settings, classes, padded, state, seed, file)
    digest = sha256(file) if file else "random"
    return Backbone(name, model.eval(), size, padded, tuple(settings.mean), tuple(settings.std), digest)


def _settings(name: str) -> Any:
    """timm's settings of a checkpoint: normalisation, input size, classifier, place on the hub."""
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        from difflib import get_close_matches

        near = [*BACKBONES, *get_close_matches(architecture, timm.list_models(), n=3)]
        raise BackboneError(f"timm has no model {architecture!r}; allowed: {', '.join(near)}, … (timm.list_models())")
    if name in FILES and not timm.is_model_pretrained(name):  # the architecture's settings, weights from elsewhere
        settings = timm.models.get_pretrained_cfg(architecture)
        settings.tag, settings.hf_hub_id = tag, None
        return settings
    names = timm.list_models(f"{architecture}.*", pretrained=True)
    if (tag and name not in names) or not names:
        tags = ", ".join(known.partition(".")[2] for known in names) or "none"
        raise BackboneError(f"{architecture} has no checkpoint {tag!r}; allowed: {tags}")
    return timm.models.get_pretrained_cfg(name)


def _make(
    settings: Any, classes: int, size: tuple[int, int], state: dict[str, Tensor] | None, seed: int, file: Path | None
) -> nn.Module:
    import timm

    name = settings.architecture
    given = asdict(settings) | {"state_dict": state, "custom_load": False}  # custom_load: for JAX archives
    options = {"img_size": size} if settings.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]), _quiet("timm"):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(
                name, pretrained=state is not None, pretrained_cfg=given, num_classes=classes, **options
            )
        except (AssertionError, RuntimeError, TypeError, ValueError, KeyError) as error:
            what = f"{name} with {classes} classes at {size[0]}x{size[1]}"
            subject = f"{file} does not fit {what}: another architecture?" if file else f"timm cannot make {what}:"
            raise BackboneError(f"{subject} ({' '.join(str(error).split())[:200]})") from None
    model.pretrained_cfg.pop("state_dict", None)  # or every copy of the model would carry the weights twice
    if state is not None:
        heads = (settings.classifier,) if isinstance(settings.classifier, str) else tuple(settings.classifier or ())
        own, found = ({key for key in keys if not key.startswith(heads)} for keys in (model.state_dict(), state))
        if own != found:  # timm is lenient about names as soon as the head is a new one
            lacking, unknown = sorted(own - found), sorted(found - own)
            raise BackboneError(
                f"{file} is of another architecture than {name}: {len(lacking)} weights missing "
                f"({', '.join(lacking[:2])}), {len(unknown)} unknown ({', '.join(unknown[:2])})"
            )
    return model


def find(name: str, *, repository: str | None) -> Path:
    """The file with the weights of the timm model ``name``; ``repository`` is its place on the Hugging Face hub.

    Raises BackboneError where neither the folder nor the hub has it, DataError where a known file is changed.
    """
    file, expected = FILES.get(name, (f"{name}.safetensors", ""))
    folder = os.environ.get("FAIRTUNING_WEIGHTS", "")
    if folder and not Path(folder).is_dir():
        raise BackboneError(f"FAIRTUNING_WEIGHTS is {folder!r}, no folder; it must be one with {file}, or be unset")
    if folder and (Path(folder) / file).is_file():
        if expected:
            check(Path(folder) / file, expected)
        return Path(folder) / file
    here = f"{folder} has no {file}" if folder else f"FAIRTUNING_WEIGHTS names no folder with {file}"
    return _from_hub(repository, f"no weights of {name}: {here}")


def _from_hub(repository: str | None, missing: str) -> Path:
    import huggingface_hub as hub

    file = "model.safetensors"
    if not repository:
        raise BackboneError(f"{missing}, and timm names no hub repository for it")
    cached = hub.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return Path(cached)
    try:  # asked once first: the download itself would try for half a minute before it gives up
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, file), timeout=10)
        return Path(hub.hf_hub_download(repository, file))
    except Exception as error:  # the hub's HTTP library, and so the error's class, has changed more than once
        raise BackboneError(
            f"{missing}, and {repository} could not be had from the hub ({type(error).__name__}); put the file into "
            "the folder, or go online"
        ) from None


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in float32. Other formats can run code and are refused."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot read {file} ({error}); it must be a safetensors file") from None
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def write_out_attention(model: nn.Module) -> nn.Module:
    """``model`` itself, attention computed as two products and a softmax in place of torch's fused kernel.

    Equal to rounding. On a CPU in bfloat16 the fused kernel's backward pass can be half of a LoRA step; in float32 the
    two are alike (benchmarks/lora.py).
    """
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # timm's switch
            module.fused_attn = False
    return model


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    level = logging.getLogger(logger).level
    try:
        logging.getLogger(logger).setLevel(logging.ERROR)
        yield
    finally:
        logging.getLogger(logger).setLevel(level)
