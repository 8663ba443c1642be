"""`jdpo.inspect`: shows Python code what a run would train on, before it trains."""

from __future__ import annotations

import html
import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from jdpo.config import CONFIGS, DatasetConfig
from jdpo.data.sources.given_rows import Rows, form_of
from jdpo.durable import write_durably
from jdpo.inspection.document import inspect_run
from jdpo.inspection.html_page import page_of, write_page
from jdpo.inspection.terminal_view import MOST_WIDTH, print_document
from jdpo.reports.data_summary.row_statistics import Json
from jdpo.reports.progress import make_console, print_lines
from jdpo.safe_text import terminal
from jdpo.words import figure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRAME_PIXELS = 600
"""Height of the page in the output of a cell, in which it can be scrolled."""


class Inspection:
    """The report on rows. `print` shows it as text, and a notebook as a page.

    Attributes:
      document: the report as plain data; docs/data.md lists its keys.
    """

    def __init__(self, document: Json) -> None:
        self.document = document

    def __str__(self) -> str:
        shown = io.StringIO()
        print_document(self.document, Console(file=shown, width=MOST_WIDTH, force_terminal=False, force_jupyter=False))
        # rich fills lines up with spaces.
        return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())

    def __repr__(self) -> str:
        rows, found = self.document["train"]["rows_kept"], self.document["findings"]
        faults = [one["severity"] for one in found].count("fault")
        return (
            f"<Inspection: {figure(rows, 'row')} to train on, {figure(len(found), 'finding')}, "
            f"{figure(faults, 'fault')}; print it to read the report>"
        )

    def _repr_html_(self) -> str:
        # In a frame of its own, whose sandbox runs nothing, the page's style stays inside and the notebook's outside.
        page = html.escape(page_of(self.document), quote=True)
        return (
            f'<iframe sandbox="" srcdoc="{page}" width="100%" height="{FRAME_PIXELS}" style="border: 0" '
            'title="jdpo inspect"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report to a file: the document if its name ends in .json, the page for a browser if in .html.

        Raises:
          ValueError: the file cannot be written, or its name has another ending.
        """
        place = Path(path).expanduser()
        if place.suffix not in (".html", ".htm", ".json"):
            raise ValueError(f"expected the name of a file that ends in .html or .json, found {terminal(place)}")
        if place.suffix != ".json":
            write_page(self.document, place)
            return place
        try:
            write_durably(place, json.dumps(self.document, allow_nan=False) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write the report to {place}: {error.strerror or error}") from error
        return place


def inspect(
    dataset: Rows,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase,
    *,
    task: Literal["dpo", "sft"] = "dpo",
    eval_dataset: Rows | None = None,
    max_length: int = 1024,
    max_prompt_length: int | None = None,
    chat_template: str | None = None,
    num_rows: int = 3,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Inspection:
    """Reads rows as a run does, and reports what it would train on, as `jdpo inspect` does.

    The report counts rows that are read, dropped and cut, and shows lengths, padding, duplicates, length bias, prompts
    in both datasets and invisible characters. No weights are loaded, and no accelerator is used.

    Args:
      dataset: rows to train on, as for `jdpo.train`.
      tokenizer: a model folder or hub name, or a loaded tokenizer.
      task: the command that would train: "dpo" for pairs, "sft" for completions.
      eval_dataset: rows to evaluate on.
      max_length, max_prompt_length, chat_template, cache_dir: the keys of the config.
      num_rows: number of rows to show token by token.

    Raises:
      ValueError: rows or tokenizer cannot be read.
    """
    if task not in CONFIGS:
        raise ValueError(f"task: expected {' or '.join(CONFIGS)}, found {task!r}")
    console = make_console()
    with tempfile.TemporaryDirectory(prefix="jdpo-inspect-") as folder:
        place = Path(folder) / "tokenizer"
        config = CONFIGS[task](
            model_name_or_path=_named(tokenizer, place),
            datasets=_dataset(dataset, "dataset", Path(folder) / "train_dataset"),
            eval_datasets=()
            if eval_dataset is None
            else _dataset(eval_dataset, "eval_dataset", Path(folder) / "eval_dataset"),
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            chat_template=chat_template,
            cache_dir=None if cache_dir is None else str(cache_dir),
            output_dir="none",  # required, but not written
        )
        document = inspect_run(
            config,
            chosen_by="set by task",
            log=lambda text: print_lines(console, text),
            num_rows=num_rows,
            tokenizer_name=str(getattr(tokenizer, "name_or_path", "")) or "a tokenizer" if place.exists() else None,
        )
    return Inspection(document)


def _dataset(rows: Rows, name: str, place: Path) -> tuple[DatasetConfig, ...]:
    form = form_of(rows, name)
    if form is None:
        return (DatasetConfig(path=str(rows)),)
    # The name that a run gives the file, so that both find the same tokenized rows in the cache.
    path = place.with_suffix(form.ending)
    form.write(path)
    return (DatasetConfig(path=str(path)),)


def _named(tokenizer: Any, folder: Path) -> str:
    """Returns the folder or hub name of a tokenizer; one that is loaded is saved to `folder`."""
    if isinstance(tokenizer, str | os.PathLike):
        return str(tokenizer)
    if not hasattr(tokenizer, "save_pretrained"):
        raise ValueError(
            f"tokenizer: expected a model folder, a hub name or a tokenizer of transformers, found "
            f"{type(tokenizer).__name__}"
        )
    tokenizer.save_pretrained(folder)
    return str(folder)
