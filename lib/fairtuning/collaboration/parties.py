"""Developer, auditor and evaluator of arXiv 2503.05684: what each of them holds, and what each does in its turn.

The developer has images and labels, the auditor images and the sensitive attribute; what crosses between them is a
LoRA adapter (``collaboration.messages``). Each keeps its head, its data and the state of its optimiser to itself. The
paper's equations and settings could not be had: every method here is our reading of what the paper says in words.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fairtuning import FairtuningError
from fairtuning.collaboration import leakage
from fairtuning.collaboration.messages import Message, decode, encode
from fairtuning.collaboration.transcript import Transcript
from fairtuning.datasets import GroupedData
from fairtuning.losses import (
    cross_covariance_penalty,
    cross_entropy,
    cross_entropy_to_uniform,
    prediction_entropy,
    squared_cosine_penalty,
    subspace_overlap_penalty,
)
from fairtuning.metrics import METRICS, group_counts
from fairtuning.networks import Parameters, head, mlp_parameters
from fairtuning.training import Learner
from fairtuning.vision.network import Network

#: The auditor sends a sensitive adapter once, then the developer trains.
ONCE = ("unl", "unl-ascent", "orth", "orth-cosine", "orth-weight")
#: One adapter goes to and fro: the developer lowers the task loss, the auditor raises what is named here.
RAISED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "adv": lambda logits, attribute: cross_entropy(logits, attribute).mean(),
    "ent": lambda logits, attribute: prediction_entropy(logits).mean(),
    "ent-uniform": lambda logits, attribute: -cross_entropy_to_uniform(logits).mean(),
}
METHODS = ("erm", *ONCE, *RAISED, "adv-central")
IMAGES = ("same", "disjoint")
SENSITIVE = ("trained", "shuffled", "random")
GAPS = ("demographic_parity_difference", "false_positive_rate_difference")  # that the paper names
HEAD_RATE = 0.01  # of AdamW, where the auditor refits its head alone


class PartyError(FairtuningError):
    """A turn that a party cannot take."""


# ------------------------------------------------------------------------------------------------------- what is held
@dataclass(frozen=True, eq=False)
class View:
    """What one party has of grouped data: by split the numbers of its images and one value for each, nothing more."""

    rows: dict[str, Tensor]
    target: dict[str, Tensor]
    classes: int


def developer_view(data: GroupedData, *, images: str = "same") -> View:
    """Images and labels for training and validation. The attribute is not read."""
    rows = {split: _own(data, split, images, half=0) for split in ("training", "validation")}
    return View(rows, {split: data.label[index] for split, index in rows.items()}, len(data.label_names))


def auditor_view(data: GroupedData, *, images: str = "same") -> View:
    """Images and attribute for training and validation. The label is not read."""
    rows = {split: _own(data, split, images, half=1) for split in ("training", "validation")}
    return View(rows, {split: data.group[index] for split, index in rows.items()}, len(data.group_names))


def _own(data: GroupedData, split: str, images: str, half: int) -> Tensor:
    """All images of a split for both, or where they are disjoint a random half for each, the same for all seeds."""
    if images not in IMAGES:
        raise PartyError(f"images is {images!r}; allowed: {', '.join(IMAGES)}")
    rows = data.part(split)
    if images == "same" or split != "training":
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order.chunk(2)[half].sort().values]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the parties train, agreed beforehand. Seeds: a party's own draws come from ``seed`` and who it is."""

    method: str = "erm"
    strength: float = 0.0  # lambda of Orth, gamma of Unl; else what the auditor's rate is of the developer's
    learning_rate: float = 0.001
    schedule: str = "cosine"
    batch_size: int = 64
    epochs: int = 3
    weight_decay: float = 0.01
    rounds: int = 1  # turns of the developer
    refit_steps: int = 20  # of the auditor's head in each of its turns
    raise_share: float = 0.5  # steps of the auditor on the adapter, for each of the developer's
    keep: str = "last"  # or the developer's best epoch by validation accuracy (the first of equals)
    sensitive: str = "trained"  # the adapter that the auditor sends; shuffled and random are controls
    clip: float = 0.0  # and what it does to it before: leakage.clip_and_noise
    noise: float = 0.0
    seed: int = 0
    order_seed: int = 0

    def __post_init__(self):
        for value, allowed, what in (
            (self.method, METHODS, "method"),
            (self.sensitive, SENSITIVE, "sensitive"),
            (self.keep, ("last", "best"), "keep"),
        ):
            if value not in allowed:
                raise PartyError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
        if self.rounds < 1 or (self.rounds > 1) != (self.method in RAISED):
            raise PartyError(f"rounds is {self.rounds}; allowed: 2 or more for {', '.join(RAISED)}, else 1")
        if not self.strength >= 0:
            raise PartyError(f"strength is {self.strength}; allowed: 0 or more")
        if not (self.clip >= 0 and self.noise >= 0) or (self.noise and not self.clip):
            raise PartyError(
                f"clip is {self.clip} and noise {self.noise}; allowed: 0 or more, and noise with a clip above 0 only"
            )


