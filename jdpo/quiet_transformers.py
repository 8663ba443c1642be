"""Keeps transformers, when it is imported, from advice about packages that nothing here uses."""

from __future__ import annotations

import os
import warnings


def be_quiet() -> None:
    """To be called before transformers is imported; whoever has set its variable keeps its advice about PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # In a notebook without ipywidgets tqdm, which transformers imports, asks for it. The bars of tqdm work as text.
    warnings.filterwarnings("ignore", message="IProgress not found")
