"""The layout of the package: small folders, and module names that differ."""

from __future__ import annotations

import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "jdpo"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]

MOST_MODULES = 15
"""Modules of a folder at most, `__init__.py` not counted."""

SAME_NAME = {
    "doctor": "cli/commands/clusters/doctor.py is the command `jdpo doctor`; doctor/ is what it calls",
    "chat": "cli/commands/answers/chat.py is the command `jdpo chat`; generation/chat/ is what it calls",
    "quickstart": "cli/commands/runs/quickstart.py is the command that runs the package quickstart",
    "report": "cli/commands/runs/report.py is the command; quickstart/report.py writes that of the experiment",
    "launch": "cli/commands/clusters/launch.py is the command `jdpo launch`; launch/ is what it calls",
    "reference": "cli/commands/runs/reference.py is the command `jdpo reference`; training/reference/ is what it calls",
}
"""Names that two modules share, or a module and a package, each with the reason."""


def contracts() -> dict[str, dict[str, Any]]:
    """Returns the import contracts of pyproject.toml by the first word of their names."""
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return {each["name"].split(maxsplit=1)[0]: each for each in settings["tool"]["importlinter"]["contracts"]}


def test_import_contracts_name_every_top_level_module() -> None:
    places = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    every = {f"jdpo.{path.stem}" for path in places} - {"jdpo.__init__"}
    layers = [set(layer.split(" | ")) for layer in contracts()["packages"]["layers"]]
    assert set.union(*layers) == every
    below_losses = set.union(*layers[[("jdpo.losses" in layer) for layer in layers].index(True) + 1 :])
    forbidden = {name for name in contracts()["losses"]["forbidden_modules"] if name.startswith("jdpo.")}
    assert forbidden == below_losses - {"jdpo.types", "jdpo.loss_specs", "jdpo.words"}
    assert set(contracts()["only"]["source_modules"]) == every - {"jdpo.checkpoint"}


def test_folders_are_small() -> None:
    counts = Counter(path.parent.relative_to(PACKAGE) for path in MODULES)
    too_large = {str(folder): count for folder, count in counts.items() if count > MOST_MODULES}
    assert not too_large, f"more than {MOST_MODULES} modules in one folder: {too_large}"


def test_modules_have_names_of_their_own() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in MODULES:
        places[path.stem].append(str(path.relative_to(PACKAGE)))
    for folder in (path for path in sorted(PACKAGE.rglob("*/")) if (path / "__init__.py").exists()):
        places[folder.name].append(f"{folder.relative_to(PACKAGE)}/")
    shared = {name: found for name, found in places.items() if len(found) > 1}
    unlisted = {name: found for name, found in shared.items() if name not in SAME_NAME}
    assert not unlisted, f"rename one of each, or list it in SAME_NAME with the reason: {unlisted}"
    assert set(SAME_NAME) == set(shared), "SAME_NAME lists a name that is no longer shared"


ONE_PLACE = {
    "get_close_matches": "words.py",
    "fcntl.flock": "file_locks.py",
    "hashlib.file_digest": "file_digests.py",
    "} GiB": "words.py",
}
"""What only one module does, and the module that others call for it."""


def test_common_tasks_have_one_place() -> None:
    for text, place in ONE_PLACE.items():
        found = [str(path.relative_to(PACKAGE)) for path in MODULES if text in path.read_text(encoding="utf-8")]
        assert found == [place], f"{text!r}: call jdpo/{place} instead"
