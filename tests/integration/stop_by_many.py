"""One of several processes of a run; process 1 is sent SIGTERM after a step.

python stop_by_many.py STEP WORDS

STEP 0: the run is not stopped.
"""

from __future__ import annotations

import sys

import jax

import jdpo
from jdpo.config import DPOConfig, load_config
from jdpo.processes import ending_together, join_cluster
from tests.run_stops import SignalAt


def main(stop_at: int, words: list[str]) -> int:
    """Makes the run; returns its exit code."""
    # Every process has the same callbacks, as a run demands; no step is negative.
    callback = SignalAt(stop_at if jax.process_index() == 1 else -1)
    return jdpo.train(load_config(DPOConfig, None, words), callbacks=[callback]).exit_code


if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        code = main(int(sys.argv[1]), sys.argv[2:])
    sys.exit(code)
