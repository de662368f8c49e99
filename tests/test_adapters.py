"""LoRA through peft: which layers, how many parameters, the same function before, after merging and after loading."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from fairtuning.vision import adapters, backbones, network
from fairtuning.vision.adapters import AdapterError

# arXiv 2410.17358, Table 5: rank, classes of the data set behind the row (our decoding), trained parameters
TABLE_5 = [(8, 40, 325_672), (16, 100, 666_724), (32, 100, 1_256_548), (64, 100, 2_436_196), (128, 100, 4_795_492)]


def vit(*, name="vit_tiny_patch16_224", classes=3, seed=0):
    return backbones.load(name, classes=classes, size=(32, 48), weights="random", seed=seed).model


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def trained(model, inputs, steps=3):
    """A few steps, so that B is no longer 0."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def outputs(model, inputs):
    return model(inputs)


# ------------------------------------------------------------------------------------------------------------- Table 5
@pytest.mark.parametrize("layers", ["qkv", "query_value"])
@pytest.mark.parametrize("rank, classes, printed", TABLE_5)
def test_parameter_counts_of_table_5(rank, classes, printed, layers):
    with torch.device("meta"):  # ViT-B/16 without its weights
        model = adapters.add(backbones.load("dino", classes=classes, weights="random").model, rank=rank, layers=layers)
    count, total = adapters.parameters(model)
    assert count == printed == 12 * rank * (768 + 2304) + 769 * classes
    if rank == 8:
        assert total == 86_155_088  # which the paper prints in every row; the classifier counts twice
        assert round(100 * count / total, 2) == 0.38


def test_all_linear_layers_cost_four_times_as_much():
    with torch.device("meta"):
        model = adapters.add(backbones.load("dino", classes=40, weights="random").model, rank=8, layers="all")
    assert adapters.parameters(model)[0] == 12 * 8 * (3072 + 1536 + 2 * 3840) + 769 * 40


# ---------------------------------------------------------------------------------------------------- the same function
@pytest.mark.parametrize("layers", adapters.LAYERS)
def test_a_new_adapter_leaves_the_function_as_it_was(layers, inputs):
    model = vit()
    before = outputs(model, inputs)
    after = outputs(adapters.add(model, rank=4, layers=layers), inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=0 if layers != "query_value" else 1e-5)


def test_split_projections_compute_the_same(inputs):
    fused = vit().double()
    split = adapters.split_projections(copy.deepcopy(fused))
    assert sum(isinstance(m, adapters.SplitProjection) for m in split.modules()) == 12
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in fused.parameters())
    torch.testing.assert_close(outputs(split, inputs.double()), outputs(fused, inputs.double()), rtol=1e-12, atol=1e-12)
    assert adapters.split_projections(split) is split  # a second time nothing is left to split


@pytest.mark.parametrize("layers", adapters.LAYERS)
def test_merged_and_unmerged_agree(layers, inputs):
    model = trained(adapters.add(vit(), rank=4, layers=layers), inputs)
    apart = outputs(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(outputs(model, inputs), apart, atol=1e-2)  # the adapter does something
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), apart, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("layers, adapted", [("qkv", {"qkv"}), ("query_value", {"query", "value"})])
def test_adapters_and_classifier_are_trained_and_nothing_else(layers, adapted, inputs):
    model = adapters.add(vit(), rank=4, layers=layers)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names if "lora" in name} == adapted
    assert len([name for name in names if "lora_A" in name]) == 12 * len(adapted)
    assert {name for name in names if "lora" not in name} == {
        f"base_model.model.head.modules_to_save.default.{kind}" for kind in ("weight", "bias")
    }
    trained(model, inputs)
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())


