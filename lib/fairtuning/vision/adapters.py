"""LoRA on vision backbones, by peft as it is: W + (alpha / rank) B A, where A and B and the classifier are trained.

Adapters are saved in peft's own format. peft is imported where it is needed: it takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fairtuning import FairtuningError
from fairtuning.factorization import low_rank

if TYPE_CHECKING:
    from peft import PeftModel

#: Which linear layers are adapted. The paper (arXiv 2410.17358) does not say; its Table 5 fits the first two alike.
LAYERS = {
    "qkv": "timm's fused projection to query, key and value of each block (no surgery)",
    "query_value": "the projections to query and to value, as the usual recipe does (the fused one is split)",
    "all": "every linear layer but the classifier",
}
#: What the configuration of an adapter says that started from importances; stock peft refuses to load it.
WEIGHTED = "weighted"
#: Where the factors start by name: LoRA's B = 0; the plain SVD of the weight, as peft has it (arXiv 2404.02948).
STARTS = ("zero", "pissa")


class AdapterError(FairtuningError):
    """An adapter that cannot be made, saved or loaded."""


class SplitProjection(nn.Module):
    """A fused projection ``[..., d] -> [..., 3 h]`` as three layers, so that each can have its own adapter."""

    def __init__(self, fused: nn.Linear):
        super().__init__()
        if fused.out_features % 3:
            raise AdapterError(f"a projection to {fused.out_features} cannot be split in three; use layers='qkv'")
        for number, name in enumerate(("query", "key", "value")):
            part = nn.Linear(fused.in_features, fused.out_features // 3, bias=fused.bias is not None).to(fused.weight)
            part.load_state_dict({key: value.chunk(3)[number] for key, value in fused.state_dict().items()})
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.query(inputs), self.key(inputs), self.value(inputs)], dim=-1)


def split_projections(model: nn.Module) -> nn.Module:
    """``model`` itself, each fused ``qkv`` replaced by a SplitProjection that computes the same."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            module.qkv = SplitProjection(module.qkv)
    return model


def adapted(model: nn.Module, *, layers: str = "qkv", last: int | None = None) -> dict[str, nn.Linear]:
    """The layers that ``add`` adapts, by name; "query_value" splits the fused projections of ``model`` first.

    Raises AdapterError as ``add`` does.
    """
    if layers not in LAYERS:
        raise AdapterError(f"layers is {layers!r}; allowed: {', '.join(LAYERS)}")
    if layers == "query_value":
        split_projections(model)
    head = _name_of_head(model)
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


def add(
    model: nn.Module,
    *,
    rank: int,
    alpha: float = 16,
    dropout: float = 0.0,
    layers: str = "qkv",
    last: int | None = None,
    start: str | Mapping[str, Tensor] = "zero",
    seed: int = 0,
) -> PeftModel:
    """``model`` (of timm) frozen, with adapters of ``rank`` on ``layers`` (a key of LAYERS); its classifier is trained.

    The model's function is unchanged at first. ``start`` "zero": B = 0, and ``seed`` draws A. "pissa": the top
    singular components of the weight move into B A, and what is frozen is the rest. Importances ``[in]`` >= 0 of the
    input features of every adapted layer, by its name: likewise, under row weights (``factorization.low_rank``; W there
    is the transpose of torch's weight); equal ones are "pissa". ``last`` adapts the last so many blocks only: what
    comes before them is then a constant (``network.first_blocks``). ``model`` is changed in place.

    Raises AdapterError, in one line, for unknown layers, a model without them, a rank above a layer's size, an unknown
    start and importances that are not those of the adapted layers.
    """
    from peft import LoraConfig, get_peft_model

    chosen = adapted(model, layers=layers, last=last)
    for name, module in chosen.items():
        most = min(module.in_features, module.out_features)
        if not 1 <= rank <= most:
            raise AdapterError(
                f"rank is {rank}; {name} ({module.in_features} -> {module.out_features}) allows 1 to {most}"
            )
    if isinstance(start, str) and start not in STARTS:
        raise AdapterError(f"start is {start!r}; allowed: {', '.join(STARTS)}, or importances by layer")
    weighted = not isinstance(start, str)
    if weighted:
        _check_importance(start, chosen)
    head = _name_of_head(model)
    settings = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(chosen),
        modules_to_save=[head] if head else None,
        init_lora_weights="pissa" if start == "pissa" else True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = get_peft_model(model, settings)
    if weighted:
        for name in chosen:
            _factorise(made.get_base_model().get_submodule(name), start[name])
        made.peft_config["default"].init_lora_weights = WEIGHTED
    return made


@torch.no_grad()
def _factorise(layer: nn.Module, importance: Tensor) -> None:
    """Moves the weighted low-rank part of a peft layer's weight into its adapter.

    Each of the r components has as long a part in A as in B, and alpha / rank is divided out, as PiSSA does.
    """
    weight, scale = layer.base_layer.weight, layer.scaling["default"]
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    W = weight.double().mT
    A, B = low_rank(W, len(lora_A), rows=importance.to(W))  # [in, r] and [r, out]; the rows of B have length 1
    length = A.norm(dim=0).clamp_min(torch.finfo(A.dtype).tiny)
    lora_A.copy_((A / (length * scale).sqrt()).mT)
    lora_B.copy_(B.mT * (length / scale).sqrt())
    weight.copy_(weight.double() - scale * lora_B.double() @ lora_A.double())  # of the factors as they were rounded


def save(model: PeftModel, folder: str | Path) -> None:
    """Adapter and classifier in peft's format: ``adapter_config.json``, ``adapter_model.safetensors``.

    From a "pissa" start the factors fit the rest of the weight, which peft computes anew when it loads them. What
    started from importances has no such place in the format, and raises AdapterError; ``model.merge_and_unload()``
    gives the whole network.
    """
    if model.peft_config["default"].init_lora_weights == WEIGHTED:
        raise AdapterError(
            "the adapter started from importances, so that its frozen weights are not the backbone's; peft's format "
            "has no place for them: save the network that model.merge_and_unload() gives"
        )
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
            loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        with safe_open(file, framework="pt") as saved:
            surplus = set(saved.keys()) - get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
        if surplus:  # of which peft says nothing
            raise ValueError(f"no place for {min(surplus)}")
        return loaded
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


def _name_of_head(model: nn.Module) -> str | None:
    head = model.get_classifier()
    if not isinstance(head, nn.Linear | nn.Identity):
        raise AdapterError(f"the classifier is {type(head).__name__}; allowed: a linear layer, or none")
    return next((n for n, module in model.named_modules() if module is head and isinstance(head, nn.Linear)), None)


def _check_importance(importance: Mapping[str, Tensor], chosen: Mapping[str, nn.Linear]) -> None:
    if wrong := sorted(importance.keys() ^ chosen.keys()):
        which = "has no importance" if wrong[0] in chosen else "is not adapted"
        raise AdapterError(f"start: {wrong[0]} {which}; allowed: importances of {', '.join(chosen)}")
    for name, module in chosen.items():
        rows = importance[name]
        if rows.shape != (module.in_features,) or not ((rows >= 0) & rows.isfinite()).all():
            raise AdapterError(
                f"start: importance of {name} is {list(rows.shape)}, {rows.min():.3g} to {rows.max():.3g}; allowed: "
                f"[{module.in_features}], finite and not negative"
            )
