"""A vision transformer in two parts, so that what frozen blocks give is computed once; with or without adapters.

`last_blocks(model, first_blocks(model, inputs, blocks=k), blocks=k)` equals `model(inputs)` for every k.
"""

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fairtuning.weights import BackboneError


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
