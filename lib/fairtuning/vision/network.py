"""A frozen backbone and what is trained of it; a vision transformer in two parts, the first computed once.

`last_blocks(model, first_blocks(model, inputs, blocks=k), blocks=k)` equals `model(inputs)` for every k, with or
without adapters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import scaled_dot_product_attention

from fairtuning.networks import Parameters
from fairtuning.vision import adapters
from fairtuning.vision.backbones import Backbone, BackboneError

AT_ONCE = 256  # images, where there are many


class Network:
    """What a backbone makes of some images, as a function of what is trained of it: a dictionary of tensors.

    That is adapters of ``rank`` and the classifier, if the backbone has one, under peft's names (``how``: what else
    ``adapters.add`` takes, ``layers`` and ``start`` say); with ``rank=None`` the whole backbone. ``blocks`` adapts the
    last so many blocks only: what comes before them is computed once for all images, ``pixels`` (uint8
    ``[N, 3, height, width]``).
    The model stays in evaluation mode: no dropout, and where it has batch normalisation, its statistics stay.
    """

    def __init__(
        self,
        backbone: Backbone,
        pixels: Tensor,
        *,
        rank: int | None,
        alpha: float = 16.0,
        blocks: int | None = None,
        precision: str = "float32",
        device: str = "cpu",
        **how: Any,
    ):
        self.backbone, self.pixels, self.width = backbone, pixels, backbone.model.num_features
        self.device, self.precision = torch.device(device), getattr(torch, precision)
        if rank is None and blocks is not None:
            raise ValueError(f"blocks is {blocks} without a rank; allowed: None, for all blocks are trained")
        model = backbone.model
        if rank is not None:
            model, self.scale = adapters.add(model, rank=rank, alpha=alpha, last=blocks, **how), alpha / rank
        first = len(backbone.model.blocks) - blocks if blocks is not None else None
        self.module = _Rest(model, first).to(device).eval()
        trained = {name: value.detach() for name, value in self.module.named_parameters() if value.requires_grad}
        self.module.requires_grad_(False)
        self._names = {name.replace(".default.", ".").removeprefix("model."): name for name in trained}
        self.trained = {short: trained[name] for short, name in self._names.items()}
        self._tokens = None
        if blocks is not None:
            parts = [self._inputs(part).to(self.precision).cpu() for part in torch.arange(len(pixels)).split(AT_ONCE)]
            self._tokens = torch.cat(parts)

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of what is trained: what the message of an adapter holds."""
        return {name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in self.trained.items()}

    def forward(self, values: Parameters, rows: Tensor, *, base: Parameters | None = None) -> Tensor:
        """Features ``[n, p]`` (logits ``[n, k]`` with a classifier), float32, of the images ``rows [n]``.

        ``values`` stand for what is trained, other entries are passed over; ``base`` for frozen weights (``merged``).
        """
        inputs = self._tokens[rows].to(self.device) if self._tokens is not None else self._inputs(rows)
        given = (base or {}) | {name: values[short] for short, name in self._names.items()}
        with self._autocast():
            return functional_call(self.module, given, (inputs,)).float()

    @torch.no_grad()
    def forward_all(
        self, values: Parameters, rows: Tensor, *, base: Parameters | None = None, at_once: int = AT_ONCE
    ) -> Tensor:
        """The same of many images, so many at once, without gradient."""
        return torch.cat([self.forward(values, part, base=base) for part in rows.split(at_once)])

    def adapter(self, seed: int) -> Parameters:
        """A new adapter as peft draws it: B = 0, so that it changes nothing yet. ``trained`` is then this one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.module.modules():
                if hasattr(module, "lora_A"):
                    module.reset_lora_parameters("default", init_lora_weights=True)
        return {name: value.clone() for name, value in self.trained.items()}

    def factors(self, adapter: Parameters) -> list[tuple[Tensor, Tensor]]:
        """(B, A) of each layer."""
        return [(adapter[name.replace("lora_A", "lora_B")], adapter[name]) for name in self._names if "lora_A" in name]

    def merged(self, adapter: Parameters, factor: float) -> Parameters:
        """The frozen weights ``W_0 + factor (alpha / rank) B A`` of the adapted layers, for ``forward(base=...)``."""
        frozen, base = dict(self.module.named_parameters()), {}
        layers = [name.removesuffix("lora_A.default.weight") for name in self._names.values() if "lora_A" in name]
        for layer, (b, a) in zip(layers, self.factors(adapter), strict=True):
            name = f"{layer}base_layer.weight"
            base[name] = frozen[name] + factor * self.scale * (b @ a)
        return base

    def _inputs(self, rows: Tensor) -> Tensor:
        """What the module takes of images: pixels prepared, or what the frozen blocks give."""
        inputs = self.backbone.prepare(self.pixels[rows].to(self.device))
        if self.module.first is None:
            return inputs
        with torch.no_grad(), self._autocast():
            return first_blocks(self.module.model, inputs, blocks=self.module.first)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)


class _Rest(nn.Module):
    """A model without its ``first`` blocks, or all of it."""

    def __init__(self, model: nn.Module, first: int | None):
        super().__init__()
        self.model, self.first = model, first

    def forward(self, inputs: Tensor) -> Tensor:
        return forward(self.model, inputs) if self.first is None else last_blocks(self.model, inputs, blocks=self.first)


def first_blocks(model: nn.Module, inputs: Tensor, *, blocks: int) -> Tensor:
    """Tokens ``[n, tokens, d]`` after the first ``blocks`` blocks of a timm vision transformer."""
    model = _transformer(model, blocks)
    return model.blocks[:blocks](model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(inputs)))))


def last_blocks(model: nn.Module, tokens: Tensor, *, blocks: int) -> Tensor:
    """Logits ``[n, classes]`` from the tokens after the first ``blocks`` blocks.

    Where the classifier sees the class token alone, the last block is computed for that token alone, as far as
    attention allows (equal to rounding): a third to a quarter of that block's work.
    """
    model = _transformer(model, blocks)
    if blocks < len(model.blocks) and _plain(model):
        tokens = _class_token(model.blocks[-1], model.blocks[blocks:-1](tokens))
    else:
        tokens = model.blocks[blocks:](tokens)
    return model.forward_head(model.norm(tokens))


def forward(model: nn.Module, inputs: Tensor) -> Tensor:
    """``model(inputs)``, equal to rounding, without the last block's work for tokens that nobody looks at."""
    try:
        return last_blocks(model, first_blocks(model, inputs, blocks=0), blocks=0)
    except BackboneError:  # no vision transformer
        return model(inputs)


