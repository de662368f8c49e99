"""Developer, auditor, evaluator: what each can see, what crosses, and that strength 0 is plain fine-tuning."""

from dataclasses import replace

import pytest
import torch

from fairtuning.collaboration import exchange, parties
from fairtuning.collaboration.messages import Message, Refused, decode, encode
from fairtuning.collaboration.parties import (
    METHODS,
    ONCE,
    RAISED,
    Auditor,
    Central,
    Developer,
    Evaluator,
    PartyError,
    Plan,
    auditor_view,
    developer_view,
    turns,
)
from fairtuning.datasets import GroupedData
from fairtuning.losses import cross_entropy, prediction_entropy
from fairtuning.metrics import METRICS, group_counts
from fairtuning.networks import head
from fairtuning.training import Learner, train
from fairtuning.vision import backbones
from fairtuning.vision.network import Network


def faces(n=60, seed=0):
    """Noise whose brightness tells the label and whose colour tells the attribute, in three splits."""
    generator = torch.Generator().manual_seed(seed)
    label, group = torch.randint(2, (2, n), generator=generator)
    pixels = torch.randint(120, (n, 3, 8, 8), generator=generator) + 60 * label.view(-1, 1, 1, 1)
    pixels[:, 0] += 70 * group.view(-1, 1, 1)
    return GroupedData(
        name="noise", edition="generated", digest="0" * 64, inputs=pixels.byte(), label=label, group=group,
        split=torch.arange(n) % 3, label_names=("dark", "bright"), group_names=("blue", "red"),
        split_names=("training", "validation", "test"),
    )  # fmt: skip


def new_encoder(data, **options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=0).eval()
    half = (0.5, 0.5, 0.5)
    backbone = backbones.Backbone("tiny", model, (8, 8), (8, 8), half, half, "random")
    return Network(backbone, data.inputs, **{"rank": 2, "blocks": 2} | options)


@pytest.fixture(scope="module")
def data():
    return faces()


@pytest.fixture(scope="module")
def encoder(data):
    return new_encoder(data)


def plan_of(method, **settings):
    usual = dict(strength=0.5, learning_rate=0.01, batch_size=8, epochs=2, seed=1, order_seed=1)
    return Plan(method=method, rounds=3 if method in RAISED else 1, **usual | settings)


def run(encoder, data, plan, **options):
    found = parties.parties(encoder, data, plan, **options)
    exchange(found, turns(plan))
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------------------ features
def test_a_new_adapter_changes_nothing_and_cached_blocks_change_nothing(data, encoder):
    rows = torch.arange(10)
    images = encoder.backbone.prepare(data.inputs[rows])
    whole = new_encoder(data, blocks=None)
    expected = whole.module.model.get_base_model()(images)
    for one in (encoder, whole):
        adapter = one.adapter(seed=3)
        torch.testing.assert_close(one.forward(adapter, rows), expected, rtol=1e-5, atol=1e-5)
        assert same(adapter, one.adapter(seed=3)) and not same(adapter, one.adapter(seed=4))
    assert all(".blocks.0." not in name for name in encoder.shapes) and len(encoder.shapes) == 4


def moved(encoder, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: v + 0.3 * torch.randn(v.shape, generator=generator) for n, v in encoder.adapter(seed).items()}


def test_merged_weights_are_the_adapter(encoder):
    rows, adapter, none = torch.arange(10), moved(encoder), encoder.adapter(0)
    merged = encoder.forward(none, rows, base=encoder.merged(adapter, 1.0))
    torch.testing.assert_close(merged, encoder.forward(adapter, rows), rtol=1e-4, atol=1e-4)
    # negated and added: nothing is left
    undone = encoder.forward(adapter, rows, base=encoder.merged(adapter, -1.0))
    torch.testing.assert_close(undone, encoder.forward(none, rows), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, encoder.forward(none, rows), atol=0.1)


# ------------------------------------------------------------------------------------------------- who has what to see
class Without:
    """Grouped data in which looking at some things raises."""

    def __init__(self, data, *names):
        self._data, self._names = data, names

    def __getattr__(self, name):
        assert name not in self._names, f"looked at {name}"
        return getattr(self._data, name)