def test_the_last_blocks_alone_and_their_frozen_prefix(inputs):
    model = trained(adapters.add(vit(), rank=4, last=2), inputs)
    assert {int(n.split("blocks.")[1].split(".")[0]) for n, _ in model.named_parameters() if "lora" in n} == {10, 11}
    with torch.no_grad():
        tokens = network.first_blocks(model, inputs, blocks=10)
        assert torch.equal(tokens, network.first_blocks(vit(), inputs, blocks=10))
        together = network.last_blocks(model, tokens, blocks=10)
        torch.testing.assert_close(together, model(inputs), rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_adapter_and_nothing_else_does():
    def first(**options):
        model = adapters.add(vit(), rank=4, **options)
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = first(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first(seed=1), one) and not torch.equal(first(seed=2), one)


# -------------------------------------------------------------------------------------------- factors from the weights
def importances(model, *, equal=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = adapters.adapted(model)
    return {name: torch.ones(192) if equal else torch.randn(192, generator=generator).exp() for name in chosen}


def pair(model, name):
    """scale * A^T, B^T and the frozen weight of one adapted layer in the paper's layout, float64."""
    layer = model.get_base_model().get_submodule(name)
    found = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer.weight
    A, B, frozen = (value.detach().double().mT for value in found)
    return layer.scaling["default"] * A, B, frozen


@pytest.mark.parametrize("start", ["pissa", "equal", "weighted"])
@pytest.mark.parametrize("rank, alpha", [(4, 16), (16, 16), (8, 2)])
def test_a_start_from_the_weights_leaves_the_function_as_it_was(start, rank, alpha, inputs):
    plain = vit()
    before = outputs(plain, inputs)
    given = start if start == "pissa" else importances(plain, equal=start == "equal")
    model = adapters.add(vit(), rank=rank, alpha=alpha, start=given)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=2e-5)
    for name, module in adapters.adapted(plain).items():
        A, B, frozen = pair(model, name)
        W = module.weight.double().mT
        torch.testing.assert_close(frozen + A @ B, W, rtol=0, atol=1e-7)
        assert (A @ B).abs().max() > 0.01 * W.abs().max()  # something has moved
    assert adapters.parameters(model) == adapters.parameters(adapters.add(vit(), rank=rank))


def test_equal_importances_are_peft_s_pissa_factor_by_factor():
    def separated():
        """Every singular value a tenth below the one before: singular vectors are then well defined."""
        model = vit()
        for module in adapters.adapted(model, last=2).values():
            U, _, Vh = torch.linalg.svd(module.weight.detach(), full_matrices=False)
            module.weight.data = U * 0.9 ** torch.arange(192) @ Vh
        return model

    equal = dict.fromkeys(adapters.adapted(vit(), last=2), torch.full((192,), 3.0))
    ours = adapters.add(separated(), rank=6, alpha=3, last=2, start=equal)
    theirs = adapters.add(separated(), rank=6, alpha=3, last=2, start="pissa")
    for name in equal:
        A, B, frozen = pair(ours, name)
        C, D, rest = pair(theirs, name)
        sign = (B * D).sum(1).sign()  # a component's sign is free
        torch.testing.assert_close(A * sign, C, rtol=0, atol=1e-4 * C.abs().max().item())
        torch.testing.assert_close(B * sign[:, None], D, rtol=0, atol=1e-4 * D.abs().max().item())
        torch.testing.assert_close(frozen, rest, rtol=0, atol=1e-5)


def test_importances_choose_the_paper_s_weighted_factors():
    """diag(rows) (W - A B) is as small as eq. 4's optimum, by torch's SVD: nothing of that rank is closer."""
    plain = vit()
    rows = importances(plain)
    model = adapters.add(vit(), rank=5, start=rows)
    for name, module in adapters.adapted(plain).items():
        A, B, _ = pair(model, name)
        scaled = rows[name].double()[:, None] * module.weight.detach().double().mT
        optimum = torch.linalg.svdvals(scaled)[5:].square().sum().sqrt()
        lost = (scaled - rows[name].double()[:, None] * (A @ B)).norm()
        assert float(lost / optimum) == pytest.approx(1, abs=1e-6)
        even = pair(model, name)[0].norm(dim=0) / B.norm(dim=1)
        torch.testing.assert_close(even, torch.full_like(even, 16 / 5), rtol=1e-5, atol=0)


def test_a_pissa_start_saves_and_loads_in_stock_peft_and_a_weighted_one_is_refused(inputs, tmp_path):
    from peft import PeftModel

    model = trained(adapters.add(vit(), rank=4, start="pissa"), inputs)
    adapters.save(model, tmp_path)
    for loaded in (adapters.load(vit(), tmp_path).eval(), PeftModel.from_pretrained(vit(), tmp_path).eval()):
        torch.testing.assert_close(outputs(loaded, inputs), outputs(model, inputs), rtol=0, atol=1e-4)
    model = trained(adapters.add(vit(), rank=4, start=importances(vit())), inputs)
    with pytest.raises(AdapterError, match="save the network that model.merge_and_unload\\(\\) gives") as raised:
        adapters.save(model, tmp_path / "weighted")
    assert "\n" not in str(raised.value) and not (tmp_path / "weighted").exists()
    model.save_pretrained(tmp_path / "weighted", save_embedding_layers=False)  # past our save()
    with pytest.raises(AdapterError, match="holds no adapter that fits this model"):
        adapters.load(vit(), tmp_path / "weighted")
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(model.merge_and_unload(), inputs), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- peft's own format
@pytest.mark.parametrize("layers", adapters.LAYERS)
def test_what_is_saved_loads_here_and_in_stock_peft(layers, inputs, tmp_path):
    from peft import PeftModel

    model = trained(adapters.add(vit(), rank=4, layers=layers, last=3), inputs)
    adapters.save(model, tmp_path)
    expected = outputs(model, inputs)
    here = adapters.load(vit(), tmp_path).eval()
    base = adapters.split_projections(vit()) if layers == "query_value" else vit()
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    for loaded in (here, stock):
        torch.testing.assert_close(outputs(loaded, inputs), expected, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in here.parameters())
    assert any(p.requires_grad for p in adapters.load(vit(), tmp_path, trainable=True).parameters())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 4 and settings["modules_to_save"] == ["head"]
    assert (
        sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
        == (adapters.parameters(model)[0])
    )


def test_an_adapter_of_another_model_is_refused(inputs, tmp_path):
    adapters.save(adapters.add(vit(), rank=4), tmp_path)
    shallow = vit()
    shallow.blocks = shallow.blocks[:6]
    for other in (vit(classes=2), vit(name="vit_small_patch16_224"), shallow):
        with pytest.raises(AdapterError, match="holds no adapter that fits this model") as raised:
            adapters.load(other, tmp_path)
        assert "\n" not in str(raised.value)


def test_a_folder_without_a_safe_adapter_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    for folder in (tmp_path, "someone/adapter"):
        with pytest.raises(AdapterError, match="has no adapter_model.safetensors"):
            adapters.load(vit(), folder)


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "options, line",
    [
        ({"rank": 193}, r"rank is 193; blocks.0.attn.qkv \(192 -> 576\) allows 1 to 192"),
        ({"rank": 0}, "rank is 0; .* allows 1 to 192"),
        ({"rank": 4, "layers": "q"}, "layers is 'q'; allowed: qkv, query_value, all"),
        ({"rank": 4, "last": 0}, "last is 0 of 12 blocks; allowed: 1 to 12"),
        ({"rank": 4, "last": 13}, "last is 13 of 12 blocks; allowed: 1 to 12"),
        ({"rank": 4, "start": "svd"}, "start is 'svd'; allowed: zero, pissa, or importances by layer"),
        ({"rank": 4, "start": {}}, "start: blocks.0.attn.qkv has no importance; allowed: importances of blocks.0"),
        (
            {"rank": 4, "last": 1, "start": {"blocks.11.attn.qkv": torch.ones(192), "head": torch.ones(192)}},
            "start: head is not adapted; allowed: importances of blocks.11.attn.qkv",
        ),
        (
            {"rank": 4, "last": 1, "start": {"blocks.11.attn.qkv": torch.ones(3)}},
            r"blocks.11.attn.qkv is \[3\], 1 to 1; allowed: \[192\], finite and not negative",
        ),
        ({"rank": 4, "last": 1, "start": {"blocks.11.attn.qkv": torch.full((192,), torch.nan)}}, "nan to nan; allowed"),
    ],
)
def test_bad_requests_give_one_line(options, line):
    with pytest.raises(AdapterError, match=line):
        adapters.add(vit(), **options)


def test_a_model_without_such_layers_is_refused():
    model = backbones.load("resnet18", classes=2, weights="random").model
    with pytest.raises(AdapterError, match="no layer for 'qkv'; its linear layers: none"):
        adapters.add(model, rank=2)


def test_a_backbone_without_classifier_gets_adapters_alone(inputs):
    model = adapters.add(vit(classes=0), rank=4)
    assert adapters.parameters(model)[0] == 12 * 4 * (192 + 576)
    assert outputs(model, inputs).shape == (4, 192)
