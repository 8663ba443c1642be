"""`jdpo doctor` as several processes: the page says what is wrong, and all processes end with one exit code."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import jdpo
from jdpo.exit_codes import DONE, FAILED, LOST, USAGE
from tests.integration.cluster import End, run_cluster, started

DOCTOR = ("-m", "jdpo.cli.main", "doctor")
HERE = Path(__file__).parent
COUNT = 4


@pytest.fixture
def hosts(toy_model: Path, pairs_file: Path, tmp_path: Path) -> list[Path]:
    """Folders that stand for hosts: each with a model, rows and a config of its own, and `runs` mounted on all."""
    (tmp_path / "shared").mkdir()
    config = "\n".join(
        [
            "model_name_or_path: model",
            "datasets: pairs.jsonl",
            "output_dir: runs/first",
            "cache_dir: cache",
            "global_batch_size: 8",
        ]
    )
    folders = [tmp_path / f"host{index}" for index in range(COUNT)]
    for folder in folders:
        folder.mkdir()
        shutil.copytree(toy_model, folder / "model")
        shutil.copy(pairs_file, folder)
        (folder / "first.yaml").write_text(config)
        (folder / "runs").symlink_to(tmp_path / "shared")
    return folders


def doctor(hosts: Sequence[Path], *words: str, **options: object) -> list[End]:
    """Runs `jdpo doctor` as one process per host."""
    return run_cluster([[*DOCTOR, "first.yaml", *words]] * len(hosts), hosts, **options)  # type: ignore[arg-type]


def said(ends: Sequence[End]) -> str:
    """Returns the page, with the line breaks taken out."""
    return " ".join(ends[0].printed.split())


@pytest.mark.ci
def test_two_processes_find_each_other_and_nothing_wrong(hosts: list[Path], tmp_path: Path) -> None:
    ends = doctor(hosts[:2])
    assert [end.code for end in ends] == [DONE] * 2, ends
    page = said(ends)
    for words in (
        "all is well",
        "2 on 1 host, found by JAX_COORDINATOR_ADDRESS",
        "8 x cpu (cpu), 4 devices for each process",
        "over 8 devices: 36 as expected",
        "runs/first",
        "shared by all processes",
        "node-local: 2 stores",
    ):
        assert words in page
    assert "jdpo doctor" not in ends[1].printed  # one page
    # Nothing is left behind.
    assert not list((tmp_path / "shared").iterdir())
    assert not (hosts[0] / "cache").exists()


@pytest.mark.full
def test_four_processes(hosts: list[Path]) -> None:
    ends = doctor(hosts)
    assert [end.code for end in ends] == [DONE] * COUNT, ends
    assert "4 on 1 host" in said(ends)


@pytest.mark.full
def test_a_missing_process_is_named_with_those_that_came(hosts: list[Path]) -> None:
    ends = doctor(hosts, "--timeout", "20", missing=[2])
    assert [end.code for end in ends] == [LOST] * 3, ends
    assert "process 2 of 4 did not come" in said(ends)
    for end in ends:
        (line,) = [line for line in end.log.splitlines() if line.startswith("jdpo: error: ")]
        assert "process 2 of 4 did not come" in line
        assert all(f"{index} (" in line for index in (0, 1, 3))


@pytest.mark.full
def test_a_missing_process_0_is_named_by_the_others(hosts: list[Path]) -> None:
    ends = doctor(hosts, "--timeout", "5", missing=[0])
    assert [end.code for end in ends] == [LOST] * 3, ends
    assert all("process 0 cannot be reached at 127.0.0.1" in end.log for end in ends)


def full_disk(hosts: Sequence[Path]) -> None:
    (hosts[2] / "limited.py").write_text(
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**17, 2**17))\n"
        "from jdpo.cli.main import main\n"
        "sys.exit(main(['doctor', *sys.argv[1:]]))\n"
    )


def no_folder(hosts: Sequence[Path]) -> None:
    (hosts[2] / "runs").unlink()
    (hosts[2] / "runs").touch()


def no_mount(hosts: Sequence[Path]) -> None:
    (hosts[2] / "runs").unlink()
    (hosts[2] / "runs").mkdir()


def other_config(hosts: Sequence[Path]) -> None:
    path = hosts[2] / "first.yaml"
    path.write_text(path.read_text() + "\nbeta: 0.25\n")


def no_config(hosts: Sequence[Path]) -> None:
    (hosts[2] / "first.yaml").unlink()


def other_rows(hosts: Sequence[Path]) -> None:
    path = hosts[2] / "pairs.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines()[:-1]))


def other_model(hosts: Sequence[Path]) -> None:
    path = hosts[2] / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-4}))


@pytest.mark.full
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (full_disk, ["problem output_dir process 2", "File too large", "free some space"]),
        (no_folder, ["problem output_dir process 2", "cannot write"]),
        (no_mount, ["problem output_dir not shared: 2 groups", "process 2 ("]),
        (other_config, ["problem config beta is 0.25 on process 2"]),
        (no_config, ["problem config process 2", "first.yaml"]),
        (other_rows, ["problem data and model pairs.jsonl: process 2"]),
        (other_model, ["problem data and model model: config.json: process 2"]),
    ],
)
def test_what_differs_on_one_host_is_named(
    hosts: list[Path], damage: Callable[[Sequence[Path]], None], words: Sequence[str]
) -> None:
    damage(hosts)
    limited = hosts[2] / "limited.py"
    commands: list[list[str]] = [[*DOCTOR, "first.yaml"]] * COUNT
    commands[2] = [str(limited), "first.yaml"] if limited.exists() else commands[2]
    ends = run_cluster(commands, hosts)
    assert [end.code for end in ends] == [FAILED] * COUNT, ends
    page = said(ends)
    assert all(each in page for each in words), page
    # Every log has the reason, for who looks at another host first.
    assert all("process 0 has the whole page" in end.log for end in ends[1:])


@pytest.mark.full
def test_a_changed_file_of_the_package_is_named(hosts: list[Path], tmp_path: Path) -> None:
    package = Path(jdpo.__file__).parent
    copy = tmp_path / "copy"
    shutil.copytree(package, copy / "jdpo", ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "jdpo" / "losses" / "dpo.py").open("a") as file:
        file.write("# changed\n")
    ends = doctor(hosts, environs={3: {"PYTHONPATH": str(copy)}})
    assert [end.code for end in ends] == [FAILED] * COUNT, ends
    page = said(ends)
    assert "problem code process 3" in page
    assert "different in losses/dpo.py" in page


@pytest.mark.full
def test_a_wrong_config_everywhere_is_a_matter_of_usage(hosts: list[Path]) -> None:
    ends = doctor(hosts[:2], "--betta", "2")
    assert [end.code for end in ends] == [USAGE] * 2, ends
    assert "did you mean 'beta'" in said(ends)


@pytest.mark.full
def test_a_flag_that_xla_does_not_know_is_named_and_ends_nobody(hosts: list[Path]) -> None:
    ends = doctor(hosts[:2], environs={1: {"XLA_FLAGS": "--xla_tpu_of_tomorrow=1"}})
    assert [end.code for end in ends] == [FAILED] * 2, ends
    assert "XLA does not know --xla_tpu_of_tomorrow=1 on process 1" in said(ends)


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_dies_in_the_check_ends_the_others(hosts: list[Path], signum: signal.Signals) -> None:
    victim = (HERE / "doctor_dies.py", int(signum), "first.yaml")
    with started([[*DOCTOR, "first.yaml"]] * 2 + [victim], hosts[:3]) as cluster:
        codes = [process.wait(200) for process in cluster.processes[:2]]
        logs = cluster.logs()
        pid = cluster.processes[2].pid
    assert codes == [LOST] * 2, logs
    assert all(f"pid {pid}) has died or stopped" in log for log in logs[:2])
