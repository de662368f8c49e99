"""Vision backbones: timm models by name, with the normalisation that each checkpoint was trained with.

timm is imported where it is needed: it takes seconds.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairtuning.datasets.files import sha256
from fairtuning.weights import FILES, BackboneError, find, read

#: Short names: the backbones of arXiv 2410.17358 (which checkpoints they are is our reading), and the compact one.
BACKBONES = {
    "clip": "vit_base_patch32_clip_224.laion2b",  # "LAION-5B": its English part; the image tower alone
    "dino": "vit_base_patch16_224.dino",
    "vit": "vit_base_patch16_224.orig_in21k_ft_in1k",  # google/vit-base-patch16-224
    "vit-tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
}


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
