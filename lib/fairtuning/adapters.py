"""LoRA on vision backbones, by peft as it is: W + (alpha / rank) B A, where A and B and the classifier are trained.

Adapters are saved in peft's own format. peft is imported where it is needed: it takes seconds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fairtuning import FairtuningError

if TYPE_CHECKING:
    from peft import PeftModel

#: Which linear layers are adapted. The paper (arXiv 2410.17358) does not say; its Table 5 fits the first two alike.
LAYERS = {
    "qkv": "timm's fused projection to query, key and value of each block (no surgery)",
    "query_value": "the projections to query and to value, as the usual recipe does (the fused one is split)",
    "all": "every linear layer but the classifier",
}


class AdapterError(FairtuningError):
    """An adapter that cannot be made, saved or loaded."""


class SplitProjection(nn.Module):
    """A fused projection ``[..., d] -> [..., 3 h]`` as three layers, so that each can have its own adapter."""

    def __init__(self, fused: nn.Linear):
        super().__init__()
        if fused.out_features % 3:
            raise AdapterError(f"a projection to {fused.out_features} cannot be split in three; use layers='qkv'")
        for number, name in enumerate(("query", "key", "value")):
            part = nn.Linear(
                fused.in_features,
                fused.out_features // 3,
                bias=fused.bias is not None,
                device=fused.weight.device,
                dtype=fused.weight.dtype,
            )
            part.weight = nn.Parameter(fused.weight.detach().chunk(3)[number].clone())
            if fused.bias is not None:
                part.bias = nn.Parameter(fused.bias.detach().chunk(3)[number].clone())
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.query(inputs), self.key(inputs), self.value(inputs)], dim=-1)


def split_projections(model: nn.Module) -> nn.Module:
    """``model`` itself, each fused ``qkv`` replaced by a SplitProjection that computes the same."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            module.qkv = SplitProjection(module.qkv)
    return model


def add(
    model: nn.Module,
    *,
    rank: int,
    alpha: float = 16,
    dropout: float = 0.0,
    layers: str = "qkv",
    last: int | None = None,
    seed: int = 0,
) -> PeftModel:
    """``model`` (of timm) frozen, with adapters of ``rank`` on ``layers`` (a key of LAYERS); its classifier is trained.

    The model's function is unchanged at first, as B = 0; ``seed`` draws A. ``last`` adapts the last so many blocks
    only: what comes before them is then a constant (``prefix.first_blocks``). ``model`` is changed in place.

    Raises AdapterError, in one line, for unknown layers, a model without them, and a rank above a layer's size.
    """
    from peft import LoraConfig, get_peft_model

    if layers not in LAYERS:
        raise AdapterError(f"layers is {layers!r}; allowed: {', '.join(LAYERS)}")
    if layers == "query_value":
        split_projections(model)
    head = next((name for name, module in model.named_modules() if module is _head(model)), None)
    adapted = _adapted(model, layers, head, last)
    for name, module in adapted.items():
        most = min(module.in_features, module.out_features)
        if not 1 <= rank <= most:
            raise AdapterError(
                f"rank is {rank}; {name} ({module.in_features} -> {module.out_features}) allows 1 to {most}"
            )
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(adapted),
        modules_to_save=[head] if head else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, settings)


def save(model: PeftModel, folder: str | Path) -> None:
    """Adapter and classifier in peft's format: ``adapter_config.json``, ``adapter_model.safetensors``."""
    model.save_pretrained(str(folder), save_embedding_layers=False)  # else peft would ask the hub about the model


def load(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """``model`` (of timm, changed in place) with the adapter and classifier that ``save`` or peft wrote.

    Stock peft does the same: ``PeftModel.from_pretrained(model, folder)``, after ``split_projections(model)`` where
    query and value were adapted. Raises AdapterError for a folder without adapter or one of another model.
    """
    import warnings

    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():  # peft would take a pickle, or ask the hub
        raise AdapterError(f"{folder} has no adapter_model.safetensors; it must be a folder that save() or peft wrote")
    try:
        names = json.loads((Path(folder) / "adapter_config.json").read_text())["target_modules"]
        if any(name.rpartition(".")[2] in ("query", "value") for name in names):
            split_projections(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # by which peft says that keys are missing
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(file, framework="pt") as saved:
            surplus = set(saved.keys()) - get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        if surplus:  # of which peft says nothing
            raise ValueError(f"no place for {min(surplus)}")
        return adapted
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning) as error:
        line = " ".join(str(error).split())[:200]
        raise AdapterError(f"{folder} holds no adapter that fits this model ({line})") from None


def parameters(model: PeftModel) -> tuple[int, int]:
    """Trained parameters and all of them, as peft counts: the classifier that is trained, and the frozen original.

    So it is in arXiv 2410.17358, Table 5: 12 blocks, rank (768 + 2304) per block for fused qkv, or 2 rank (768 + 768)
    for query and value, which is the same; and 769 numbers per class, of 40 classes (GeoDE) in the row of rank 8 and
    100 (Aircraft) in the others. The printed total, one for all rows, is that of the first row.
    """
    return model.get_nb_trainable_parameters()


def _head(model: nn.Module) -> nn.Module:
    head = model.get_classifier()
    if not isinstance(head, nn.Linear | nn.Identity):
        raise AdapterError(f"the classifier is {type(head).__name__}; allowed: a linear layer, or none")
    return head if isinstance(head, nn.Linear) else None


def _adapted(model: nn.Module, layers: str, head: str | None, last: int | None) -> dict[str, nn.Linear]:
    """The layers to adapt, by name."""
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != head}
    wanted = {"qkv": ("qkv",), "query_value": ("query", "value")}.get(layers)
    found = {name: m for name, m in linear.items() if wanted is None or name.rpartition(".")[2] in wanted}
    if last is not None:
        depth = len(getattr(model, "blocks", ()))
        if not 1 <= last <= depth:
            raise AdapterError(f"last is {last} of {depth} blocks; allowed: 1 to {depth}")
        late = tuple(f"blocks.{number}." for number in range(depth - last, depth))
        found = {name: m for name, m in found.items() if name.startswith(late)}
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name in linear}) or ["none"]
        raise AdapterError(f"the model has no layer for {layers!r}; its linear layers: {', '.join(kinds)}")
    return found
