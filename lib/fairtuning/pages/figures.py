"""The figures of the book: one theme, one colour and marker per method, each drawn for light and for dark pages."""

import base64
import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import seaborn
from matplotlib import cycler, rc_context
from matplotlib.figure import Figure as Canvas
from pandas import DataFrame

from fairtuning.analysis import Results
from fairtuning.pages.tables import TITLES, Effects, Missing, having
from fairtuning.statistics import Effect, Estimate, estimate

TEXT = {"light": "#1f2328", "dark": "#e6edf3"}
#: Okabe and Ito's colours, told apart by readers with any common colour blindness; light enough for dark pages too.
COLOURS = {
    "light": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#996F00", "#3A8FB7", "#555555"],
    "dark": ["#56B4E9", "#E69F00", "#2FC796", "#E19BC4", "#F0E442", "#8CC8EA", "#BBBBBB"],
}
MARKERS = ["o", "s", "^", "D", "v", "P", "X", ">", "<", "*", "p", "d", "h", "8"]
#: Every method's place in COLOURS (after the last again from the first, dotted) and MARKERS, in all figures.
PLACES = {
    method: place
    for methods in (
        ["TL", "f+SVD", "OURS", "Retrain", "Retrain+EO", "Retrain+DP", "pre-trained", "pooled", "random"],
        ["LoRA", "FairLoRA", "FFT", "FairFFT"],
        ["Erm", "Unl", "Adv", "Orth", "Orth/weight", "Ent"],
        ["ERM", "MLP", "P1", "variance by class", "variance by attribute", "variance by cell", "DP", "EO", "group DRO"],
    )
    for place, method in enumerate(methods)
} | {"reweighting": 9, "DFR": 10, "paper": 1}
DASHES = ["", (4, 1.5), (1, 1), (3, 1.2, 1, 1.2)]  # of the names of one method
#: How seaborn draws what ``long`` gives it: the median of three is the effect, their range its interval.
WHOLE = {"estimator": "median", "errorbar": ("pi", 100)}


# ---------------------------------------------------------------------------------------------------- theme and palette
class Figure:
    """A figure drawn once for light and once for dark pages; ``draw(figure, colours)`` fills a matplotlib figure.

    ``alt`` says in words what the figure shows; it is required.
    """

    def __init__(self, draw: Callable[[Any, Sequence[str]], None], *, alt: str, size: tuple[float, float] = (7.0, 3.4)):
        self.draw, self.alt, self.size = draw, alt, size

    def svg(self, page: str) -> bytes:
        """The figure as SVG, transparent, the same bytes each time."""
        with rc_context(theme(page)):
            figure = Canvas(figsize=self.size, layout="constrained")
            self.draw(figure, COLOURS[page])
            out = io.BytesIO()
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return out.getvalue()

    def _repr_html_(self) -> str:
        pictures = [
            f'<img class="fairtuning-{page}" alt="{html.escape(self.alt)}" '
            f'src="data:image/svg+xml;base64,{base64.b64encode(self.svg(page)).decode()}">'
            for page in TEXT
        ]
        return PAGE_STYLE + "".join(pictures)


# The book's own dark theme sets data-theme, JupyterLab's data-jp-theme-light; anywhere else the light picture is shown.
PAGE_STYLE = (
    "<style>.fairtuning-light,.fairtuning-dark{max-width:100%;background:none!important;filter:none!important}"
    ".fairtuning-dark{display:none}"
    'html[data-theme="dark"] .fairtuning-light,[data-jp-theme-light="false"] .fairtuning-light{display:none}'
    'html[data-theme="dark"] .fairtuning-dark,[data-jp-theme-light="false"] .fairtuning-dark{display:inline}</style>'
)