def test_the_developer_never_looks_at_the_attribute_nor_the_auditor_at_the_label(data, encoder):
    """Every method of two parties, each party made from data that the other's column cannot be read from."""
    blind, deaf = Without(data, "group", "group_names"), Without(data, "label", "label_names")
    for method in (*ONCE, *RAISED):
        plan = plan_of(method, epochs=1)
        found = {
            "developer": Developer(encoder, developer_view(blind), plan),
            "auditor": Auditor(encoder, auditor_view(deaf), plan),
        }
        exchange(found, turns(plan))
        together = run(encoder, data, plan)["developer"]
        assert same(found["developer"].model, together.model), method
    view = developer_view(data)
    assert set(vars(view)) == {"rows", "target", "classes"} and "test" not in view.rows
    for looked, at in ((blind, "group"), (deaf, "label")):
        with pytest.raises(AssertionError, match=f"looked at {at}"):
            getattr(looked, at)


def test_the_auditors_labels_change_no_earlier_message_of_the_developer(data, encoder):
    plan = plan_of("adv")
    said = []
    for group in (data.group, 1 - data.group):
        found = parties.parties(encoder, replace(data, group=group), plan)
        message, mine = None, []
        for name in turns(plan):
            message = found[name].turn(message)
            mine += [message] if name == "developer" else []
        said.append(mine)
    first, second = said
    assert first[0] == second[0] and len(first[0]) > 1000
    assert first[1] != second[1] and first[-1] is second[-1] is None


@pytest.mark.parametrize("method", [*ONCE, *RAISED])
def test_messages_hold_the_adapter_and_nothing_else(data, encoder, method):
    plan = plan_of(method, epochs=1)
    found, message, sent = parties.parties(encoder, data, plan), None, []
    for name in turns(plan):
        message = found[name].turn(message)
        if message is not None:
            sent.append((name, message))
    assert len(sent) == (1 if method in ONCE else 2 * (plan.rounds - 1))
    for name, message in sent:
        other = found[name].other
        number = sum(1 for who, _ in sent[: sent.index((name, message))] if who == name)
        tensors = decode(message, allowed=encoder.shapes, sender=name, receiver=other, round=number).tensors
        assert {n.rpartition("lora_")[2] for n in tensors} == {"A.weight", "B.weight"}
        assert sum(v.numel() for v in tensors.values()) == 2 * 2 * (12 + 36)
    lines = found["developer"].transcript.lines
    assert [line["message"] for line in lines] == [line["message"] for line in found["auditor"].transcript.lines]


def test_another_message_is_refused_and_nothing_of_it_used(data, encoder):
    plan = plan_of("orth")
    developer = Developer(encoder, developer_view(data), plan)
    before = {name: value.clone() for name, value in developer.learner.parameters.items()}
    adapter = moved(encoder)
    larger = {name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1) for name, value in adapter.items()}
    for tensors, words in ((larger, "agreed: float32"), (dict(list(adapter.items())[1:]), "missing")):
        with pytest.raises(Refused, match=words):
            developer.turn(encode(Message("auditor", "developer", 0, tensors)))
    with pytest.raises(Refused, match="round"):
        developer.turn(encode(Message("auditor", "developer", 1, adapter)))
    assert same(before, developer.learner.parameters) and not developer.transcript.lines


def test_disjoint_images_are_disjoint(data, encoder):
    developer, auditor = developer_view(data, images="disjoint"), auditor_view(data, images="disjoint")
    rows = developer.rows["training"].tolist(), auditor.rows["training"].tolist()
    assert not set(rows[0]) & set(rows[1]) and sorted(rows[0] + rows[1]) == data.part("training").tolist()
    assert developer.target["training"].tolist() == data.label[developer.rows["training"]].tolist()
    assert auditor.target["training"].tolist() == data.group[auditor.rows["training"]].tolist()
    with pytest.raises(PartyError, match="images is 'mine'; allowed: same, disjoint"):
        developer_view(data, images="mine")
    with pytest.raises(PartyError, match="label and attribute are of different images"):
        Central(encoder, developer, plan_of("erm"), attribute=auditor)


