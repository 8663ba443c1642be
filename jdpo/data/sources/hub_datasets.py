"""Datasets of the Hugging Face hub, downloaded by the `datasets` library."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

from jdpo.config import DatasetConfig
from jdpo.data.sources.arrow_rows import BATCH_ROWS, python_rows
from jdpo.data.sources.files import Row


class HubSource:
    """A dataset of the Hugging Face hub. `datasets` downloads it once; rows are read from its Arrow files.

    Columns of images or audio stay the stored bytes.
    """

    def __init__(self, config: DatasetConfig) -> None:
        import datasets

        self.left_out: tuple[str, ...] = ()
        self.has_splits = True
        self.label = f"{config.path}:{config.split}"
        try:
            # No trust_remote_code: loading scripts of a repository are never run.
            self.data = datasets.load_dataset(config.path, config.name, split=config.split, revision=config.revision)
        except Exception as error:  # the hub client raises errors of five libraries
            raise ValueError(
                f"cannot load {self.label} from the hub ({type(error).__name__}: {error}). There is no local file "
                f"or folder {config.path!r}: without a network, give a local path"
            ) from error

    def rows(self) -> Iterator[Row]:
        number = 0
        for table in self.data.with_format("arrow").iter(batch_size=BATCH_ROWS):
            for row in python_rows(table, functools.partial(self._origin, number)):
                yield row, self._origin(number)
                number += 1
        if not number:
            raise ValueError(f"{self.label}: the split has no rows")

    def _origin(self, first: int, index: int = 0) -> str:
        return f"{self.label}[{first + index}]"

    def digest(self) -> str:
        # The fingerprint of `datasets` covers the content and the split, and saves reading the rows.
        return hashlib.sha256(f"{self.label} {self.data._fingerprint}".encode()).hexdigest()

    def known_rows(self) -> int | None:
        return len(self.data)

    def file_digests(self) -> dict[str, str]:
        return {self.label: self.digest()}
