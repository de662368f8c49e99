"""Where pretrained weights come from: a folder of ``<timm name>.safetensors``, else the Hugging Face hub."""

import os
from pathlib import Path

from torch import Tensor

from fairtuning import FairtuningError
from fairtuning.datasets.files import check

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
