"""Prints as JSON how each kind of TPU pod is joined: address, count, index and local_device_ids; null: not joined.

The environment sets JAX_FORCE_TPU_INIT, so that JAX takes this machine for a TPU VM.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import sys
import threading
import types
import urllib.error
import urllib.request
from typing import Any

from jdpo.processes import join_cluster

METADATA: dict[str, str] = {}


class MetadataServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        text = METADATA.get(self.path.rpartition("/")[2])
        self.send_response(200 if text is not None else 404)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: Any) -> None:
        pass


def get(url: str, **_: Any) -> types.SimpleNamespace:
    """Replaces `requests.get`: JAX asks the metadata server through a package that only jax[tpu] installs."""
    try:
        with urllib.request.urlopen(url) as answer:
            return types.SimpleNamespace(status_code=200, text=answer.read().decode())
    except urllib.error.HTTPError as error:
        return types.SimpleNamespace(status_code=error.code, text="")


def joined(environ: dict[str, str], metadata: dict[str, str]) -> Any:
    calls: list[Any] = []

    def initialize(*args: Any, heartbeat_timeout_seconds: int) -> None:
        calls.append(args)

    METADATA.clear()
    METADATA.update(metadata)
    os.environ.update(environ)
    try:
        join_cluster(initialize=initialize)
    finally:
        for name in environ:
            del os.environ[name]
    return calls[0] if calls else None


def main() -> None:
    if importlib.util.find_spec("requests") is None:
        requests: Any = types.ModuleType("requests")
        requests.get = get
        sys.modules["requests"] = requests
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), MetadataServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["GCE_METADATA_IP"] = f"127.0.0.1:{server.server_address[1]}"
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it if it finds no chip
    two = {"agent-worker-number": "1", "worker-network-endpoints": "127.0.0.1,10.0.0.2", "tpu-env": "ZONE: 'a'"}
    slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'\n"
    hosts, megascale = "TPU_WORKER_HOSTNAMES", {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    megascale |= {"MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080"}
    gke_sets = {"TPU_SKIP_MDS_QUERY": "true"}
    gke = {"tpu-env": ""}  # inside a container JAX asks the metadata server for variables that are not set
    found = {
        "GKE, one slice of two hosts": joined({hosts: "127.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1", **gke_sets}, gke),
        "GKE, addresses of processes": joined(
            {"TPU_PROCESS_ADDRESSES": "127.0.0.1:8476,10.0.0.2:8476,10.0.0.3:8476", "TPU_WORKER_ID": "2", **gke_sets},
            gke,
        ),
        "GKE, two slices of one host": joined({hosts: "10.0.0.2", "TPU_WORKER_ID": "0", **megascale, **gke_sets}, gke),
        "GKE, one host": joined({hosts: "localhost", "TPU_WORKER_ID": "0", **gke_sets}, gke),
        "GCE, two hosts, nothing set": joined({}, two),
        "GCE, two slices of two hosts": joined({}, two | {"tpu-env": slices}),
        "GCE, one host": joined(
            {}, {"agent-worker-number": "0", "worker-network-endpoints": "127.0.0.1", "tpu-env": ""}
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
