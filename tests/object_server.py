"""An object store with the interface of S3 on loopback: the server of moto, which can be told to refuse requests."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

BUCKET = "bucket"
_REFUSAL = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


class ObjectServer:
    """The server, and what is in its bucket.

    Attributes:
      refuses: (method, path of the object) -> True to answer with 403.
      requests: method and path of every request, in order.
      client: of boto3.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        self.requests: list[tuple[str, str]] = []
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self.client: Any = None

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")
        self.requests.append((method, path))
        if self.refuses(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(
                "403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(_REFUSAL)))]
            )
            return [_REFUSAL]
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    def create_bucket(self) -> None:
        self.client.create_bucket(Bucket=BUCKET)

    def delete_bucket(self) -> None:
        """Deletes the bucket with everything in it."""
        while True:
            for name in self.names():
                self.client.delete_object(Bucket=BUCKET, Key=name)
            try:
                self.client.delete_bucket(Bucket=BUCKET)
            except self.client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] != "BucketNotEmpty":  # a run writes to it meanwhile
                    raise
            else:
                return

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of all objects."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def download(self, prefix: str, folder: Path) -> Path:
        """Copies the objects under a prefix to a new folder."""
        for name in self.names(f"{prefix}/"):
            path = folder / name.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(BUCKET, name, str(path))
        return folder

    def __enter__(self) -> ObjectServer:
        import boto3

        self._thread.start()
        # What an earlier server of this process held is still there.
        urllib.request.urlopen(f"{self.address}/moto-api/reset", data=b"").close()
        self.requests.clear()
        self.client = boto3.client("s3", endpoint_url=self.address)
        self.create_bucket()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def object_server() -> Iterator[ObjectServer]:
    """Starts the server; while entered, the libraries of this process and of those it starts find it."""
    import s3fs

    settings = {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in (*settings, "AWS_ENDPOINT_URL")}
    os.environ.update(settings)
    s3fs.S3FileSystem.clear_instance_cache()  # of another server
    try:
        with ObjectServer() as server:
            os.environ["AWS_ENDPOINT_URL"] = server.address
            yield server
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