def turns(plan: Plan) -> list[str]:
    """Whose turn it is, from the first to the last."""
    if plan.method in ONCE:
        return ["auditor", "developer"]
    return ["developer", *["auditor", "developer"] * (plan.rounds - 1)]


# ------------------------------------------------------------------------------------------------------------ parties
class _Party:
    """What developer and auditor have in common: an encoder, a view, a plan, a transcript, and how they speak."""

    name: str
    other: str

    def __init__(self, encoder: Network, view: View, plan: Plan, *, transcript: Transcript | None = None):
        self.encoder, self.view, self.plan = encoder, view, plan
        self.transcript = transcript or Transcript(None, party=self.name)
        self.turns = 0  # taken
        self.rows, self.target = view.rows["training"], view.target["training"]
        self.steps = plan.epochs * math.ceil(len(self.rows) / plan.batch_size)

    def _new(self) -> tuple[Parameters, Parameters]:
        """An adapter and a head of this party's own draws."""
        seed = 2 * self.plan.seed + (self.name == "auditor")
        return self.encoder.adapter(seed), {
            name: value.to(self.encoder.device)
            for name, value in mlp_parameters(
                (self.encoder.width, self.view.classes), seed=seed, dtype=torch.float32
            ).items()
        }

    def _learner(self, parameters: Parameters, **settings: object) -> Learner:
        usual = {
            "n": len(self.rows),
            "steps": self.steps,
            "order_seeds": 2 * self.plan.order_seed + (self.name == "auditor"),
            "batch_size": self.plan.batch_size,
            "learning_rate": self.plan.learning_rate,
            "schedule": self.plan.schedule,
            "weight_decay": self.plan.weight_decay,
        }
        return Learner(parameters, **usual | settings)

    def _receive(self, data: bytes, *, round: int) -> Parameters:
        """The adapter in a message that is what was agreed. Raises Refused for any other."""
        message = decode(data, allowed=self.encoder.shapes, sender=self.other, receiver=self.name, round=round)
        self.transcript.append("received", data)
        return {name: value.to(self.encoder.device) for name, value in message.tensors.items()}

    def _send(self, values: Parameters, *, round: int) -> bytes:
        adapter = {name: values[name] for name in self.encoder.shapes}
        data = encode(Message(self.name, self.other, round, adapter))
        self.transcript.append("sent", data)
        return data

    def _part_of(self, steps: int) -> int:
        """The share of this turn in so many steps, spread over the developer's turns."""
        rounds = self.plan.rounds
        return steps * (self.turns + 1) // rounds - steps * self.turns // rounds

    def _state(self) -> dict[str, Parameters]:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Everything that the next turn needs and the data do not hold; for this party's own disk, never to be sent."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{part}:{name}": v for part, state in self._state().items() for name, v in state.items()}
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / f"{self.name}.safetensors")
        facts = {"turns": self.turns, "curve": getattr(self, "curve", [])}
        (folder / f"{self.name}.json").write_text(json.dumps(facts))

    def load(self, folder: Path) -> None:
        """Goes on from where ``save`` left it. Raises PartyError where there is nothing of this party."""
        from safetensors.torch import load_file

        try:
            facts = json.loads((folder / f"{self.name}.json").read_text())
            tensors = load_file(folder / f"{self.name}.safetensors", device=str(self.encoder.device))
        except OSError as error:
            raise PartyError(
                f"{folder} holds no state of the {self.name} ({error.strerror}); save() writes it"
            ) from None
        states: dict[str, Parameters] = {}
        for key, value in tensors.items():
            part, _, name = key.partition(":")
            states.setdefault(part, {})[name] = value
        self.turns = facts["turns"]
        if "curve" in facts and hasattr(self, "curve"):
            self.curve = facts["curve"]
        self._restore(states)

    def _restore(self, states: dict[str, Parameters]) -> None:
        raise NotImplementedError


