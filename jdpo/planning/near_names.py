"""The machine that a name of another tool, or a mistyped one, most likely means."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from jdpo.words import nearest

_ELSEWHERE = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v5-lite": "v5e",
    "v5-lite-podslice": "v5e",
    "v5-lite-device": "v5e",
    "trillium": "v6e",
    "v6lite": "v6e",
    "v6-lite": "v6e",
    "v7x": "tpu7x",
    "7x": "tpu7x",
    "v7": "tpu7x",
    "ironwood": "tpu7x",
}
"""Names of chips in gcloud, GKE and announcements -> here."""


def near_name(name: str, known: Sequence[str]) -> str | None:
    """Returns the machine that a wrong name most likely means, or None.

    Args:
      name: such as v5litepod-16, H100:8, tpu-v5p-slice, 8xh100 or v5e-24.
      known: names of single slices, and of up to eight GPUs.

    >>> known = ["v5e-8", "v5e-16", "v5p-8", "h100x1", "h100x8"]
    >>> [near_name(name, known) for name in ("v5litepod-16", "2xv5e-17", "H100:8", "tpu-v5p-slice", "a100x8", "cray")]
    ['v5e-16', '2xv5e-16', 'h100x8', 'v5p-8', 'h100x8', None]
    """
    found = re.fullmatch(
        r"(?:(\d+)x)?(?:(?:google|nvidia|cloud|tpu)-)*(.+)", re.sub(r"[\s:_]+", "-", name.strip().lower())
    )
    if found is None:
        return None
    versions = sorted({re.split(r"-|x(?=\d+$)", each)[0] for each in known})
    aliases = _ELSEWHERE | {version: version for version in versions}
    text = found.group(2)
    written = max((alias for alias in aliases if re.match(rf"{alias}(?![a-z])", text)), key=len, default=None)
    if written is None:
        # Perhaps a mistyped chip, or one that is not in the table.
        written = re.split(r"-|x(?=\d+$)", text)[0]
        version = nearest(written, versions)
    else:
        version = aliases[written]
    if version is None:
        return nearest(name, known)
    # The memory of a GPU is not a count: h100-80gb.
    number = re.search(r"(\d+)$", re.sub(r"-?\d+gb", "", text.removeprefix(written)))
    return _of_version(version, found.group(1), int(number.group(1)) if number else None, known)


def _of_version(version: str, slices: str | None, count: int | None, known: Sequence[str]) -> str | None:
    """Returns the known name of a chip whose count is nearest; several slices are kept."""
    counts = {int(match.group(1)): each for each in known if (match := re.fullmatch(rf"{version}[-x](\d+)", each))}
    if not counts:
        return None
    if counts[max(counts)] == f"{version}x{max(counts)}":  # of GPUs, 8xh100 means eight of them
        count = int(slices or 1) * (count or 1)
        if count > max(counts):
            return f"{version}x{math.ceil(count / max(counts)) * max(counts)}"
        slices = None
    wanted = max(count or min(counts), 1)
    # By ratio: between 16 and 32, 24 is nearer to 32.
    near = counts[min(counts, key=lambda each: (abs(math.log(each / wanted)), -each))]
    return near if slices in (None, "0", "1") else f"{slices}x{near}"
