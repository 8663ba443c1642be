"""Trackers: which there are, what they are sent, and that none of them ends a run."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from jdpo.reports.trackers.tracker_registry import check_trackers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import no_such_module", "importing it fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from json import no_such_name", "importing it fails: ImportError: cannot import name 'no_such_name'"),
        ("raise TypeError('descriptors cannot be created')", "TypeError: descriptors cannot be created"),
    ],
)
def test_a_tracker_that_does_not_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(content)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_trackers(["wandb"])


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / name).exists()])
    with pytest.raises(ValueError, match=rf"pip install 'jdpo\[{name}\]'"):
        check_trackers([name])
