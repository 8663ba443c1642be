"""The pages that scripts write from the code, and the documentation site made of all pages."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.html_page import HtmlPage

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["keys.md", "commands.md"])
def test_the_reference_matches_the_code(name: str) -> None:
    pages = script("write_reference").PAGES
    assert (DOCS / name).read_text(encoding="utf-8") == pages[name](), "run python scripts/write_reference.py"


def test_keys_of_other_trainers_match_the_code() -> None:
    module = script("write_coming_from")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python scripts/write_coming_from.py"
    with pytest.raises(ValueError, match="in no table"):
        module.table(["no_such_key"])


def test_badges_follow_the_repository_in_pyproject() -> None:
    module = script("write_badges")
    readme = module.README.read_text(encoding="utf-8")
    assert readme == module.with_badges(readme, module.repository()), "run python scripts/write_badges.py"
    address = "https://github.com/owner/name"
    with_some = module.with_badges(readme, address)
    assert with_some.count("[![") == readme.count("[![") + 2 * (module.repository() is None)
    assert "colab" in with_some
    assert module.with_badges(with_some, address) == with_some
    assert module.with_badges(with_some, None) == module.with_badges(readme, None)
    assert (ROOT / module.NOTEBOOK).suffix == ".ipynb"
    with pytest.raises(ValueError, match="badges need"):
        module.badges("https://example.org/x")


@pytest.mark.torch
def test_every_key_that_trl_adds_is_explained() -> None:
    from transformers import TrainingArguments
    from trl import DPOConfig, SFTConfig

    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = {field.name for cls in (DPOConfig, SFTConfig) for field in dataclasses.fields(cls)} - common
    assert len(own) > 20
    script("write_coming_from").table(sorted(own))


@pytest.mark.extras
def test_the_site_builds_without_warnings_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-d", tmp_path / "state"]
    done = subprocess.run([*map(str, words), DOCS, tmp_path / "site"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path: HtmlPage(path.read_text(encoding="utf-8")) for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        for link in page.addresses:
            if re.match(r"(https?|mailto|data):", link):
                continue
            address, _, anchor = link.partition("?")[0].partition("#")
            target = (path.parent / address).resolve() if address else path
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append(f"{path.name}: {link}")
    assert not broken
