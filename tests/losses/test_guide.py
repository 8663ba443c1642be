"""docs/losses.md says what jdpo does: its tables, code, settings, links and pictures."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from jdpo.loss_specs import FOR_EVERY_LOSS

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.M | re.S)


def script(name: str) -> ModuleType:
    """A module of scripts/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("write_loss_tables")


def test_tables_are_those_of_the_declarations(tables: ModuleType) -> None:
    assert tables.with_tables(GUIDE) == GUIDE, "run scripts/write_loss_tables.py"


def test_a_table_that_is_missing_is_an_error(tables: ModuleType) -> None:
    with pytest.raises(ValueError, match="expected the tables"):
        tables.with_tables(GUIDE.replace("<!-- table: formulas -->", ""))


def test_every_option_is_named() -> None:
    trainer = {"reference", "reference_model", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
    for option in {*trainer, "loss_state", "normalizer"}:
        assert re.search(rf"`{option}\b", GUIDE), option
    (sentence,) = re.findall(r"^(.*) go with every loss\.$", GUIDE, flags=re.M)
    assert set(re.findall(r"`(\w+)`", sentence)) == FOR_EVERY_LOSS


# --- code, settings, links and pictures


def test_settings_of_the_guide_are_accepted(tmp_path: Path) -> None:
    from jdpo.config import DPOConfig, load_config
    from jdpo.training.setup.tasks import loss_of

    found = []
    for block in blocks("yaml"):
        path = tmp_path / "config.yaml"
        path.write_text(block, encoding="utf-8")
        config = load_config(DPOConfig, path, ["model_name_or_path=m", "datasets=d", "output_dir=o"])
        found.append((loss_of(config).loss_types, loss_of(config).weights))
    assert found == [(("sigmoid",), (1.0,)), (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0))]


def test_numbers_of_the_text_are_the_defaults_of_the_trainer() -> None:
    from jdpo.config import DPOConfig, defaults_of

    defaults = defaults_of(DPOConfig)
    assert f"every `ref_model_sync_steps` updates\n({defaults['ref_model_sync_steps']})" in GUIDE
    assert f"`ref_model_mixup_alpha` ({defaults['ref_model_mixup_alpha']})" in GUIDE


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", GUIDE, flags=re.M | re.S), flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", GUIDE):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / "docs" / target).is_file(), target


@pytest.fixture(scope="module")
def plot_losses() -> ModuleType:
    return script("plot_losses")


@pytest.mark.ci
def test_the_script_draws_the_pictures_that_the_guide_shows(plot_losses: ModuleType, tmp_path: Path) -> None:
    shown = re.findall(r"!\[[^\]]+\]\(images/losses/([^)]+)\)", GUIDE)
    drawn = plot_losses.draw_all(tmp_path / "pictures")
    assert sorted(shown) == sorted(path.name for path in drawn)
    for path in drawn:
        committed = ROOT / "docs" / "images" / "losses" / path.name
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert max(path.stat().st_size, committed.stat().st_size) < 60_000
        assert path.read_bytes()[16:24] == committed.read_bytes()[16:24]  # width and height


def test_pushes_are_minus_the_derivative_of_the_loss(plot_losses: ModuleType) -> None:
    rewards = np.linspace(-1.5, 1.5, plot_losses.NUM_POINTS)
    for name in plot_losses.PUSH_ROWS:
        found = plot_losses.pushes(name, rewards, -0.4)
        smooth = np.abs(rewards + 0.4 - 1) > 0.02  # hinge has a corner at margin 1
        slope = -np.gradient(found.losses.astype(np.float64), rewards)
        np.testing.assert_allclose(found.chosen[smooth][1:-1], slope[smooth][1:-1], atol=2e-2, err_msg=name)


@pytest.mark.ci
def test_the_model_of_three_answers_does_what_the_guide_says(plot_losses: ModuleType) -> None:
    runs = {title: plot_losses.toy_run(**options) for title, options in plot_losses.TOY_PANELS}
    odds = runs["sigmoid"][:, 0] / runs["sigmoid"][:, 1]
    assert (np.diff(odds) > 0).all()
    (start, end) = re.findall(r"the chosen answer falls from (0\.\d+) to (0\.\d+)", GUIDE)[0]
    np.testing.assert_allclose(runs["sigmoid"][[0, -1], 0], [float(start), float(end)], atol=5e-3)
    for name in ("nca_pair", "bco_pair", "apo_zero"):
        assert runs[name][:, 0].min() < runs[name][0, 0] < runs[name][-1, 0]
    for name in ("sigmoid, rpo_alpha = 1", "orpo", "sft"):
        assert (np.diff(runs[name][:, 0]) > 0).all()
    assert (np.diff(runs["apo_down"][:, 0]) < 0).all()
    np.testing.assert_allclose(runs["sigmoid"].sum(-1), 1, rtol=1e-5)


def test_discopop_turns_back_in_the_band_that_the_guide_names(plot_losses: ModuleType) -> None:
    (low, high) = (float(value) for value in re.findall(r"band is (-[\d.]+) < z < ([\d.]+)", GUIDE)[0])
    margins = np.linspace(-0.5, 0.5, plot_losses.NUM_POINTS)
    back = margins[plot_losses.pushes("discopop", margins, 0.0).chosen < 0]
    np.testing.assert_allclose([back.min(), back.max()], [low, high], atol=5e-3)
    assert np.diff(back).max() < 0.003  # one band, without a gap
