"""The flag that ends a process stuck in NCCL is set where every library that reads the flags knows it."""

from __future__ import annotations

from pathlib import Path

from jdpo.cli.nccl_timeout import FLAG, limit_nccl


def flags_after(given: str | None, *libraries: Path) -> str | None:
    environment = {} if given is None else {"XLA_FLAGS": given}
    limit_nccl(environment, libraries, watchdog_seconds=3600.0)
    return environment.get("XLA_FLAGS")


def test_the_flag_is_set_where_it_is_known(tmp_path: Path) -> None:
    known, unknown = tmp_path / "known.so", tmp_path / "unknown.so"
    known.write_bytes(b"\0xla_other\0" + FLAG.encode() + b"\0")
    unknown.write_bytes(b"\0xla_other\0")
    assert flags_after(None, known) == f"--{FLAG}=3900"
    assert flags_after("--xla_other=1", known) == f"--xla_other=1 --{FLAG}=3900"
    assert flags_after(f"--{FLAG}=10", known) == f"--{FLAG}=10", "a user's own value stays"
    # An unknown flag would abort the process.
    assert flags_after(None, known, unknown) is None
    assert flags_after(None) is None, "no GPU"
