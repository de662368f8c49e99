"""A transformer for the classroom (8 x 8 images, patches of 2, 4 blocks of width 48), pre-trained on the spot.

It has learnt the ten digits from images of parity (``datasets.generated``) that lie on either ground, so no shortcut.
"""

import time
from copy import deepcopy
from functools import cache

import torch
from torch import nn
from torch.func import functional_call

from fairtuning import datasets
from fairtuning.losses import cross_entropy
from fairtuning.training import train
from fairtuning.vision import backbones


def load(*, classes: int, seed: int = 0) -> backbones.Backbone:
    """The transformer with a new head of ``classes`` outputs, drawn by ``seed``; ``classes=0`` gives features."""
    model = deepcopy(pretrained()[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(classes)
    half = (0.5, 0.5, 0.5)
    return backbones.Backbone("small", model, (8, 8), (8, 8), half, half, "pre-trained on the spot")


@cache
def pretrained() -> tuple[nn.Module, float]:
    """The transformer, and the seconds that pre-training it took, once per process."""
    from timm.models.vision_transformer import VisionTransformer

    before = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=8, patch_size=2, embed_dim=48, depth=4, num_heads=4, mlp_ratio=2, num_classes=10
        )
    # Training multiplies what rounds differently on another processor into another network: it starts from numbers that
    # are the same everywhere, in float64.
    model = backbones.write_out_attention(model.double().eval())
    with torch.no_grad():
        for value in model.parameters():
            value.copy_((value * 2**16).round() / 2**16)
    data = datasets.load("parity", label="digit")
    rows = data.part("pretraining")
    inputs = (data.inputs[rows].double() - 127.5) / 127.5
    trained = train(
        dict(model.named_parameters()),
        lambda parameters, batch: functional_call(model, parameters, (batch[0],))[None],
        lambda logits, label, group: cross_entropy(logits, label).mean(-1),
        batch=lambda index: (inputs[index], data.label[rows][index], data.group[rows][index]),
        n=len(rows),
        order_seeds=[0],
        optimiser_name="adam",
        learning_rate=0.001,
        epochs=20,
        batch_size=32,
    )
    model.load_state_dict(trained)
    return model.float(), time.perf_counter() - before
