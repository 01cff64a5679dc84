"""Run the lessons and write their pages: docs/lessons/NAME.py -> NAME.md and the pictures it draws, NAME/*.png.

    make lessons            # all of them
    python scripts/docs/lessons.py 2-noise 9-guidance

A lesson is a Python script in cells (`# %%`), whose text is in cells of Markdown. It runs as a script too, and asserts
what it claims.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import jupytext
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

LESSONS = Path(__file__).parents[2] / "docs" / "lessons"
LONGEST = 600  # seconds that one cell may take; a whole lesson takes about half a minute on two free cores


def page(script: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a lesson after running it, and its pictures by name."""
    notebook = jupytext.read(script)
    execute = ExecutePreprocessor(timeout=LONGEST, kernel_name="python3", coalesce_streams=True)
    execute.preprocess(notebook, {"metadata": {"path": str(script.parent)}})
    for cell in notebook.cells:  # progress bars, warnings of libraries and addresses of objects are not part of it
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    pictures: dict[str, bytes] = {}
    for number, (name, content) in enumerate(resources["outputs"].items(), 1):
        new = f"{script.stem}/{number}.png"
        text = re.sub(rf"!\[[^\]]*\]\({re.escape(name)}\)", f"![Figure {number}]({new})", text)
        pictures[new] = content
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", pictures


def _is_noise(output: dict[str, Any]) -> bool:
    return output.get("name") == "stderr" or output["output_type"] == "execute_result"


def write(script: Path) -> float:
    """Write the page of a lesson; returns the seconds it took."""
    begun = time.perf_counter()
    text, pictures = page(script)
    folder = script.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, content in pictures.items():
        (script.parent / name).write_bytes(content)
    script.with_suffix(".md").write_text(text, encoding="utf-8")
    for old in folder.glob("*.png"):
        if f"{script.stem}/{old.name}" not in pictures:
            old.unlink()
    return time.perf_counter() - begun


def main(names: list[str]) -> None:
    """Write the named lessons, or all."""
    for script in [LESSONS / f"{name}.py" for name in names] or sorted(LESSONS.glob("*.py")):
        print(f"{script.stem}: {write(script):.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
