"""docs/losses.md says what jdpo does: its formulas, numbers, options, code and pictures, read from its tables."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdpo.losses import LOSSES, preference_loss
from jdpo.losses.divergences import F_DIVERGENCES, divergence_score
from jdpo.losses.settings import DEFAULTS, FOR_ALL, OFF

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
BETA = 0.1
NEEDED: dict[str, dict[str, float]] = {"exo_pair": {"label_smoothing": 1e-3}}

Rows = dict[str, dict[str, str]]


def table(*columns: str) -> Rows:
    """The one table of the guide whose header has these columns: {first cell without backticks: {column: cell}}."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", GUIDE, flags=re.M):
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines())
        if set(columns) <= set(header):
            found.append({row[0].strip("`"): dict(zip(header, row, strict=True)) for row in rows})
    assert len(found) == 1, (columns, len(found))
    return found[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, flags=re.M | re.S)


FORMULAS = table("loss of a pair")
CHOICES = table("needs")
EFFECTS = table("push on l_w")
HONOURED = table("of its own")


# --- the formulas


def evaluate(formula: str, names: dict[str, Any]) -> Any:
    """The value of a formula of the guide, `first part, x = what x stands for`; a space between two values multiplies.

    >>> evaluate("(a - 1/(2 beta))^2 + c, c = 3 a", {"a": 7.0, "beta": 0.1})
    25.0
    """
    body, *definitions = re.split(r", (?=\w+ = )", formula.strip("`"))
    names = dict(names)
    for definition in definitions:
        name, meaning = definition.split(" = ", 1)
        names[name] = evaluate(meaning, names)
    python = body.translate(str.maketrans("[]", "()")).replace("^", "**")
    python = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", re.sub(r"(?<!\w)(\d)(?=[a-z])", r"\1*", python))  # 2 x, 2x
    return eval(python, {"__builtins__": {}}, names)


def log_sigmoid(z: Any) -> Any:
    return -np.logaddexp(0, -z)


FUNCTIONS: dict[str, Any] = {
    "ls": log_sigmoid,
    "s": lambda z: np.exp(log_sigmoid(z)),
    "log": np.log,
    "exp": np.exp,
    "max": np.maximum,
    "sort": np.sort,
    "log1mexp": lambda x: np.log(1 - np.exp(x)),
}


def pairs(seed: int, num_pairs: int = 12) -> dict[str, np.ndarray]:
    """Arguments of preference_loss: log-ratios of a few nats, lengths of 1 to 12 tokens."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, (2, num_pairs))
    policy = -rng.uniform(0.2, 3, (2, num_pairs)) * lengths
    reference = policy + rng.normal(0, 6, (2, num_pairs))
    return {
        "policy_chosen_logps": policy[0].astype(np.float32),
        "policy_rejected_logps": policy[1].astype(np.float32),
        "reference_chosen_logps": reference[0].astype(np.float32),
        "reference_rejected_logps": reference[1].astype(np.float32),
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
    }


def notation(x: dict[str, np.ndarray], **options: float) -> dict[str, Any]:
    """The guide's names for them, in float64."""
    l_w, l_l, r_w, r_l, n_w, n_l = (values.astype(np.float64) for values in x.values())
    a, b = l_w - r_w, l_l - r_l
    smoothing = options.get("label_smoothing", 0.0)
    names = {"a": a, "b": b, "D": a - b, "z": BETA * (a - b), "beta": BETA, "e": smoothing, "N": n_w.mean()}
    names |= {
        "l_w": l_w,
        "l_l": l_l,
        "r_w": r_w,
        "r_l": r_l,
        "n_w": n_w,
        "n_l": n_l,
        "m_w": l_w / n_w,
        "m_l": l_l / n_l,
    }
    return FUNCTIONS | names | DEFAULTS | options