class Developer(_Party):
    """Has images and labels, and trains adapter and head on the task. Never holds the attribute or a predictor of it.

    Erm: the task loss alone. Unl: the same from weights without ``strength`` times the auditor's adapter. Orth: the
    task loss plus ``strength`` times a penalty on what is shared with the auditor's adapter. Adv and Ent: the task
    loss, on an adapter that the auditor changes between turns.
    """

    name, other = "developer", "auditor"

    def __init__(self, encoder: Network, view: View, plan: Plan, *, transcript: Transcript | None = None):
        super().__init__(encoder, view, plan, transcript=transcript)
        adapter, own_head = self._new()
        self.learner = self._learner(adapter | own_head)
        self.base: Parameters = {}  # frozen weights that an auditor's adapter has changed
        self.sensitive: Parameters = {}  # the auditor's adapter, and its features of the training images:
        self._features: Tensor | None = None
        self.curve: list[float] = []  # validation accuracy by epoch
        self._best: Parameters = {}

    def turn(self, incoming: bytes | None) -> bytes | None:
        """Takes in the auditor's adapter, trains, and answers with its own where there is another round to come."""
        self._take(incoming)
        self.learner.advance(self._part_of(self.steps), self.objective, after_epoch=self._after_epoch)
        self.turns += 1
        if self.turns < self.plan.rounds:
            return self._send(self.learner.parameters, round=self.turns - 1)
        return None

    def _take(self, incoming: bytes | None) -> None:
        expected = self.plan.method in ONCE or self.turns > 0
        if expected != (incoming is not None) or self.turns >= self.plan.rounds:
            has = "a message" if incoming is not None else "no message"
            raise PartyError(
                f"turn {self.turns + 1} of {self.plan.rounds} of the developer has {has} in {self.plan.method}"
            )
        if incoming is None:
            return
        adapter = self._receive(incoming, round=max(0, self.turns - 1))
        if self.plan.method in RAISED:
            self.learner.set(adapter)
        else:
            self._use(adapter)

    def _use(self, sensitive: Parameters) -> None:
        """The auditor's adapter of Unl and Orth."""
        self.sensitive = sensitive
        if self.plan.method.startswith("unl"):
            factor = 1.0 if self.plan.method == "unl-ascent" else -self.plan.strength
            self.base = self.encoder.merged(sensitive, factor)
        elif self.plan.method != "orth-weight":
            features = self.encoder.forward_all(sensitive, self.rows)
            self._spread = features.var(0).sum().sqrt()  # the unit of both features, so that lambda has one meaning
            self._features = features / self._spread

    def objective(self, parameters: Parameters, index: Tensor) -> Tensor:
        """The task loss of a batch, and what the method adds to it."""
        features = self.encoder.forward(parameters, self.rows[index], base=self.base)
        label = self.target[index].to(features.device)
        loss = cross_entropy(head(parameters, features), label).mean()
        if not self.plan.method.startswith("orth"):
            return loss
        return loss + self.plan.strength * self.penalty(parameters, features, index)

    def penalty(self, parameters: Parameters, features: Tensor, index: Tensor) -> Tensor:
        """Of Orth: on features, or on weights."""
        if self.plan.method == "orth-weight":
            return subspace_overlap_penalty(self.encoder.factors(parameters), self.encoder.factors(self.sensitive))
        form = squared_cosine_penalty if self.plan.method == "orth-cosine" else cross_covariance_penalty
        return form(features / self._spread, self._features[index])

    @property
    def kept(self) -> int:
        """The epoch, from 1, whose adapter and head are kept."""
        return 1 + self.curve.index(max(self.curve)) if self.plan.keep == "best" else len(self.curve)

    @property
    def model(self) -> Parameters:
        """Adapter and head of the epoch that is kept."""
        return self._best if self.plan.keep == "best" else self.learner.parameters

    @torch.no_grad()
    def features(self, rows: Tensor) -> Tensor:
        """``[n, p]`` with the trained adapter."""
        return self.encoder.forward_all(self.model, rows, base=self.base)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Logits ``[n, classes]`` of the trained classifier, on the CPU."""
        return head(self.model, features).cpu()

    def _after_epoch(self, parameters: Parameters) -> None:
        rows = self.view.rows["validation"]
        features = self.encoder.forward_all(parameters, rows, base=self.base)
        right = head(parameters, features).argmax(-1).cpu() == self.view.target["validation"]
        self.curve.append(float(right.double().mean()))
        if max(self.curve) > max(self.curve[:-1], default=-1.0):
            self._best = {name: value.detach().clone() for name, value in parameters.items()}

    def _state(self) -> dict[str, Parameters]:
        return {"learner": self.learner.state(), "best": self._best, "sensitive": self.sensitive}

    def _restore(self, states: dict[str, Parameters]) -> None:
        self.learner.restore(states["learner"])
        self._best = states.get("best", {})
        if "sensitive" in states:
            self._use(states["sensitive"])


class Auditor(_Party):
    """Has images and the attribute. Trains a sensitive adapter and sends it, or undoes what an adapter tells of it.

    ``known``: a sensitive adapter and head that were trained before (``sensitive_step``).
    """

    name, other = "auditor", "developer"

    def __init__(
        self,
        encoder: Network,
        view: View,
        plan: Plan,
        *,
        transcript: Transcript | None = None,
        known: tuple[Parameters, Parameters] | None = None,
    ):
        super().__init__(encoder, view, plan, transcript=transcript)
        self.known = known
        if plan.sensitive == "shuffled":
            order = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(plan.seed))
            self.target = self.target[order]
        adapter, own_head = self._new()
        if plan.method in RAISED:
            each = math.ceil(plan.raise_share * self.steps / plan.rounds)
            self._refit = self._learner(
                own_head,
                steps=plan.refit_steps * (plan.rounds - 1),
                learning_rate=HEAD_RATE,
                schedule="constant",
            )
            self._raise = self._learner(
                adapter,
                steps=each * (plan.rounds - 1),
                learning_rate=plan.strength * plan.learning_rate,
                weight_decay=0.0,
            )
            self._raise_steps = each

    def turn(self, incoming: bytes | None) -> bytes | None:
        """Adv and Ent: refits the head on the adapter received, moves the adapter, sends it. Else: sends its own."""
        if (incoming is not None) != (self.plan.method in RAISED) or self.plan.method not in (*ONCE, *RAISED):
            has = "a message" if incoming is not None else "no message"
            raise PartyError(f"the auditor's turn has {has} in {self.plan.method}")
        if self.plan.method in RAISED:
            adapter = self._moved(self._receive(incoming, round=self.turns))
        else:
            adapter = self.released()
        data = self._send(adapter, round=self.turns)
        self.turns += 1
        return data

    def sensitive_step(self) -> tuple[Parameters, Parameters]:
        """The adapter and head that predict the attribute best: the task's loss and settings, with the attribute."""
        if self.known is None:
            adapter, own_head = self._new()
            learner = self._learner(adapter | own_head)
            learner.advance(self.steps, lambda values, index: self._loss(values, values, index, cross_entropy).mean())
            found = {name: value.detach() for name, value in learner.parameters.items()}
            self.known = {name: found[name] for name in adapter}, {name: found[name] for name in own_head}
        return self.known

    def released(self) -> Parameters:
        """What is sent in Unl and Orth. A random adapter has the sizes (Frobenius norms) of the trained one."""
        adapter, own_head = self.sensitive_step()
        if self.plan.method == "unl-ascent":
            steps = math.ceil(len(self.rows) / self.plan.batch_size)
            rate = self.plan.strength * self.plan.learning_rate
            learner = self._learner(adapter, steps=steps, learning_rate=rate)
            learner.advance(steps, lambda values, index: -self._loss(values, own_head, index, cross_entropy).mean())
            adapter = {name: value.detach() for name, value in learner.parameters.items()}
        if self.plan.sensitive == "random":
            generator = torch.Generator().manual_seed(self.plan.seed)
            drawn = {name: torch.randn(value.shape, generator=generator) for name, value in adapter.items()}
            adapter = {name: drawn[name].to(v.device) * v.norm() / drawn[name].norm() for name, v in adapter.items()}
        seed = 2 * self.plan.seed + 1  # of the auditor's own draws
        return leakage.clip_and_noise(adapter, clip=self.plan.clip, noise=self.plan.noise, seed=seed)

    def _moved(self, adapter: Parameters) -> Parameters:
        """The adapter after steps that raise the head's loss, or its entropy; before them the head is refitted."""
        self._refit.advance(
            self.plan.refit_steps,
            lambda values, index: cross_entropy(
                head(values, self._seen(adapter, index)), self.target[index].to(self.encoder.device)
            ).mean(),
        )
        own_head = {name: value.detach() for name, value in self._refit.parameters.items()}
        self._raise.set(adapter)
        raised = RAISED[self.plan.method]
        self._raise.advance(self._raise_steps, lambda values, index: -self._loss(values, own_head, index, raised))
        return self._raise.parameters

    def _loss(
        self, adapter: Parameters, own_head: Parameters, index: Tensor, form: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        features = self.encoder.forward(adapter, self.rows[index])
        return form(head(own_head, features), self.target[index].to(features.device))

    @torch.no_grad()
    def _seen(self, adapter: Parameters, index: Tensor) -> Tensor:
        return self.encoder.forward(adapter, self.rows[index])

    def _state(self) -> dict[str, Parameters]:
        if self.plan.method in RAISED:
            return {"refit": self._refit.state(), "raise": self._raise.state()}
        adapter, own_head = self.known or ({}, {})
        return {"adapter": adapter, "head": own_head}

    def _restore(self, states: dict[str, Parameters]) -> None:
        if self.plan.method in RAISED:
            self._refit.restore(states["refit"])
            self._raise.restore(states["raise"])
        elif "adapter" in states:
            self.known = states["adapter"], states["head"]


class Central(Developer):
    """The control that privacy forbids: label and attribute in one hand, and the adversary's gradient reversed.

    Adapter and task head lower the task loss less ``strength`` times the adversary's; the adversary's head lowers its
    own.
    """

    def __init__(self, encoder: Network, view: View, plan: Plan, *, attribute: View):
        super().__init__(encoder, view, plan)
        if not torch.equal(view.rows["training"], attribute.rows["training"]):
            raise PartyError("label and attribute are of different images; allowed here: images = same")
        self.attribute = attribute.target["training"]
        adversary = mlp_parameters((encoder.width, attribute.classes), seed=2 * plan.seed + 1, dtype=torch.float32)
        own = {name: value.detach() for name, value in self.learner.parameters.items()}
        adversary = {f"adversary.{name}": value.to(encoder.device) for name, value in adversary.items()}
        self.learner = self._learner(own | adversary)

    def objective(self, parameters: Parameters, index: Tensor) -> Tensor:
        features = self.encoder.forward(parameters, self.rows[index])
        task = cross_entropy(head(parameters, features), self.target[index].to(features.device)).mean()
        # the value of the features, and -strength times their gradient
        reversed_ = features.detach() - self.plan.strength * (features - features.detach())
        adversary = {name: parameters[f"adversary.{name}"] for name in ("W", "b")}
        return task + cross_entropy(head(adversary, reversed_), self.attribute[index].to(features.device)).mean()


# ---------------------------------------------------------------------------------------------------------- evaluator
class Evaluator:
    """Has label and attribute of validation and test images; sees a finished model and sends nothing."""

    def __init__(self, data: GroupedData):
        self.data = data

    def gaps(self, scores: Tensor, split: str) -> dict[str, float]:
        """The paper's two gaps, of logits ``[n, classes]``: what an oracle would select by. NaN counts as 1."""
        rows, data = self.data.part(split), self.data
        sizes = {"classes": len(data.label_names), "groups": len(data.group_names)}
        counts = group_counts(scores.argmax(-1), data.label[rows], group=data.group[rows], **sizes)
        return {name: float(METRICS[name].function(counts).nan_to_num(1.0)) for name in GAPS}

    def probe(self, features: Mapping[str, Tensor], *, examples: int | None = None, seed: int = 0) -> Tensor:
        """What a fresh linear classifier (``leakage.reader``) predicts of the attribute, ``[n]`` of the test images.

        ``features``: ``[n, p]`` of the validation images, on which it is fitted (``examples``: on so many of them,
        drawn by ``seed``), and of the test images.
        """
        order = torch.randperm(len(features["validation"]), generator=torch.Generator().manual_seed(seed))[:examples]
        known = self.data.group[self.data.part("validation")][order]
        classifier = leakage.reader(features["validation"][order], known)
        return torch.from_numpy(classifier.predict(features["test"].double().cpu().numpy()))

    def clusters(self, features: Mapping[str, Tensor], *, seed: int = 0) -> Tensor:
        """The same without any known attribute, ``[n]`` of the test images: as many clusters of the validation images'
        features as there are groups. Which cluster stands for which group is what fits the validation images best.
        """
        number, known = len(self.data.group_names), self.data.group[self.data.part("validation")]
        public, target = leakage.clusters(features["validation"], features["test"], number=number, seed=seed)
        return leakage.matching(public, known, number=number)[target]


def parties(
    encoder: Network,
    data: GroupedData,
    plan: Plan,
    *,
    images: str = "same",
    known: tuple[Parameters, Parameters] | None = None,
    folder: Path | None = None,
) -> dict[str, Developer | Auditor]:
    """Those who take part in a method, by name, each with its own view of ``data`` and nothing of the other's.

    ``known``: of the auditor. ``folder``: each writes its transcript to ``folder/<name>/transcript.jsonl``.
    """
    developer = developer_view(data, images=images)
    if plan.method == "adv-central":
        return {"developer": Central(encoder, developer, plan, attribute=auditor_view(data, images=images))}

    def transcript(name: str) -> Transcript:
        return Transcript(folder / name / "transcript.jsonl" if folder else None, party=name)

    found: dict[str, Developer | Auditor] = {
        "developer": Developer(encoder, developer, plan, transcript=transcript("developer"))
    }
    if plan.method != "erm":
        view = auditor_view(data, images=images)
        found["auditor"] = Auditor(encoder, view, plan, transcript=transcript("auditor"), known=known)
    return found
