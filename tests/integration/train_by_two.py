"""One of several processes that make runs of `jdpo dpo`, one after the other.

python train_by_two.py WORDS [-- WORDS]..
"""

from __future__ import annotations

import sys

from jdpo.config import DPOConfig, load_config
from jdpo.processes import ending_together, join_cluster
from jdpo.training.run import train


def main(words: list[str]) -> None:
    """Makes one run for each group of words between "--"."""
    if "--" in words:
        end = words.index("--")
        main(words[:end])
        main(words[end + 1 :])
        return
    train(load_config(DPOConfig, None, words))


if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        main(sys.argv[1:])
