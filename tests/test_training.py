"""The training loop against slow twins: a plain loop, the same runs one by one, torch.nn modules with torch.optim."""

import doctest

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fairtuning import losses, networks, training
from fairtuning.networks import count, features, head, mlp, mlp_parameters, stack

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SIZES = (6, 8, 8, 2)
N, SEEDS = 203, (0, 1, 2, 7)  # the last batch of an epoch is a small one
RATES = {"adam": 0.01, "sgd": 0.05}


def mean_loss(logits, label, group):
    return losses.cross_entropy(logits, label).mean(-1)


def with_penalty(logits, label, group):
    """One intensity for all runs; losses has its own tests."""
    return 0.6 * mean_loss(logits, label, group) + 0.4 * losses.equalized_odds_penalty(logits, label, group)


def examples(*, n=N, d=SIZES[0], device="cpu"):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, d, generator=generator, dtype=torch.float64)
    group = torch.randint(2, (n,), generator=generator)
    label = (inputs[:, 0] + 0.5 * group + torch.randn(n, generator=generator) > 0).long()
    return inputs.to(device), label.to(device), group.to(device)


def train(parameters, seeds, *, optimiser, forward=mlp, objective=mean_loss, data=None, **changes):
    inputs, label, group = data or examples()
    settings = dict(
        batch=lambda index: (inputs[index], label[index], group[index]),
        n=len(label),
        order_seeds=seeds,
        optimiser_name=optimiser,
        learning_rate=RATES.get(optimiser, 0.01),
        epochs=4,
        batch_size=32,
    )
    return training.train(parameters, forward, objective, **settings | changes)


def start(seeds=SEEDS, device="cpu"):
    return {name: value.to(device) for name, value in stack([mlp_parameters(SIZES, seed=s) for s in seeds]).items()}


def equal(first, second, *, to=1e-10):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=to)


# --------------------------------------------------------------------------------------- stacked, alone, and by hand
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("objective", [mean_loss, with_penalty])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_stacked_runs_equal_runs_alone(optimiser, objective, device):
    how = dict(optimiser=optimiser, objective=objective, data=examples(device=device))
    together = train(start(device=device), SEEDS, **how)
    for index, seed in enumerate(SEEDS):
        alone = train(start([seed], device), [seed], **how)
        equal({name: value[index : index + 1] for name, value in together.items()}, alone)
        assert any((alone[name] - start([seed], device)[name]).abs().max() > 0.01 for name in alone)  # it did train


