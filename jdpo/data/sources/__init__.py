"""Where rows come from: files and folders on this machine or a remote store, and names on the Hugging Face hub.

Everything is streamed, and read in the order in which it stands. JSON (an array of objects, or objects one after the
other), JSONL, CSV and TSV may be gzipped; Parquet, Arrow files and streams, and folders that
`datasets.save_to_disk` wrote are read as they are. A row is a dictionary of plain values; an empty cell of a CSV file
is null. What cannot be read is an error that names the file with its line or row: nothing is skipped or repaired,
but for blank lines and a UTF-8 byte order mark, which are passed over. NaN and Infinity are no JSON values, and a key
that stands twice in an object has no one value, so both are refused.

`split` selects rows as in `datasets`: `train`, `train[:90%]`, `train[100:200]`, `train[-50:]`; percentages round to
the nearest row, so `[:90%]` and `[90%:]` partition. A file is one split, `train`; for folders see `splits`.
"""

from jdpo.data.sources.files import MAX_ROW_BYTES, Row
from jdpo.data.sources.hub_datasets import HubSource
from jdpo.data.sources.opening import FileSource, Source, open_source, read_rows
from jdpo.data.sources.readers import READERS

__all__ = ["MAX_ROW_BYTES", "READERS", "FileSource", "HubSource", "Row", "Source", "open_source", "read_rows"]
