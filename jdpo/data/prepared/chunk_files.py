"""Files of tokenized chunks, in which the processes of a run give each other the rows that they have tokenized.

A file is a sequence of chunks: the number of bytes, their CRC-32, and a safetensors image with the arrays and, in its
metadata, the origins and counts as JSON.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from jdpo.data.prepared.chunks import Chunk
from jdpo.data.prepared.row_arrays import TAG_TYPES, RowArrays, Tags, dtype_of

_HEADER = struct.Struct("<QI")
_METADATA = "chunk"


def write_chunk(file: IO[bytes], chunk: Chunk) -> None:
    """Appends a chunk to an open file."""
    from safetensors.numpy import save

    block = chunk.block
    tensors = {f"values.{field}": values for field, values in block.values.items()}
    tensors |= {f"lengths.{field}": lengths for field, lengths in block.lengths.items()}
    tensors |= {f"tags.{name}": array for name, array in block.tags._asdict().items()}
    about = {
        "dataset": chunk.dataset,
        "origins": block.origins,
        "counts": chunk.counts,
        "examples": chunk.examples,
    }
    image = save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, {_METADATA: json.dumps(about)})
    file.write(_HEADER.pack(len(image), zlib.crc32(image)))
    file.write(image)


def read_chunks(path: Path, row_type: type[Any]) -> Iterator[Chunk]:
    """Yields the chunks of a file.

    Args:
      row_type: of their rows.

    Raises:
      ValueError: the file is not as it was written.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while header := file.read(_HEADER.size):
            size, check = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 1)
            image = file.read(size)
            if zlib.crc32(image) != check:
                raise ValueError(f"{path} is not as it was written; check the disk")
            yield _chunk(image, row_type)


def _chunk(image: bytes, row_type: type[Any]) -> Chunk:
    from safetensors.numpy import load

    length = int.from_bytes(image[:8], "little")
    about = json.loads(json.loads(image[8 : 8 + length])["__metadata__"][_METADATA])
    tensors = load(image)
    *fields, _ = row_type._fields
    block = RowArrays(
        {field: tensors[f"values.{field}"].astype(dtype_of(field), copy=False) for field in fields},
        {field: tensors[f"lengths.{field}"] for field in fields},
        about["origins"],
        Tags(*(tensors[f"tags.{name}"] for name in TAG_TYPES)),
    )
    return Chunk(about["dataset"], block, about["counts"], about["examples"])