# ------------------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("erm", "unl-ascent")])
def test_without_strength_every_method_is_erm_bit_for_bit(data, encoder, method):
    expected = run(encoder, data, plan_of("erm", strength=0.0))["developer"]
    found = run(encoder, data, plan_of(method, strength=0.0))["developer"]
    model = {name: value for name, value in found.model.items() if not name.startswith("adversary")}
    assert same(model, expected.model) and found.curve == expected.curve
    rows = data.part("test")
    assert torch.equal(found.classify(found.features(rows)), expected.classify(expected.features(rows)))
    other = run(encoder, data, plan_of(method, strength=3.0))["developer"]
    assert not same({name: other.model[name] for name in model}, expected.model)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_turns_take_the_steps_of_the_one_training_loop(data, encoder, schedule):
    """A learner stopped after each step is training.train, which never stops."""
    rows, label = data.part("training"), data.label[data.part("training")]
    start = encoder.adapter(0) | {"W": torch.zeros(12, 2), "b": torch.zeros(1, 2)}
    scores = lambda values, index: head(values, encoder.forward(values, rows[index]))  # noqa: E731
    settings = dict(batch_size=8, learning_rate=0.01, schedule=schedule, weight_decay=0.01)
    expected = train(
        start,
        lambda values, index: scores(values, index[0])[None],
        lambda logits, y, group: cross_entropy(logits, y).mean(-1),
        batch=lambda index: (index, label[index], label[index]),
        n=len(rows), order_seeds=[4], optimiser_name="adamw", epochs=2, **settings,
    )  # fmt: skip
    learner = Learner(start, n=len(rows), steps=6, order_seeds=4, **settings)
    ends = []
    for _ in range(6):
        learner.advance(
            1,
            lambda values, index: cross_entropy(scores(values, index), label[index]).mean(),
            after_epoch=lambda values: ends.append(learner.step),
        )
    assert same({name: value.detach() for name, value in learner.parameters.items()}, expected) and ends == [3, 6]


def test_the_auditors_steps_raise_what_they_should(data, encoder):
    """With the refitted head: the loss on the attribute in Adv, the entropy of what it predicts in Ent."""
    for method in RAISED:
        auditor = Auditor(encoder, auditor_view(data), plan_of(method, strength=1.0, refit_steps=60, epochs=6))
        adapter = moved(encoder)
        after = {name: value.detach().clone() for name, value in auditor._moved(adapter).items()}
        own_head = {name: value.detach() for name, value in auditor._refit.parameters.items()}

        def measured(values, own_head=own_head, auditor=auditor, method=method):
            logits = head(own_head, encoder.forward_all(values, auditor.rows))
            loss = cross_entropy(logits, auditor.target) if method == "adv" else prediction_entropy(logits)
            return float(loss.mean())

        assert measured(after) > measured(adapter) + 0.01, method


def test_the_sensitive_adapter_and_its_controls(data, encoder):
    def auditor(**settings):
        return Auditor(encoder, auditor_view(data), plan_of("orth", epochs=15, **settings))

    trained, shuffled, random = auditor(), auditor(sensitive="shuffled"), auditor(sensitive="random")
    adapter, own_head = trained.sensitive_step()
    rows = trained.rows
    right = head(own_head, encoder.forward_all(adapter, rows)).argmax(-1) == trained.target
    assert right.double().mean() > 0.8
    assert sorted(shuffled.target.tolist()) == sorted(trained.target.tolist()) != shuffled.target.tolist()
    assert not same(adapter, shuffled.sensitive_step()[0]) and same(adapter, trained.released())
    drawn = random.released()
    assert same(random.known[0], adapter) and same(drawn, random.released())
    for name, value in adapter.items():
        assert float(drawn[name].norm()) == pytest.approx(float(value.norm()), rel=1e-5)
        assert not torch.allclose(drawn[name], value, atol=0.01)
    known = Auditor(encoder, auditor_view(data), plan_of("orth"), known=(adapter, own_head))
    assert known.sensitive_step()[0] is adapter


def test_the_central_control_reverses_the_adversarys_gradient(data, encoder):
    plan = plan_of("adv-central", strength=0.7)
    central = run(encoder, data, replace(plan, epochs=1))["developer"]
    values, index = central.learner.parameters, torch.arange(8)
    adversary = {name: values[f"adversary.{name}"] for name in ("W", "b")}
    features = encoder.forward(values, central.rows[index])
    task = cross_entropy(head(values, features), central.target[index]).mean()
    theirs = cross_entropy(head(adversary, features), central.attribute[index]).mean()
    names = list(values)
    found = torch.autograd.grad(central.objective(values, index), list(values.values()), retain_graph=True)
    of_task, of_theirs = (
        torch.autograd.grad(loss, list(values.values()), retain_graph=True, allow_unused=True)
        for loss in (task, theirs)
    )
    for name, one, lower, other in zip(names, found, of_task, of_theirs, strict=True):
        none = torch.zeros_like(one)
        factor = 1.0 if name.startswith("adversary") else -0.7
        expected = (none if lower is None else lower) + factor * (none if other is None else other)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


