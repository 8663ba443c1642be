"""`jdpo reference CONFIG [key=value ...]`: the reference's log-probs, computed once and kept for every later run."""

from __future__ import annotations

from collections.abc import Sequence

from jdpo.cli.cluster import in_cluster
from jdpo.cli.train import read_config, shown_error
from jdpo.config import DPOConfig
from jdpo.safe_text import terminal_lines


def usage() -> str:
    """Returns the text of `jdpo reference --help`."""
    return "\n".join(
        [
            "usage: jdpo reference [[--config] CONFIG.yaml] [--key value | --key=value | key=value ...]",
            "",
            "Computes the log-probs of every training and evaluation row of a `jdpo dpo` run under the frozen",
            "reference and keeps them in cache_dir. Runs of `jdpo dpo` with the same model, rows, max_length, template",
            "and compute_dtype find them there, whatever their loss, beta, learning rate, seed or order, and then",
            "never hold the reference in memory.",
            "",
            "It can be killed at any time: the same command again computes only what is missing or damaged. output_dir",
            "is not written.",
            "",
            "The keys are those of `jdpo dpo --help`.",
        ]
    )


def main(command: str, words: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    assert command == "reference", command
    if "--help" in words or "-h" in words:
        print(usage())
        return 0
    # Not touched, so it need not be given.
    config = read_config(DPOConfig, [*words, "output_dir=none"])
    with in_cluster(config, command, words, shown=shown_error, trains=False):
        from jdpo.processes import is_first
        from jdpo.training.reference.reference_source import compute_reference

        compute_reference(config, lambda text: print(terminal_lines(text), flush=True) if is_first() else None)
    return 0
