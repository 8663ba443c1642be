"""Keeps transformers from advising to install PyTorch, which nothing here uses, when it is imported."""

from __future__ import annotations

import os


def be_quiet() -> None:
    """To be called before transformers is imported; whoever has set its variable keeps the advice."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
