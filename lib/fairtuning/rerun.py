"""A notebook run again with other parameters. Needs the extra ``[run]`` (papermill)."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fairtuning import FairtuningError


def rerun(notebook: Path, output: Path, parameters: Sequence[str]) -> Path:
    """Executes ``notebook`` into the new file ``output`` with ``parameters`` (``NAME=VALUE``, the value as YAML).

    papermill itself only warns of a parameter that a notebook does not have, and then shows unchanged numbers under a
    changed name; here it is refused. A run that fails leaves no file.
    """
    try:
        import papermill
    except ImportError:
        raise FairtuningError("rerun needs papermill: pip install 'fairtuning[run]'") from None
    if not notebook.is_file():
        raise FairtuningError(f"{notebook} is not there; notebooks are in notebooks/")
    if output.exists():
        raise FairtuningError(f"{output} exists already; name a new file")
    known = papermill.inspect_notebook(str(notebook))
    values = dict(_value(text, known, notebook) for text in parameters)
    part = output.with_name(output.name + ".part.ipynb")
    try:
        papermill.execute_notebook(
            str(notebook), str(part), values, kernel_name="python3", cwd=str(notebook.parent), log_output=False
        )
        os.replace(part, output)
    except papermill.PapermillExecutionError as error:
        raise FairtuningError(f"{notebook}: {error.ename}: {error.evalue}") from None
    finally:
        part.unlink(missing_ok=True)
    return output


def _value(text: str, known: dict[str, Any], notebook: Path) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in known:
        raise FairtuningError(f"{notebook.name} has no parameter {name!r}; it has {', '.join(known)} (NAME=VALUE)")
    return name, yaml.safe_load(value)