def theme(page: str) -> dict[str, Any]:
    """seaborn's "ticks" in the text colour of a light or dark page."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return (
        seaborn.axes_style("ticks")
        | dict.fromkeys((*names, "legend.labelcolor"), TEXT[page])
        | {
            "axes.prop_cycle": cycler(color=COLOURS[page]),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same letters everywhere
            "legend.frameon": False,
            "lines.solid_capstyle": "projecting",
            "patch.force_edgecolor": False,
            "svg.hashsalt": "fairtuning",
        }
    )


def look(names: Iterable[str], colours: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How seaborn draws lines for the names in a figure: colour and marker of a name are its method's, and the names of
    one method differ in their dashes. What is no method takes a place that is free.

    >>> found = look(["FairLoRA", "FairLoRA/groups=cell", "other"], COLOURS["light"])
    >>> found["markers"], found["dashes"]["FairLoRA/groups=cell"]
    ({'FairLoRA': 's', 'FairLoRA/groups=cell': 's', 'other': 'o'}, (4, 1.5))
    """
    names = list(dict.fromkeys(names))
    methods = {name: _method(name) for name in names}
    taken = dict.fromkeys(PLACES[method] for method in methods.values() if method in PLACES)
    free = (place for place in range(len(MARKERS)) if place not in taken)
    places = {method: PLACES[method] if method in PLACES else next(free) for method in dict.fromkeys(methods.values())}
    found: dict[str, dict[str, Any]] = {"palette": {}, "markers": {}, "dashes": {}}
    for name, method in methods.items():
        again, colour = divmod(places[method], len(colours))
        before = sum(methods[other] == method for other in found["dashes"])
        found["palette"][name], found["markers"][name] = colours[colour], MARKERS[places[method]]
        found["dashes"][name] = DASHES[(before + 2 * again) % len(DASHES)]
    return found | {"markeredgewidth": 0}


def _method(name: str) -> str:
    """The longest method that a name begins with, or the name itself."""
    found = [method for method in PLACES if re.match(rf"{re.escape(method)}(?![\w+-])", name)]
    return max(found, key=len, default=name)


