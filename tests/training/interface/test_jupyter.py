"""Runs in a Jupyter kernel: what cells show and notebooks keep, and the interrupt of a kernel."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import chat_pairs

pytestmark = pytest.mark.extras

SETUP = """
import jdpo
from dataclasses import replace

rows = {rows!r}
config = jdpo.DPOConfig(
    model_name_or_path={model!r}, output_dir={folder!r} + "/long", cache_dir={folder!r} + "/cache", max_length=64,
    global_batch_size=8, max_steps=100_000, logging_steps=1, remat="none", reference="live", mesh=dict(data=8, fsdp=1),
)
"""


class Kernel:
    """A kernel that runs cells; `outputs` are what the last cell leaves in a notebook."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager, self.client = manager, client
        self.outputs: list[dict[str, Any]] = []

    def run(self, code: str, *, interrupt_at: str = "") -> str:
        """Runs a cell and returns its last value; the kernel is interrupted when an output has a text."""
        self.outputs, shown = [], dict[str, dict[str, Any]]()
        wanted = self.client.execute(code)
        until = time.monotonic() + 240
        while time.monotonic() < until:
            message = self.client.get_iopub_msg(timeout=120)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != wanted:
                continue
            if kind == "status" and content["execution_state"] == "idle":
                break
            if kind == "error":
                pytest.fail("\n".join(content["traceback"]))
            if interrupt_at and interrupt_at in json.dumps(content):
                interrupt_at = ""
                self.manager.interrupt_kernel()
            if kind == "update_display_data":
                shown[content["transient"]["display_id"]]["data"] = content["data"]
            elif kind in ("stream", "display_data", "execute_result"):
                self.outputs.append(content)
                if name := content.get("transient", {}).get("display_id"):
                    shown[name] = content
        values = [output["data"]["text/plain"] for output in self.outputs if "execution_count" in output]
        return "".join(values)

    @property
    def text(self) -> str:
        return "".join(output.get("text", "") for output in self.outputs)


@pytest.fixture(scope="module")
def kernel(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        kernel = Kernel(manager, client)
        folder = str(tmp_path_factory.mktemp("kernel"))
        kernel.run(SETUP.format(rows=chat_pairs(16), model=str(toy_model), folder=folder))
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_the_interrupt_saves_and_returns_and_the_next_cell_trains(kernel: Kernel) -> None:
    value = kernel.run(
        "result = jdpo.train(config, train_dataset=rows)\n"
        "result.interrupted, result.exit_code, result.step > 0, result.model_dir",
        interrupt_at="step 1/",  # later steps may be left out
    )
    assert value == "(True, 130, True, None)"
    assert "is saved. Run the same command again" in kernel.text
    assert "IProgress" not in kernel.text  # advice to install ipywidgets

    last = kernel.run(
        "short = replace(config, output_dir=config.output_dir + '-short', max_steps=40)\n"
        "jdpo.train(short, train_dataset=rows)"
    )
    assert "done at step 40" in last
    assert "\x1b" not in kernel.text
    # Messages are printed text, and however many steps there are, progress is one output.
    others = [output for output in kernel.outputs if "text" not in output and "execution_count" not in output]
    assert ["step 40/40" in output["data"]["text/plain"] for output in others] == [True]
    assert {output["name"] for output in kernel.outputs if "done: model in" in output.get("text", "")} == {"stdout"}


def test_a_thread_trains_and_is_stopped_from_the_main_one(kernel: Kernel) -> None:
    value = kernel.run(
        "import threading\n"
        "class Keep(jdpo.Callback):\n"
        "    def on_log(self, run, metrics):\n"
        "        global view\n"
        "        view = run\n"
        "        started.set()\n"
        "started, results = threading.Event(), []\n"
        "other = replace(config, output_dir=config.output_dir + '-threaded')\n"
        "thread = threading.Thread(\n"
        "    target=lambda: results.append(jdpo.train(other, train_dataset=rows, callbacks=[Keep()]))\n"
        ")\n"
        "thread.start()\n"
        "started.wait(120)\n"
        "view.stop('from the main thread')\n"
        "thread.join(120)\n"
        "results[0].stopped"
    )
    assert value == "'from the main thread'"