def _transformer(model: nn.Module, blocks: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's wrapper; adapters stay
    depth = len(model.blocks) if isinstance(model, VisionTransformer) else 0
    if not 0 <= blocks <= depth or not depth:
        kind = type(model).__name__
        raise BackboneError(f"first {blocks} blocks of a {kind}; allowed: 0 to {depth}, of timm's VisionTransformer")
    return model


def _plain(model: nn.Module) -> bool:
    """Whether the last block is the usual one, and the classifier sees the first token only."""
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    block = model.blocks[-1]
    return (
        type(model) is VisionTransformer  # not a subclass that looks at two tokens
        and model.global_pool == "token"
        and type(block) is Block
        and type(block.attn) is Attention
        and isinstance(getattr(block.attn, "norm", None), nn.Identity | None)
        and getattr(block.attn, "gate", None) is None
        and block.attn.attn_drop.p == 0
    )


def _class_token(block: nn.Module, tokens: Tensor) -> Tensor:
    """The block's output at the first token, ``[n, 1, d]``: keys and values of all tokens, all else of this one."""
    attention = block.attn
    shape = (*tokens.shape[:2], 3, attention.num_heads, attention.head_dim)
    query, key, value = attention.qkv(block.norm1(tokens)).reshape(shape).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query[:, :, :1]), attention.k_norm(key)
    seen = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    token = tokens[:, :1] + block.drop_path1(block.ls1(attention.proj_drop(attention.proj(seen))))
    return token + block.drop_path2(block.ls2(block.mlp(block.norm2(token))))