def test_the_best_epoch_is_kept_where_asked(data, encoder):
    plan = plan_of("erm", epochs=6, learning_rate=0.05)
    last, best = (run(encoder, data, replace(plan, keep=keep))["developer"] for keep in ("last", "best"))
    assert last.curve == best.curve and last.kept == 6
    assert best.kept == 1 + best.curve.index(max(best.curve))
    rows = data.part("validation")
    right = best.classify(best.features(rows)).argmax(-1) == data.label[rows]
    assert float(right.double().mean()) == pytest.approx(max(best.curve))


# --------------------------------------------------------------------------------------------------------- interrupted
class Stop(Exception):
    pass


@pytest.mark.parametrize("method", ["orth", "unl", "adv", "ent"])
def test_an_exchange_goes_on_from_what_was_saved(data, encoder, method, tmp_path):
    """Stopped after every turn and gone on with by new objects: the same model, bit for bit."""
    plan = plan_of(method, keep="best")
    expected = run(encoder, data, plan)["developer"]
    for _ in turns(plan)[1:]:
        found, taken = parties.parties(encoder, data, plan, folder=tmp_path), []

        def once(turn, taken=taken):
            def take(message):
                if taken:
                    raise Stop
                taken.append(True)
                return turn(message)

            return take

        for party in found.values():
            party.turn = once(party.turn)
        with pytest.raises(Stop):
            exchange(found, turns(plan), folder=tmp_path)
    found = parties.parties(encoder, data, plan, folder=tmp_path)
    assert exchange(found, turns(plan), folder=tmp_path)["resumed"] == len(turns(plan)) - 1
    assert same(found["developer"].model, expected.model) and found["developer"].curve == expected.curve


def test_nothing_to_load_is_one_line(data, encoder, tmp_path):
    with pytest.raises(PartyError, match="holds no state of the developer .*; save.. writes it"):
        Developer(encoder, developer_view(data), plan_of("erm")).load(tmp_path)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(method="fair"), "method is 'fair'; allowed: erm, unl"),
        (dict(sensitive="stolen"), "sensitive is 'stolen'; allowed: trained, shuffled, random"),
        (dict(keep="first"), "keep is 'first'; allowed: last, best"),
        (dict(method="adv"), "rounds is 1; allowed: 2 or more for adv, ent, ent-uniform, else 1"),
        (dict(method="orth", rounds=2), "rounds is 2"),
        (dict(strength=-1.0), "strength is -1.0; allowed: 0 or more"),
        (dict(strength=float("nan")), "strength is nan"),
    ],
)
def test_an_impossible_plan_is_one_line(settings, words):
    with pytest.raises(PartyError) as error:
        Plan(**settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_turn_out_of_order_is_one_line(data, encoder):
    found = parties.parties(encoder, data, plan_of("orth", epochs=1))
    with pytest.raises(PartyError, match="turn 1 of 1 of the developer has no message in orth"):
        found["developer"].turn(None)
    message = found["auditor"].turn(None)
    with pytest.raises(PartyError, match="the auditor's turn has a message in orth"):
        found["auditor"].turn(message)
    found["developer"].turn(message)
    with pytest.raises(PartyError, match="turn 2 of 1 of the developer"):
        found["developer"].turn(message)


# ----------------------------------------------------------------------------------------------------------- evaluator
def test_a_probe_finds_what_is_there_and_nothing_where_nothing_is(data):
    evaluator = Evaluator(data)
    group = {split: data.group[data.part(split)] for split in ("validation", "test")}
    noise = {
        split: torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(1)) for split, rows in group.items()
    }
    there = {split: noise[split] + 5 * group[split][:, None] for split in group}
    assert torch.equal(evaluator.probe(there), group["test"])
    assert (evaluator.probe(noise) == group["test"]).double().mean() < 0.8
    few = evaluator.probe(noise, examples=6, seed=0)
    assert few.shape == group["test"].shape and torch.equal(few, evaluator.probe(noise, examples=6, seed=0))


def test_the_oracles_gaps_are_the_metrics(data):
    scores = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    rows = data.part("validation")
    counts = group_counts(scores.argmax(-1), data.label[rows], group=data.group[rows], classes=2, groups=2)
    found = Evaluator(data).gaps(scores, "validation")
    assert set(found) == {"demographic_parity_difference", "false_positive_rate_difference"}
    for name, value in found.items():
        assert value == pytest.approx(float(METRICS[name].function(counts)))
