"""`kill -9` and a restart leave what an uninterrupted run leaves, bitwise; every time at another moment.

Real processes of the command line, and real signals: some sent by the process to itself at an exact point of the
code (`kill_point.py`), some from outside once a tell-tale file appears.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jdpo.checkpoint.manager import CheckpointManager
from jdpo.cli.main import main

from .conftest import LAST_STEP

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIME_KEYS = ("_per_second", "_seconds")
