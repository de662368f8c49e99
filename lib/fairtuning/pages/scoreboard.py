"""The scoreboard: every claim of every paper with its verdicts, as a picture and as tables."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from fairtuning import claims, papers, report, studies
from fairtuning.claims import Verdict
from fairtuning.pages.figures import TEXT, Figure
from fairtuning.pages.tables import DATA, SIGNS, markdown, own_scale

ORDER = ("supported", "contradicted", "unresolved", "not yet", "not testable here")


def _blocks(profile: str | None) -> list[list[Verdict]]:
    """The verdicts of every study by profile: of one, or of those that the book shows.

    A second profile of a study shows its verdicts on data sets that the first has no runs on.
    """
    blocks = []
    for study in studies.STUDIES:
        first, *others = [profile] if profile else report.profiles(study)
        found = {first: report.verdicts(study, profile=first)}
        for other in others:
            there = {v.data for v in found[first] if v.verdict in ORDER[:3]}
            own = report.verdicts(study, profile=other)
            new = {v.data for v in own if v.verdict in ORDER[:3]} - there
            found[other] = [v for v in own if v.data in new]
            found[first] = [v for v in found[first] if v.data not in new]
        blocks += [verdicts for verdicts in found.values() if verdicts]
    return blocks


def _headline(verdicts: Sequence[Verdict]) -> str:
    paper, profile = verdicts[0].id.partition("-")[0], verdicts[0].profile
    arxiv = {one["id"]: one["arxiv"] for one in (papers.load_published(study)["paper"] for study in studies.STUDIES)}
    return f"arXiv {arxiv[paper]}, profile {profile}" + ("" if profile == "paper" else ", not the paper's scale")


def _statements() -> dict[str, str]:
    return {
        claim.id: " ".join(claim.statement.split()) + (" (ours)" if claim.origin == "ours" else "")
        for study in studies.STUDIES
        for claim in claims.load(study)
    }


def figure(*, profile: str | None = None) -> Figure:
    """A block per paper and profile, one row per claim, one column per data set, the verdict as sign, word, colour."""
    blocks, texts = _blocks(profile), _statements()
    names = [list(dict.fromkeys(v.id for v in found)) for found in blocks]
    heights = [len(rows) + 1.2 for rows in names]

    def draw(sheet: Any, colours: Sequence[str]) -> None:
        colour = dict(zip(ORDER, (colours[0], colours[1], colours[4], colours[6], colours[6]), strict=True))
        markers = {"supported": "o", "contradicted": "X", "unresolved": "$?$", "not yet": "$…$"}
        panels = sheet.subplots(len(blocks), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, rows, found in zip(panels, names, blocks, strict=True):
            data = list(dict.fromkeys(v.data for v in found))
            axes.set(xlim=(-4.6, max(2.6, len(data) - 0.4)), ylim=(len(rows) - 0.4, -1.1))
            axes.axis("off")
            axes.text(-4.6, -0.8, _headline(found), va="center", weight="bold")
            width = 88 if len(data) < 4 else 76  # letters of a line before the first column
            for x, name in enumerate(data):
                axes.text(x, -0.8, DATA.get(name, name), ha="center", va="center", weight="bold")
            for y, name in enumerate(rows):
                lines = wrap(f"{name[3:]}  {texts[name]}", width, max_lines=2, placeholder=" …")
                axes.text(-4.6, y, "\n".join(lines), ha="left", va="center", fontsize=7.5)
                axes.axhline(y + 0.5, lw=0.3, color=colours[6])
            for v in found:
                x, y = data.index(v.data), rows.index(v.id)
                axes.plot(x - 0.36, y, marker=markers.get(v.verdict, "_"), color=colour[v.verdict], ms=6)
                word = v.verdict.removesuffix(" here")  # of four columns one has no room for more
                axes.text(x - 0.26, y, word, ha="left", va="center", color=colour[v.verdict], fontsize=8)

    counts = [[(sum(v.verdict == verdict for v in found), verdict) for verdict in ORDER] for found in blocks]
    said = [", ".join(f"{number} {verdict}" for number, verdict in one if number) for one in counts]
    told = "; ".join(f"{_headline(found)}: {one}" for found, one in zip(blocks, said, strict=True))
    return Figure(draw, alt=f"Scoreboard of the claims. {told}.", size=(9.0, 0.4 * sum(heights)))


def write(folder: Path, *, profile: str | None = None) -> list[Path]:
    """``scoreboard-light.svg``, ``scoreboard-dark.svg`` and ``scoreboard.md`` (the same as tables) into ``folder``."""
    picture = figure(profile=profile)
    paths = []
    for theme in TEXT:
        paths.append(folder / f"scoreboard-{theme}.svg")
        paths[-1].write_bytes(picture.svg(theme))
    lines, texts = [], _statements()
    for verdicts in _blocks(profile):
        rows = [
            [
                f"{v.id}: {texts[v.id]}",
                v.data,
                f"{SIGNS[v.verdict]} {v.verdict}",
                report.number(v.effect),
                report.interval(v.interval),
            ]
            for v in verdicts
            if v.verdict != "not yet"
        ]
        lines.append(f"**{_headline(verdicts)}**")
        lines += markdown(["claim", "data", "verdict", "effect", "95 % interval"], rows) if rows else [""]
        lines += [f"{own_scale(verdicts[0].profile)}Verdicts not given yet: {len(verdicts) - len(rows)}.", ""]
    paths.append(folder / "scoreboard.md")
    paths[-1].write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    return paths
