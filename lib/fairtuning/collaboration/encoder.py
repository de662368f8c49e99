"""Features of images as a function of an adapter: the frozen backbone that all parties have."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fairtuning import adapters, backbones, prefix
from fairtuning.collaboration.messages import shapes_of
from fairtuning.networks import Parameters

EVALUATED = 256  # images at a time


class Encoder:
    """Features ``phi(x; adapter)`` of images as a function of the adapter.

    ``blocks`` adapts the last so many blocks only; what comes before them is computed once for all images. The model
    stays in evaluation mode. An adapter is a dictionary of tensors with peft's names.
    """

    def __init__(
        self,
        backbone: backbones.Backbone,
        pixels: Tensor,
        *,
        rank: int,
        alpha: float = 16.0,
        layers: str = "qkv",
        blocks: int | None = None,
        precision: str = "float32",
        device: str = "cpu",
    ):
        self.backbone, self.pixels, self.scale = backbone, pixels, alpha / rank
        self.width = backbone.model.num_features
        self.frozen = len(backbone.model.blocks) - blocks if blocks is not None else 0
        model = adapters.add(backbone.model, rank=rank, alpha=alpha, layers=layers, last=blocks)
        self.module = _Last(model, self.frozen).to(device).eval().requires_grad_(False)
        self.device, self.precision = torch.device(device), getattr(torch, precision)
        self._names = {
            name.replace(".default.", ".").removeprefix("model."): name
            for name, _ in self.module.named_parameters()
            if "lora_" in name
        }
        self.shapes = shapes_of(self.adapter(0))  # what a message holds
        self._tokens = self._first() if blocks is not None else None

    def adapter(self, seed: int) -> Parameters:
        """A new adapter as peft draws it: B = 0, so that it changes nothing yet."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.module.modules():
                if hasattr(module, "lora_A"):
                    module.reset_lora_parameters("default", init_lora_weights=True)
        values = dict(self.module.named_parameters())
        return {short: values[name].detach().clone() for short, name in self._names.items()}

    def factors(self, adapter: Parameters) -> list[tuple[Tensor, Tensor]]:
        """(B, A) of each layer."""
        return [(adapter[name.replace("lora_A", "lora_B")], adapter[name]) for name in self._names if "lora_A" in name]

    def merged(self, adapter: Parameters, factor: float) -> Parameters:
        """The frozen weights ``W_0 + factor (alpha / rank) B A`` of the adapted layers, for ``features(base=...)``."""
        frozen, base = dict(self.module.named_parameters()), {}
        layers = [name.removesuffix("lora_A.default.weight") for name in self._names.values() if "lora_A" in name]
        for layer, (b, a) in zip(layers, self.factors(adapter), strict=True):
            name = f"{layer}base_layer.weight"
            base[name] = frozen[name] + factor * self.scale * (b @ a)
        return base

    def features(self, adapter: Parameters, rows: Tensor, *, base: Parameters | None = None) -> Tensor:
        """``[n, p]`` float32 of the images ``rows [n]``; other entries of ``adapter`` are passed over."""
        tokens = self._tokens[rows].to(self.device) if self._tokens is not None else self._embed(rows)
        values = (base or {}) | {name: adapter[short] for short, name in self._names.items()}
        with self._autocast():
            return functional_call(self.module, values, (tokens,)).float()

    @torch.no_grad()
    def all_features(self, adapter: Parameters, rows: Tensor, *, base: Parameters | None = None) -> Tensor:
        """The same of many images, without gradient."""
        return torch.cat([self.features(adapter, part, base=base) for part in rows.split(EVALUATED)])

    def _embed(self, rows: Tensor) -> Tensor:
        inputs = self.backbone.prepare(self.pixels[rows].to(self.device))
        with torch.no_grad(), self._autocast():
            return prefix.first_blocks(self.module.model, inputs, blocks=self.frozen)

    def _first(self) -> Tensor:
        parts = torch.arange(len(self.pixels)).split(EVALUATED)
        return torch.cat([self._embed(part).to(self.precision).cpu() for part in parts])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)


class _Last(nn.Module):
    """The blocks that have adapters, and what comes after them."""

    def __init__(self, model: nn.Module, frozen: int):
        super().__init__()
        self.model, self.frozen = model, frozen

    def forward(self, tokens: Tensor) -> Tensor:
        return prefix.last_blocks(self.model, tokens, blocks=self.frozen)
