"""A local web server that serves byte ranges, as readers of zip files request them, with or without a key."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


class _Web(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, queries: Sequence[str] | None, **options: Any) -> None:
        self._queries = queries
        super().__init__(*arguments, **options)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        name, _, query = self.path.partition("?")
        path = Path(self.directory) / name.lstrip("/")
        if self._queries is not None and query not in self._queries:
            return self.send_error(403)
        if not path.is_file():  # a page of links, or an empty one
            return super().do_GET() if with_body else super().do_HEAD()
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if asked := self.headers.get("Range"):
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if with_body:
            self.wfile.write(content[first : last + 1])


@contextlib.contextmanager
def serving_web(folder: Path, queries: Sequence[str] | None = None) -> Iterator[str]:
    """Yields the address of a server of a folder's files; with `queries`, only addresses that end in one are served."""
    handler = functools.partial(_Web, directory=str(folder), queries=queries)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
