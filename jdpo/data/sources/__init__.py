"""Sources of rows: files and folders on this machine or a remote store, and datasets of the Hugging Face hub.

All sources stream their rows in file order. JSON (an array of objects, or objects one after the other), JSONL, CSV and
TSV may be gzipped; Parquet, Arrow files and streams, and folders written by `datasets.save_to_disk` are read too. A row
is a dictionary of plain values; an empty cell of a CSV file is null. Anything that cannot be read is an error that
names the file with its line or row. Nothing is skipped or repaired, except blank lines and a UTF-8 byte order mark. NaN
and Infinity, which JSON does not have, and keys that occur twice in an object are errors.

`split` selects rows as in `datasets`: `train`, `train[:90%]`, `train[100:200]`, `train[-50:]`. Percentages round to
the nearest row, so `[:90%]` and `[90%:]` together select every row once. A file has one split, `train`; for folders,
see `jdpo.data.sources.splits`.
"""

from jdpo.data.sources.hub_datasets import HubSource
from jdpo.data.sources.readers import READERS
from jdpo.data.sources.source_opening import Source, is_on_hub, open_source, read_rows

__all__ = ["READERS", "HubSource", "Source", "is_on_hub", "open_source", "read_rows"]
