"""Which answer each row of the engine works on. Follows from the arguments and from the answers, never from timing.

Rows are in places: the r rows of a place answer one prompt, whose keys and values they share. A row whose answer is
complete takes the prompt's next sample. A place whose samples are all complete takes the next prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_FEWEST_SLOTS = 16
_POWERS_UNTIL = 256


class Layout(NamedTuple):
    """Numbers of places and of rows per place."""

    places: int
    rows: int


def choose_layout(num_prompts: int, num_samples: int, max_slots: int, num_shards: int) -> Layout:
    """Returns a layout of about `max_slots` rows at most, with places that divide evenly over the mesh.

    Few prompts get several rows each. Numbers of places are powers of two, so that few programs are compiled.

    >>> choose_layout(1000, 8, 64, 1), choose_layout(20, 8, 64, 1), choose_layout(1, 8, 64, 1)
    (Layout(places=64, rows=1), Layout(places=32, rows=2), Layout(places=1, rows=8))
    """
    most = -(-max_slots // num_shards)
    places = min(_power_of_two(-(-num_prompts // num_shards)), most)
    return Layout(places * num_shards, min(max(1, most // places), num_samples))


def slots_for(length: int) -> int:
    """Returns the number of slots for a prompt or an answer: few sizes, as each one is a compiled program.

    >>> [slots_for(length) for length in (3, 17, 200, 257, 400)]
    [16, 32, 256, 384, 512]
    """
    power = _power_of_two(max(length, _FEWEST_SLOTS))
    # Steps of 1.5 where a power of two would leave much empty; they are multiples of 128, as kernels on TPUs need.
    return power // 4 * 3 if power > _POWERS_UNTIL and length <= power // 4 * 3 else power


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@dataclass
class _Place:
    prompt: int | None = None
    waiting: deque[int] = field(default_factory=deque)
    rows: list[int | None] = field(default_factory=list)  # the sample of each row

    @property
    def is_free(self) -> bool:
        return not self.waiting and all(sample is None for sample in self.rows)


class Schedule:
    """The answers that rows work on, and those that wait.

    Args:
      prompts: indices of prompts, in the order in which they are begun.
      samples: numbers of the answers to each.
    """

    def __init__(self, prompts: Iterable[int], samples: Sequence[int], layout: Layout) -> None:
        self._prompts, self._samples = deque(prompts), samples
        self._places = [_Place(rows=[None] * layout.rows) for _ in range(layout.places)]

    def admit(self) -> dict[int, int]:
        """Gives the next prompts to free places; returns place -> prompt."""
        admitted = {}
        for index, place in enumerate(self._places):
            if place.is_free and self._prompts:
                place.prompt = admitted[index] = self._prompts.popleft()
                place.waiting = deque(self._samples)
        return admitted

    def assign(self) -> dict[tuple[int, int], int]:
        """Gives the next samples to idle rows; returns (place, row) -> sample."""
        assigned = {}
        for index, place in enumerate(self._places):
            for row, sample in enumerate(place.rows):
                if sample is None and place.waiting:
                    place.rows[row] = assigned[index, row] = place.waiting.popleft()
        return assigned

    def working(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Returns (place, row) -> (prompt, sample) of all answers in progress."""
        return {
            (index, row): (place.prompt, sample)
            for index, place in enumerate(self._places)
            for row, sample in enumerate(place.rows)
            if sample is not None and place.prompt is not None
        }

    def finish(self, place: int, row: int) -> None:
        """Makes a row idle, whose answer is complete."""
        self._places[place].rows[row] = None

    def has_waiting(self) -> np.ndarray:
        """Returns bool [p], True for places with samples that no row works on."""
        return np.array([bool(place.waiting) for place in self._places])

    def has_prompts(self) -> bool:
        """Returns True if there are prompts that no place works on."""
        return bool(self._prompts)
