"""The assignment of answers to the rows of the engine, which follows from arguments and answers, never from timing.

Rows are in places: the r rows of a place answer one prompt, whose keys and values they share. A row whose answer is
complete takes the prompt's next sample. A place whose samples are all complete takes the next prompt, or half of the
samples that wait in another place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

_FEWEST_COLUMNS = 16
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
    places = min(power_of_two(-(-num_prompts // num_shards)), most)
    return Layout(places * num_shards, min(max(1, most // places), num_samples))


def columns_for(length: int) -> int:
    """Returns the number of columns of a prompt: few sizes, as each one is a compiled program.

    >>> [columns_for(length) for length in (3, 17, 200, 257, 400)]
    [16, 32, 256, 384, 512]
    """
    power = power_of_two(max(length, _FEWEST_COLUMNS))
    # Steps of 1.5 where a power of two would leave much empty; they are multiples of 128, as kernels on TPUs need.
    return power // 4 * 3 if power > _POWERS_UNTIL and length <= power // 4 * 3 else power


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@dataclass
class _Place:
    prompt: int | None = None
    waiting: deque[int] = field(default_factory=deque)
    rows: list[int | None] = field(default_factory=list)  # the sample of each row

    @property
    def is_free(self) -> bool:
        return not self.waiting and all(sample is None for sample in self.rows)


class NextWork(NamedTuple):
    """New work of rows.

    Attributes:
      admitted: place -> prompt that it begins.
      shared: place -> the place whose prompt it answers as well.
      begun: (place, row) -> sample that it begins.
    """

    admitted: dict[int, int]
    shared: dict[int, int]
    begun: dict[tuple[int, int], int]


class Schedule:
    """The answers that rows work on, and those that wait.

    Args:
      prompts: indices of prompts, in the order in which they are begun.
      samples: numbers of the answers to each.
    """

    def __init__(self, prompts: Iterable[int], samples: Sequence[int], layout: Layout) -> None:
        self._prompts, self._samples = deque(prompts), samples
        self._places = [_Place(rows=[None] * layout.rows) for _ in range(layout.places)]

    def next_work(self) -> NextWork:
        """Gives work to idle rows."""
        admitted, begun = self._admit(), self._begin()
        # After the idle rows of each place, which need no copy of the prompt.
        shared = self._share()
        return NextWork(admitted, shared, begun | self._begin())

    def _admit(self) -> dict[int, int]:
        admitted = {}
        for index, place in enumerate(self._places):
            if place.is_free and self._prompts:
                place.prompt = admitted[index] = self._prompts.popleft()
                place.waiting = deque(self._samples)
        return admitted

    def _begin(self) -> dict[tuple[int, int], int]:
        begun = {}
        for index, place in enumerate(self._places):
            for row, sample in enumerate(place.rows):
                if sample is None and place.waiting:
                    place.rows[row] = begun[index, row] = place.waiting.popleft()
        return begun

    def _share(self) -> dict[int, int]:
        shared: dict[int, int] = {}
        for index, place in enumerate(self._places):
            if place.is_free and not self._prompts:
                most = max(range(len(self._places)), key=lambda other: len(self._places[other].waiting))
                giving = self._places[most]
                half = [giving.waiting.pop() for _ in range(-(-len(giving.waiting) // 2))]
                if half:
                    place.prompt, place.waiting = giving.prompt, deque(half[::-1])
                    # A place that has just been given a prompt has it from another one.
                    shared[index] = shared.get(most, most)
        return shared

    def compact(self, num_places: int) -> list[int] | None:
        """Keeps `num_places` places, if the others have no use any more; returns the indices of those that are kept."""
        busy = [index for index, place in enumerate(self._places) if not place.is_free]
        if len(busy) > num_places or self.could_use_places():
            return None
        free = (index for index, place in enumerate(self._places) if place.is_free)
        kept = busy + [next(free) for _ in range(num_places - len(busy))]
        self._places = [self._places[index] for index in kept]
        return kept

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

    def could_use_places(self) -> bool:
        """Returns True if a free place would be given work."""
        return bool(self._prompts) or any(place.waiting for place in self._places)