def by_hand(seed, *, optimiser, objective):
    """Modules with torch's layout (weights transposed), torch's optimiser, one batch after the other."""
    inputs, label, group = examples()
    layers = []
    for fan_in, fan_out in zip(SIZES, SIZES[1:], strict=False):
        layers += [torch.nn.Linear(fan_in, fan_out, dtype=torch.float64), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    linear = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    ours = mlp_parameters(SIZES, seed=seed)
    names = ["0", "1", ""]
    with torch.no_grad():
        for name, layer in zip(names, linear, strict=True):
            layer.weight.copy_(ours["W" + name].T)
            layer.bias.copy_(ours["b" + name][0])
    if optimiser == "adam":
        steps = torch.optim.Adam(model.parameters(), lr=RATES["adam"], foreach=False)
    else:
        steps = torch.optim.SGD(model.parameters(), lr=RATES["sgd"], momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        order = torch.randperm(N, generator=generator)
        for first in range(0, N, 32):
            index = order[first : first + 32]
            steps.zero_grad()
            if objective is mean_loss:
                loss = torch.nn.functional.cross_entropy(model(inputs[index]), label[index])
            else:
                loss = objective(model(inputs[index]), label[index], group[index])
            loss.backward()
            steps.step()
    trained = {}
    for name, layer in zip(names, linear, strict=True):
        trained |= {"W" + name: layer.weight.detach().T, "b" + name: layer.bias.detach()[None]}
    return trained


@pytest.mark.parametrize("objective", [mean_loss, with_penalty])
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_stacked_runs_equal_torch_modules(optimiser, objective):
    together = train(start(), SEEDS, optimiser=optimiser, objective=objective)
    for index, seed in enumerate(SEEDS):
        equal(
            {name: value[index] for name, value in together.items()},
            by_hand(seed, optimiser=optimiser, objective=objective),
        )


def test_frozen_features_give_the_same_as_a_frozen_network():
    """What the studies do: features computed once, and each run with its own inputs."""
    inputs, label, group = examples()
    frozen = start()
    z = features(frozen, inputs)
    run = torch.arange(len(SEEDS))[:, None]
    trained = train(
        {name: frozen[name] for name in "Wb"},
        SEEDS,
        optimiser="sgd",
        forward=head,
        batch=lambda index: (z[run, index], label[index], group[index]),
    )
    hidden = {name: value for name, value in frozen.items() if name not in "Wb"}
    whole = train(
        {name: frozen[name] for name in "Wb"},
        SEEDS,
        optimiser="sgd",
        forward=lambda parameters, inputs: mlp(hidden | parameters, inputs),
    )
    equal(trained, whole)


# ----------------------------------------------------------------------------------------------------------- in pieces
def plain_loop(parameters, seeds, *, optimiser, schedule, decay, epochs=4, rate=0.01, size=32):
    """No function of ``training``: epoch by epoch, batch by batch. Returns the parameters, and W after each epoch."""
    inputs, label, group = examples()
    values = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    made = {
        "adam": lambda: torch.optim.Adam(values.values(), lr=rate, fused=True),
        "adamw": lambda: torch.optim.AdamW(values.values(), lr=rate, weight_decay=decay, fused=True),
        "sgd": lambda: torch.optim.SGD(values.values(), lr=rate, momentum=0.9),
    }[optimiser]()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    step, steps, curve = 0, epochs * -(-N // size), []
    for _ in range(epochs):
        orders = torch.stack([torch.randperm(N, generator=generator) for generator in generators])
        for first in range(0, N, size):
            if schedule == "cosine":
                made.param_groups[0]["lr"] = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
            index = orders[:, first : first + size]
            made.zero_grad()
            mean_loss(mlp(values, inputs[index]), label[index], group[index]).sum().backward()
            made.step()
            step += 1
        curve.append(values["W"].detach().clone())
    return {name: value.detach() for name, value in values.items()}, curve


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("optimiser", ["adam", "adamw", "sgd"])
def test_in_one_go_and_in_pieces_are_a_plain_loop_bit_for_bit(optimiser, schedule):
    """The pieces end within epochs, at their ends and beyond, each in a new Learner with the state of the last."""
    inputs, label, group = examples()
    settings = dict(learning_rate=0.01, batch_size=32, schedule=schedule, weight_decay=0.1)
    expected, curve = plain_loop(start(), SEEDS, optimiser=optimiser, schedule=schedule, decay=0.1)
    seen = []
    how = dict(optimiser=optimiser, after_epoch=lambda now: seen.append(now["W"].clone()))
    equal(train(start(), SEEDS, **how | settings), expected, to=0)
    assert len(seen) == len(curve) == 4 and all(map(torch.equal, seen, curve))

    alone = {name: value[1] for name, value in expected.items()}
    for order_seeds, first, wanted in ((SEEDS, start(), expected), (SEEDS[1], mlp_parameters(SIZES, seed=1), alone)):
        state, ends = None, []
        for steps in (0, 3, 4, 1, 13, 7):  # 28 steps, 7 in an epoch
            learner = training.Learner(
                first, n=N, steps=28, order_seeds=order_seeds, optimiser_name=optimiser, **settings
            )
            if state is not None:
                learner.restore(state)
            learner.advance(
                steps,
                lambda values, index: mean_loss(mlp(values, inputs[index]), label[index], group[index]),
                after_epoch=lambda values, learner=learner, ends=ends: ends.append(learner.step),
            )
            state = {name: value.clone() for name, value in learner.state().items()}
        assert ends == [7, 14, 21, 28]
        to = 0 if order_seeds is SEEDS else 1e-10  # one run alone multiplies other matrices
        equal({name: value.detach() for name, value in learner.parameters.items()}, wanted, to=to)


# ------------------------------------------------------------------------------------------------------- convergence
@pytest.mark.parametrize("factors", [False, True])
def test_convergence_reaches_the_solution_of_the_convex_problem(factors):
    """A head on fixed inputs is logistic regression; at full rank its two factors can reach the same solution."""
    inputs, label, group = examples(n=400)
    sk = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000).fit(inputs.numpy(), label.numpy())
    parameters = {name: value for name, value in mlp_parameters((SIZES[0], 2), seed=0).items()}
    if factors:
        a, b = mlp_parameters((SIZES[0], 2), seed=1)["W"], torch.tensor([[1.0, 0.5], [-0.5, 1.0]]).double()
        parameters = {"A": a, "B": b, "b": parameters["b"]}
    before = {name: value.clone() for name, value in parameters.items()}
    trained = training.train_to_convergence(parameters, head, mean_loss, data=(inputs, label, group))
    equal(parameters, before, to=0)
    logits = head(trained, inputs)
    theirs = torch.from_numpy(sk.decision_function(inputs.numpy()))
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], theirs, rtol=0, atol=1e-5)
    # The gradient, which is what tells that it converged.
    leaves = {name: value.requires_grad_() for name, value in trained.items()}
    mean_loss(head(leaves, inputs), label, group).backward()
    assert max(value.grad.abs().max() for value in leaves.values()) < 1e-8