def slopes(x: dict[str, np.ndarray], loss_type: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The push on the log-prob of the chosen and the rejected sides, [b] each."""

    def total(chosen: Any, rejected: Any) -> Any:
        moved = x | {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
        return preference_loss(**moved, loss_type=loss_type, beta=BETA, **options).losses.sum()

    gradients = jax.grad(total, argnums=(0, 1))(*(jnp.asarray(values) for values in list(x.values())[:2]))
    return -np.asarray(gradients[0]), -np.asarray(gradients[1])


def cases() -> Iterator[Any]:
    """Every loss at its defaults, and with what smoothing and its own options change."""
    for name, spec in LOSSES.items():
        yield pytest.param(name, NEEDED.get(name, {}), id=name)
        given: dict[str, float] = {"label_smoothing": 0.2} if "label_smoothing" in spec.options else {}
        own = {"discopop_tau": 0.7, "simpo_gamma": 1.2, "cpo_alpha": 0.4, "orpo_lambda": 2.0, "bco_delta": 0.3}
        given |= {option: value for option, value in own.items() if option in spec.options}
        if given:
            yield pytest.param(name, given, id=f"{name}-{'-'.join(given)}")


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_a_loss_is_the_formula_of_the_guide(name: str, options: dict[str, float]) -> None:
    x = pairs(0)
    expected = evaluate(FORMULAS[name]["loss of a pair"], notation(x, **options))
    found = np.asarray(preference_loss(**x, loss_type=name, beta=BETA, **options).losses)
    if LOSSES[name].needs_global_batch:  # the guide writes them by rank, jdpo puts them at their pairs
        expected, found = np.sort(expected), np.sort(found)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_the_push_on_the_chosen_side_is_the_formula_of_the_guide(name: str, options: dict[str, float]) -> None:
    x = pairs(1)
    names = notation(x, **options)
    if LOSSES[name].needs_global_batch:
        names["d"] = evaluate(FORMULAS[name]["loss of a pair"].split(", d = ")[1], names)
    expected, found = evaluate(EFFECTS[name]["push on l_w"], names), slopes(x, name, **options)[0]
    if LOSSES[name].needs_global_batch:
        expected, found = np.sort(expected), np.sort(found)
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), rtol=2e-4, atol=1e-6)


def check_kind(name: str, kind: str, x: dict[str, np.ndarray], options: dict[str, float]) -> None:
    chosen, rejected = slopes(x, name, **options)
    names = notation(x)
    if kind == "difference" and name == "aot_unpaired":
        np.testing.assert_allclose(np.sort(chosen), np.sort(-rejected), rtol=1e-5)
        return
    if kind == "difference":
        np.testing.assert_allclose(chosen, -rejected, rtol=1e-5)
    elif kind == "difference a token":
        np.testing.assert_allclose(chosen * names["n_w"], -rejected * names["n_l"], rtol=1e-5)
    elif kind == "up":
        assert (chosen > 0).all()
        assert (rejected <= 0).all()
    elif kind == "level":
        level = np.log(2) / BETA if name == "nca_pair" else 1 / (2 * BETA)
        np.testing.assert_array_equal(np.sign(chosen), np.sign(level - names["a"]))
    else:
        assert kind == "down", kind
        near = np.abs(names["a"]) < np.abs(names["D"])
        assert 0 < near.sum() < len(near)
        assert (chosen[near] < 0).all()
        assert (rejected < 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_treats_the_chosen_side_as_the_guide_says(name: str) -> None:
    check_kind(name, EFFECTS[name]["kind"], pairs(2, 40), NEEDED.get(name, {}))


@pytest.mark.parametrize(("name", "kind"), [("apo_zero", "difference"), ("nca_pair", "up"), ("sigmoid", "level")])
def test_a_wrong_kind_would_show(name: str, kind: str) -> None:
    with pytest.raises(AssertionError):
        check_kind(name, kind, pairs(2, 40), {})


def test_divergences_are_the_formulas_of_the_guide() -> None:
    scores = table("score of a log-ratio r")
    assert tuple(scores) == F_DIVERGENCES
    r = np.linspace(-3, 3, 7)
    for name, row in scores.items():
        for alpha in (0.5, 2.0):
            expected = evaluate(row["score of a log-ratio r"], FUNCTIONS | {"r": r, "f_alpha_divergence_coef": alpha})
            found = divergence_score(jnp.asarray(r, jnp.float32), name, alpha)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


# --- the other columns


def test_every_loss_stands_in_every_table() -> None:
    for rows in (FORMULAS, CHOICES, EFFECTS, HONOURED):
        assert tuple(rows) == tuple(LOSSES)
        assert all(f"`{name}`" == row["name"] for name, row in rows.items())


@pytest.mark.parametrize("name", LOSSES)
def test_value_where_policy_equals_reference(name: str) -> None:
    cell = FORMULAS[name]["at the start"]
    if not LOSSES[name].needs_reference:
        assert cell == ""
        return
    x = pairs(3)
    x |= {side.replace("reference", "policy"): x[side] for side in x if side.startswith("reference")}
    found = preference_loss(**x, loss_type=name, beta=BETA, **NEEDED.get(name, {})).losses
    np.testing.assert_allclose(found, float(cell.split("= ")[-1]), rtol=1e-4)


def test_sources_are_those_of_the_catalogue() -> None:
    for name, row in FORMULAS.items():
        cited = re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{5})\)", row["source"])
        assert all(text == link for text, link in cited)
        assert [text for text, _ in cited] == re.findall(r"\d{4}\.\d{5}", LOSSES[name].source), name


def test_needs_and_defaults_are_those_of_the_catalogue() -> None:
    fields = {
        "reference": "needs_reference",
        "lengths": "needs_lengths",
        "token count": "needs_token_count",
        "state": "needs_state",
        "global batch": "needs_global_batch",
    }
    for name, row in CHOICES.items():
        needs = {need for need, field in fields.items() if getattr(LOSSES[name], field)}
        assert set(row["needs"].split(", ")) == needs, name
        defaults = dict(re.findall(r"`(\w+)` (\S+?)(?:,|$)", row["options of its own"]))
        assert {option: float(value == "true") if value in ("true", "false") else float(value)
                for option, value in defaults.items()} == {
            option: float({**DEFAULTS, **OFF}[option]) for option in own_options(name)
        }, name  # fmt: skip


SHARED = {
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "use_weighting",
    "pair_weights",
}


def own_options(name: str) -> frozenset[str]:
    return LOSSES[name].options - SHARED


def test_the_matrix_of_options_is_that_of_the_catalogue() -> None:
    for name, row in HONOURED.items():
        options = set(re.findall(r"`(\w+)`", row["of its own"]))
        for header, cell in row.items():
            assert header in ("name", "of its own") or cell in ("yes", ""), (name, header, cell)
            if cell == "yes":
                options |= set(re.findall(r"`(\w+)`", header))
        assert options == LOSSES[name].options, name


def test_every_option_is_named() -> None:
    trainer = {"reference", "reference_model", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
    for option in {*DEFAULTS, *OFF, *trainer, "loss_type", "beta", "loss_state", "normalizer"}:
        assert re.search(rf"`{option}\b", GUIDE), option
    (sentence,) = re.findall(r"^(.*) go with all\.$", GUIDE, flags=re.M)
    assert set(re.findall(r"`(\w+)`", sentence)) == FOR_ALL


# --- code, settings, links and pictures


def test_settings_of_the_guide_are_accepted(tmp_path: Path) -> None:
    from jdpo.config import DPOConfig, load_config
    from jdpo.training.step.tasks import loss_of

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
    spec = importlib.util.spec_from_file_location("plot_losses", ROOT / "scripts" / "plot_losses.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plot_losses"] = module
    spec.loader.exec_module(module)
    return module


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
