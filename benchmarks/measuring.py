"""What the benchmarks share: variants timed in turns, and the file they write."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "lib"))


def cpu_seconds(variants: Mapping[str, Callable], *, repeats: int) -> dict[str, float]:
    """Median CPU seconds of this process for each variant, taking turns, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, 1 thread"


def row(
    case: str, variant: str, *, seconds: float | None, ratio: float | None = None, target: str = "", note: str = ""
) -> dict[str, Any]:
    """``ratio``: this variant's time over ours (above 1: it is slower) unless the note says else; ``target``: what is
    asked of it, such as ">= 4" or "<= 1.15"; ``met`` says whether it is so.
    """
    met = None
    if target:
        relation, bound = target.split()
        met = ratio >= float(bound) if relation == ">=" else ratio <= float(bound)
    found = {"case": case, "variant": variant, "seconds": seconds, "ratio": ratio}
    return found | {"target": target, "met": met, "note": note}


def write(rows: Sequence[dict[str, Any]], output: Path, *, packages: Sequence[str], hardware: str = "") -> None:
    """``{"meta": {hardware, versions}, "rows": [...]}`` as JSON, and the rows on the terminal."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"meta": {"hardware": hardware or processor(), "versions": versions}, "rows": list(rows)}
    output.write_text(json.dumps(content, indent=1) + "\n")
    for one in rows:
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.3g} s"
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.4g}x"
        target = {None: "", True: f"({one['target']}: met)", False: f"({one['target']}: MISSED)"}[one["met"]]
        print(f"{one['case']:58} {one['variant']:44} {seconds:>10} {ratio:>10} {target:18} {one['note']}")
