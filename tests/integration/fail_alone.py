"""One of several processes that wait for each other; one of them fails where the others cannot notice.

    python fail_alone.py INDEX

INDEX is the number of that process.
"""

from __future__ import annotations

import sys

import jax

from jdpo.processes import barrier, ending_together, join_cluster

if __name__ == "__main__":
    join_cluster()
    with ending_together(str):
        barrier("all are there")
        if jax.process_index() == int(sys.argv[1]):
            raise OSError("the disk has gone")
        barrier("one never comes")