# --------------------------------------------------------------------------------------------------- order and steps
def test_data_order_depends_on_the_seed_alone():
    first = list(training.data_order(50, [3, 1, 3], 4))
    assert [order.shape for order in first] == [(3, 50)] * 4
    assert all(torch.equal(order[0], order[2]) and not torch.equal(order[0], order[1]) for order in first)
    assert all(sorted(row.tolist()) == list(range(50)) for order in first for row in order)
    assert not torch.equal(first[0][0], first[1][0])
    other = list(training.data_order(50, [1], 6))  # other company, more epochs
    assert all(torch.equal(order[1], alone[0]) for order, alone in zip(first, other, strict=False))


def test_every_example_is_used_once_in_an_epoch():
    seen = []
    inputs, label, group = examples()

    def batch(index):
        seen.append(index)
        return inputs[index], label[index], group[index]

    train(start(), SEEDS, optimiser="sgd", epochs=1, batch=batch)
    assert [index.shape[1] for index in seen] == [32] * 6 + [11]
    assert (torch.cat(seen, 1).sort(1).values == torch.arange(N)).all()


def test_after_epoch_sees_the_parameters_and_nothing_given_is_changed():
    given, seen = start(), []
    before = {name: value.clone() for name, value in given.items()}
    trained = train(given, SEEDS, optimiser="adam", after_epoch=lambda now: seen.append(now["W"].clone()))
    assert len(seen) == 4 and torch.equal(seen[-1], trained["W"])
    equal(given, before, to=0)
    assert not any(value.requires_grad for value in (*given.values(), *trained.values()))
    assert not any(value.requires_grad for value in seen)
    equal(train(given, SEEDS, optimiser="adam", epochs=0), before, to=0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"epochs": -1}, "epochs -1"),
        ({"batch_size": 0}, "batch size 0"),
        ({"learning_rate": 0.0}, "learning rate 0.0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"optimiser_name": "lbfgs"}, "'lbfgs'; allowed here: adam, adamw, sgd"),
        ({"optimiser_name": "rmsprop"}, "'rmsprop'; allowed here: adam, adamw, sgd"),
    ],
)
def test_errors_say_what_is_allowed(changes, words):
    with pytest.raises(ValueError) as caught:
        train(start(), SEEDS, optimiser="adam", **changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- networks
def test_initial_weights_are_those_of_torch():
    """Uniform in +-1/sqrt(fan in), weights and biases, in every layer, as torch.nn.Linear draws them."""
    ours = stack([mlp_parameters((100, 50, 2), seed=seed) for seed in range(20)])
    theirs = torch.nn.Linear(100, 50)
    for name, bound in (("W0", 0.1), ("b0", 0.1), ("W", 50**-0.5), ("b", 50**-0.5)):
        values = ours[name]
        assert values.abs().max() <= bound and values.abs().max() > 0.9 * bound
        assert abs(float(values.mean())) < 5 * bound / (3 * values.numel()) ** 0.5
    assert float(ours["W0"].std()) == pytest.approx(float(theirs.weight.detach().std()), rel=0.05)
    again = mlp_parameters((100, 50, 2), seed=3)
    equal({name: value[3] for name, value in ours.items()}, again, to=0)
    single = mlp_parameters((100, 50, 2), seed=3, dtype=torch.float32)
    assert single["W0"].dtype == torch.float32 and torch.equal(single["W0"], again["W0"].float())


def test_a_factored_head_is_the_head_of_its_product():
    a, b, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5, 2), (3, 2, 4), (3, 1, 4)))
    inputs = torch.randn(3, 7, 5, dtype=torch.float64)
    product = head({"W": a @ b, "b": bias}, inputs)
    torch.testing.assert_close(head({"A": a, "B": b, "b": bias}, inputs), product, rtol=0, atol=1e-12)


def test_count():
    assert count(mlp_parameters((13, 20, 20, 2), seed=0)) == 742
    assert count({"A": torch.zeros(4, 2), "b": torch.zeros(1, 3)}) == 11


def test_doctests():
    for module in (networks, training):
        assert doctest.testmod(module).failed == 0


def test_cosine_falls_from_the_rate_to_near_zero_and_a_constant_rate_stays():
    factors = [training.rate_factor("cosine", step, 10) for step in range(10)]
    assert factors[0] == 1 and factors[5] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True) and 0 < factors[-1] < 0.03
    assert {training.rate_factor("constant", step, 10) for step in range(10)} == {1.0}
    with pytest.raises(ValueError, match="schedule is 'linear'; allowed: constant, cosine"):
        training.rate_factor("linear", 0, 10)
