"""The environment variables of a launched run, each with its reason: the one place for all launchers."""

from __future__ import annotations

from typing import NamedTuple

from jdpo.chips import GPU_POOL
from jdpo.launch.request import LaunchRequest

COORDINATOR_PORT = 8476
"""The port of process 0 on which the others find it, where the launcher chooses it."""


class Variable(NamedTuple):
    """An environment variable of a run.

    Attributes:
      name, value: as they are set.
      reason: why, for a comment next to it.
    """

    name: str
    value: str
    reason: str


def environment_of(request: LaunchRequest, *, cache: str) -> tuple[Variable, ...]:
    """Returns the environment variables of every process of a run; those of the user (`--env`) come last and win.

    Args:
      cache: the folder for caches on storage that outlives the machines and that all of them see; a launcher may name
        it by a variable of its shell.
    """
    of_platform = _of_gpus() if request.machine.is_gpu else _of_tpus()
    found = (
        Variable(
            "XDG_CACHE_HOME",
            cache,
            "tokens, reference log-probs and compiled programs (jdpo), and models of the hub (huggingface): kept for "
            "the next start",
        ),
        Variable("PYTHONUNBUFFERED", "1", "lines reach the log when they are printed"),
        *of_platform,
    )
    own = tuple(Variable(name, value, "given by --env") for name, value in request.env.items())
    return tuple(each for each in found if each.name not in request.env) + own


def _of_tpus() -> tuple[Variable, ...]:
    # `compiler_options` in a config changes what a program is compiled with; this reaches the runtime as well.
    return (
        Variable(
            "LIBTPU_INIT_ARGS",
            "--xla_tpu_use_enhanced_launch_barrier=true",
            "what JAX itself adds; jdpo hands its options to the compiler with each program, and not here",
        ),
    )


def _of_gpus() -> tuple[Variable, ...]:
    return (
        Variable(
            "XLA_CLIENT_MEM_FRACTION",
            str(GPU_POOL),
            "the share of a GPU that JAX reserves, formerly XLA_PYTHON_CLIENT_MEM_FRACTION; the rest is for CUDA and "
            "NCCL",
        ),
        Variable("NCCL_DEBUG", "WARN", "NCCL says why a connection fails"),
    )
