"""`jdpo doctor` in a process that sends itself a signal when all processes are to add numbers up.

python doctor_dies.py SIGNAL WORDS...
"""

from __future__ import annotations

import os
import sys
from typing import Any

import jax

from jdpo.cli.main import main


def die(*arguments: Any, **options: Any) -> None:
    os.kill(os.getpid(), int(sys.argv[1]))


# The file is collected as a module, too, for its doctests.
if __name__ == "__main__":
    jax.make_array_from_callback = die
    sys.exit(main(["doctor", *sys.argv[2:]]))