def legend(figure: Any, where: str = "outside upper center", *, ncols: int = 3) -> None:
    """One legend for all panels, in the place of theirs."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        found |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        if axes.get_legend():
            axes.get_legend().remove()
    figure.legend(found.values(), found.keys(), loc=where, ncols=ncols, fontsize=8)


def long(points: Iterable[tuple[Mapping[str, Any], Estimate | float]]) -> DataFrame:
    """What each point is, with its "value": a number, or the effect and both ends of its interval, a row each."""
    ends = ((what, [one.effect, one.low, one.high] if isinstance(one, Estimate) else [one]) for what, one in points)
    return DataFrame([{**what, "value": end} for what, values in ends for end in values if not math.isnan(end)])


# ------------------------------------------------------------------------------------------------------------- figures
def dots(
    found: Results | None,
    labels: Sequence[str],
    *,
    names: Mapping[str, str] | None = None,
    published: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
    metrics: Sequence[str] | Effects = tuple(TITLES),
    shown: Sequence[str] = (),
    aligned: bool = False,
    what: str = "",
) -> Figure | Missing:
    """One panel per metric, one line per label: our mean with its 95 % interval (seeds and examples), and the paper's
    mean ± standard deviation where ``published[label, metric]`` has one. A dashed line marks the gap in the labels
    themselves, which is the demographic parity difference of a perfect classifier.

    ``metrics`` are names of METRICS or measures of a study; ``shown`` are those that have a panel, by default all.
    Labels without records show the paper's numbers alone, and without these nothing. ``aligned``: a unit has the same
    length in all panels.
    """
    names, published, present = names or {}, published or {}, having(found, labels)
    measures = metrics if isinstance(metrics, Mapping) else {name: partial(_effect, found, name) for name in metrics}
    panels = list(shown or metrics)
    values = {
        (label, name): estimate(measures[name](label)) for label in present for name in panels if name in measures
    }
    rows = [label for label in labels if any((label, name) in values or (label, name) in published for name in panels)]
    if not rows:
        return Missing(f"no records yet of {', '.join(labels)}")

    theirs = {
        (label, name): Estimate(
            cell["mean"], cell["mean"] - (cell["spread"] or 0), cell["mean"] + (cell["spread"] or 0), 0.0, 0.0, 0
        )
        for (label, name), cell in published.items()
        if label in rows and name in panels
    }
    sources = {"ours, 95 % interval": values, "paper, standard deviation": theirs}
    frame = long(
        ({"source": source, "label": label, "panel": name}, one)
        for source, of in sources.items()
        for (label, name), one in of.items()
    )
    there = [source for source, of in sources.items() if of]
    down, high = 1 if len(panels) < 6 else math.ceil(len(panels) / 4), 0.36 if len(rows) < 10 else 0.26
    across = math.ceil(len(panels) / down)

    def draw(figure: Any, colours: Sequence[str]) -> None:
        grid, style = list(figure.subplots(down, across, sharey=True, squeeze=False).flat), look(sources, colours)
        for axes in grid[len(panels) :]:
            axes.remove()
        for axes, name in zip(grid, panels, strict=False):
            seaborn.pointplot(
                frame[frame.panel == name], x="value", y="label", hue="source", order=rows, hue_order=there,
                palette=style["palette"], markers=[style["markers"][source] for source in there], markersize=6,
                linestyle="none", dodge=0.25 * (len(there) - 1), orient="h", ax=axes, err_kws={"lw": 1.4}, **WHOLE,
            )  # fmt: skip
            for line in axes.lines:
                if line.get_color() == style["palette"]["paper, standard deviation"]:
                    line.set_markerfacecolor("none")  # its spread is seen in it
            if found is not None and name == "demographic_parity_difference":
                axes.axvline(found.base_rate_gap, ls="--", lw=1, color=colours[6], label="gap in the labels")
            axes.set(xlabel=TITLES.get(name, name), ylabel="")
            axes.set_yticks(range(len(rows)), [names.get(label, label) for label in rows])
            axes.xaxis.label.set_fontsize(9)
            axes.locator_params(axis="x", nbins=4)
            axes.tick_params(axis="x", labelsize=8)
            axes.grid(axis="y", lw=0.3, color=colours[6])
        if aligned:
            limits = [axes.get_xlim() for axes in figure.axes]
            half = max(high - low for low, high in limits) / 2
            for axes, (low, high) in zip(figure.axes, limits, strict=True):
                axes.set_xlim((low + high) / 2 - half, (low + high) / 2 + half)
        legend(figure)

    def told(label: str, name: str) -> str:
        ours = f"{values[label, name].effect:.3g}" if (label, name) in values else ""
        paper = f"paper {published[label, name]['mean']:.4g}" if (label, name) in published else ""
        return (ours or paper) if not (ours and paper) else ours if name in TITLES else f"{ours} ({paper})"

    text = "; ".join(
        f"{names.get(label, label)}: " + ", ".join(filter(None, (told(label, name) for name in panels)))
        for label in rows
    )
    alt = f"{what} Mean {', '.join(TITLES.get(name, name) for name in panels)} by method. {text}."
    return Figure(draw, alt=alt.strip(), size=(max(8.0, 1.7 * across), 0.6 + down * (0.7 + high * len(rows))))


def _effect(found: Results, metric: str, label: str) -> Effect:
    return found.effect(label, metric)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], *, alt: str, size: tuple[float, float] = (9.0, 3.2)
) -> Figure:
    """A panel per title: label -> values of each seed by epoch, thin, and with the method's marker their mean."""

    def draw(figure: Any, colours: Sequence[str]) -> None:
        for axes, (title, seen) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            frame = DataFrame(
                {"epoch": epoch, "value": value, "label": label, "seed": seed}
                for label, seeds in seen.items()
                for seed, values in enumerate(seeds)
                for epoch, value in enumerate(values, 1)
            )
            same, style = {"data": frame, "x": "epoch", "y": "value", "hue": "label", "ax": axes}, look(seen, colours)
            if frame.seed.any():
                thin = {"units": "seed", "estimator": None, "lw": 0.5, "alpha": 0.5, "legend": False}
                seaborn.lineplot(**same, **thin, palette=style["palette"])
            seaborn.lineplot(**same, **style, style="label", errorbar=None)
            axes.set(ylabel="")
            axes.set_title(title, fontsize=9)
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(panels) == 1:
            legend(figure, "outside right center", ncols=1)
        else:
            legend(figure, ncols=5)

    return Figure(draw, alt=alt, size=size)
