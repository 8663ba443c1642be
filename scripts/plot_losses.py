"""Draws the pictures of docs/losses.md: the value of each preference loss, and where its gradient pushes.

    python scripts/plot_losses.py [--out docs/images/losses]

Takes seconds. Every value is jdpo's own and every slope is jax.grad of it; no formula is written here a second time.
A push is minus the derivative of a pair's loss with respect to the reward beta * l of one side, l its summed log-prob:
above 0 the loss raises that side, below 0 it lowers it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdpo.losses import LOSSES, preference_loss
from jdpo.losses.pairwise import divergence_score

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images" / "losses"
REFERENCE_LOGP, LENGTH = -20.0, 10
"""Both sides of every drawn pair under the reference, for losses that read more than log-ratios: 2 nats per token."""

CHOSEN_COLOUR, REJECTED_COLOUR, LINE_COLOUR = "#0072B2", "#D55E00", "#222222"
DIVERGENCE_STYLES = {
    "reverse_kl": ("#222222", "-"),
    "forward_kl": ("#D55E00", "--"),
    "js_divergence": ("#0072B2", "-."),
    "alpha_divergence": ("#009E73", ":"),
}
"""Distinguished by dashes in grey, by colour otherwise (Okabe and Ito's palette)."""

NUM_POINTS = 501
"""Of every curve: one shape, so that jax compiles each operation once."""

NUM_COLOURS = 48
"""In a picture: enough for smooth lines, at a third of the size."""

Array = Any
NEEDED: dict[str, dict[str, float]] = {"exo_pair": {"label_smoothing": 1e-3}}
"""Options without which a loss is not defined."""


class Pushes(NamedTuple):
    """The loss of each pair, and its push on the rewards of both sides: float [b] each."""

    losses: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def pushes(loss_type: str, chosen: Any, rejected: Any, *, beta: float = 1.0, **options: Any) -> Pushes:
    """Evaluates one loss at pairs with the given log-ratios.

    Args:
      loss_type: a name in LOSSES, but none that looks at other pairs.
      chosen, rejected: float [b], policy minus reference summed log-prob: a and b; one may be a number.
      beta: as in preference_loss.
      **options: as in preference_loss.
    """
    assert "global batch" not in LOSSES[loss_type].needs, loss_type
    ratios = [jnp.asarray(values, jnp.float32) for values in np.broadcast_arrays(chosen, rejected)]
    reference, lengths = jnp.full_like(ratios[0], REFERENCE_LOGP), jnp.full(ratios[0].shape, LENGTH)

    def total(chosen_rewards: Array, rejected_rewards: Array) -> tuple[Array, Array]:
        losses = preference_loss(
            reference + chosen_rewards / beta,
            reference + rejected_rewards / beta,
            reference,
            reference,
            loss_type=loss_type,
            beta=beta,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
            **{**NEEDED.get(loss_type, {}), **options},
        ).losses
        return losses.sum(), losses

    slopes, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(*(beta * ratio for ratio in ratios))
    return Pushes(*(np.asarray(values) for values in (losses, -slopes[0], -slopes[1])))


# --- losses that look at the margin


MARGIN_PANELS: Sequence[tuple[str, str, Mapping[str, Any]]] = (
    ("sigmoid", "sigmoid", {}),
    ("sigmoid", "sigmoid, e = 0.1 (cDPO)", {"label_smoothing": 0.1}),
    ("robust", "robust, e = 0.1", {"label_smoothing": 0.1}),
    ("hinge", "hinge", {}),
    ("ipo_sum", "ipo_sum", {}),
    ("exo_pair", "exo_pair, e = 0.001", {"label_smoothing": 1e-3}),
    ("discopop", "discopop, tau = 0.05", {}),
)


def draw_margins(path: Path) -> None:
    """Draws loss and push over the margin; every column also shows sigmoid for comparison."""
    margins = np.linspace(-5, 5, NUM_POINTS)
    figure, axes = _grid(2, len(MARGIN_PANELS), size=(12.6, 4.3))
    plain = pushes("sigmoid", margins, 0.0)
    for column, (loss_type, title, options) in enumerate(MARGIN_PANELS):
        found = pushes(loss_type, margins, 0.0, **options)
        for row, (grey, values) in enumerate(((plain.losses, found.losses), (plain.chosen, found.chosen))):
            panel = axes[row, column]
            panel.axhline(0, color="0.8", linewidth=0.8)
            panel.plot(margins, grey, color="0.65", linewidth=1.2)
            panel.plot(margins, values, color=LINE_COLOUR, linewidth=1.9)
            panel.set_ylim((-1.1, 5.5) if row == 0 else (-1.2, 2.0))
        axes[0, column].set_title(title, fontsize=9.5)
        axes[1, column].set_xlabel("margin βD", fontsize=9)
    axes[0, 1].annotate("sigmoid", (-3.4, 3.4), xytext=(-1.6, 4.7), fontsize=8, color="0.45", arrowprops=_thin())
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("push on the margin\n(0: at rest)")
    _save(figure, path)


# --- losses that look at each side


SIDE_PANELS = ("nca_pair", "bco_pair", "apo_zero", "apo_down", "sppo_hard")


def draw_sides(path: Path) -> None:
    """Draws loss and push over the reward of one side, with the other side at the reference."""
    rewards = np.linspace(-4, 4, NUM_POINTS)
    figure, axes = _grid(2, len(SIDE_PANELS), size=(10.4, 4.3))
    for column, loss_type in enumerate(SIDE_PANELS):
        moved = pushes(loss_type, rewards, 0.0), pushes(loss_type, 0.0, rewards)
        curves = ((moved[0].losses, moved[1].losses), (moved[0].chosen, moved[1].rejected))
        for row, (chosen, rejected) in enumerate(curves):
            panel = axes[row, column]
            panel.axhline(0, color="0.8", linewidth=0.8)
            panel.plot(rewards, chosen, color=CHOSEN_COLOUR, linewidth=1.9)
            panel.plot(rewards, rejected, color=REJECTED_COLOUR, linewidth=1.9, linestyle=(0, (4, 1.5)))
            panel.set_ylim((0, 5.5) if row == 0 else (-1.15, 1.15))
        axes[0, column].set_title(loss_type, fontsize=9.5)
        axes[1, column].set_xlabel("reward βa or βb", fontsize=9)
    axes[0, 2].text(-3.8, 1.7, "chosen\nmoves", color=CHOSEN_COLOUR, fontsize=8.5)
    axes[0, 2].text(0.9, 1.7, "rejected\nmoves", color=REJECTED_COLOUR, fontsize=8.5)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("push on the side\nthat moves")
    _save(figure, path)


# --- f-divergences


def draw_divergences(path: Path) -> None:
    """Draws the score of a log-ratio under each divergence, and sigmoid's pushes on both sides with it."""
    ratios = np.linspace(-3, 3, NUM_POINTS)
    figure, axes = _grid(1, 3, size=(10.4, 3.5), share_y=False)
    for name, (colour, dashes) in DIVERGENCE_STYLES.items():
        style: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.9}
        score = divergence_score(jnp.asarray(ratios, jnp.float32), name, 0.5)
        raised = pushes("sigmoid", ratios, 0.0, f_divergence_type=name).chosen
        lowered = pushes("sigmoid", 0.0, ratios, f_divergence_type=name).rejected
        for panel, values in zip(axes[0], (score, raised, lowered), strict=True):
            panel.plot(ratios, values, label=name.replace("_", " "), **style)
    for panel, title, x_label, limits in zip(
        axes[0],
        ("score", "sigmoid's push on the chosen side", "sigmoid's push on the rejected side"),
        ("log-ratio r", "a, with b = 0", "b, with a = 0"),
        ((-4, 3), (-0.1, 2.0), (-1.1, 0.1)),
        strict=True,
    ):
        panel.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        panel.set_title(title, fontsize=9.5)
        panel.set_xlabel(x_label, fontsize=9)
        panel.set_ylim(limits)
    axes[0, 0].legend(frameon=False, fontsize=8.5, handlelength=3.2, loc="lower right")
    _save(figure, path)


# --- what a pair feels


STATES: Sequence[tuple[str, float, float]] = (
    ("the start:\na = b = 0", 0.0, 0.0),
    ("learnt:\na = +5, b = -15", 5.0, -15.0),
    ("learnt, but both fell:\na = -5, b = -25", -5.0, -25.0),
    ("the wrong way round:\na = -10, b = +10", -10.0, 10.0),
)
"""Title and log-ratios in nats; at beta 0.1 the rewards are a tenth."""

USUAL_BETA = {"simpo": 2.0, "sigmoid_norm": 5.0}
"""What the papers take where they average over tokens; 0.1 elsewhere."""

PUSH_ROWS = (
    *("sigmoid", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm", "simpo", "cpo", "orpo", "sft"),
)
"""Losses of the picture, none of which looks at other pairs."""


def draw_pushes(path: Path) -> None:
    """Draws where every loss pushes both sides of a pair, in four states of training."""
    _, chosen, rejected = zip(*STATES, strict=True)
    found = {name: pushes(name, chosen, rejected, beta=USUAL_BETA.get(name, 0.1)) for name in PUSH_ROWS}
    figure, axes = _grid(1, len(STATES), size=(10.4, 7.0), share_y=True)
    heights = np.arange(len(PUSH_ROWS))
    for column, (title, _, _) in enumerate(STATES):
        panel = axes[0, column]
        for height, name in zip(heights, PUSH_ROWS, strict=True):
            most = max(np.abs(found[name].chosen).max(), np.abs(found[name].rejected).max())
            panel.barh(height - 0.19, found[name].chosen[column] / most, 0.34, color=CHOSEN_COLOUR, label="chosen")
            panel.barh(
                height + 0.19, found[name].rejected[column] / most, 0.34,
                facecolor="white", edgecolor=REJECTED_COLOUR, hatch="/////", linewidth=0.8, label="rejected",
            )  # fmt: skip
        panel.axvline(0, color="0.4", linewidth=0.8)
        panel.set_title(title, fontsize=9.5)
        panel.set_xlim(-1.08, 1.08)
        panel.set_xticks((-1, 0, 1), ("down", "0", "up"))
        panel.set_ylim(len(PUSH_ROWS) - 0.4, -0.6)
        panel.grid(visible=False)
    axes[0, 0].set_yticks(heights, PUSH_ROWS)
    bars, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(bars[:2], labels[:2], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)


# --- why the chosen answer may fall


ANSWERS = np.array([[1.0, 0.15], [1.0, -0.35], [-0.2, 1.0]], np.float32)
"""Output embeddings of a chosen, a rejected and another answer: the first two are alike, the third is not."""

START = np.array([1.2, 0.6], np.float32)
TOY_STEPS, TOY_STRIDE = 60, 0.06
TOY_PANELS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("sigmoid", {"loss_type": "sigmoid"}),
    ("sigmoid, rpo_alpha = 1", {"loss_type": "sigmoid", "rpo_alpha": 1.0}),
    ("nca_pair", {"loss_type": "nca_pair"}),
    ("bco_pair", {"loss_type": "bco_pair"}),
    ("apo_zero", {"loss_type": "apo_zero"}),
    ("apo_down", {"loss_type": "apo_down"}),
    ("orpo", {"loss_type": "orpo"}),
    ("sft", {"loss_type": "sft"}),
)


def toy_run(**options: Any) -> np.ndarray:
    """Trains a model of three answers on one pair and returns their probabilities, [steps + 1, 3].

    p(answer) = softmax(ANSWERS @ h), and h alone learns: what raises one answer moves those like it. Every step of
    gradient descent has the length TOY_STRIDE, so that losses of any scale go equally far.

    Args:
      **options: of preference_loss; beta is 1.
    """

    def log_probs(hidden: Array) -> Array:
        return jax.nn.log_softmax(jnp.asarray(ANSWERS) @ hidden)[:, None]

    reference, one = log_probs(jnp.asarray(START)), jnp.ones(1, int)

    def loss(hidden: Array) -> Array:
        chosen, rejected, _ = log_probs(hidden)
        return preference_loss(
            chosen, rejected, reference[0], reference[1], beta=1.0, chosen_lengths=one, rejected_lengths=one, **options
        ).losses[0]

    def step(hidden: Array, _: None) -> tuple[Array, Array]:
        slope = jax.grad(loss)(hidden)
        return hidden - TOY_STRIDE * slope / jnp.maximum(jnp.linalg.norm(slope), 1e-6), log_probs(hidden)[:, 0]

    _, trace = jax.lax.scan(step, jnp.asarray(START), None, length=TOY_STEPS + 1)
    return np.exp(np.asarray(trace))


def draw_toy(path: Path) -> None:
    """Draws the probabilities of the three answers during training, loss by loss."""
    figure, axes = _grid(2, len(TOY_PANELS) // 2, size=(10.4, 4.8), share_y=True)
    for panel, (title, options) in zip(axes.flat, TOY_PANELS, strict=True):
        chosen, rejected, other = toy_run(**options).T
        panel.plot(chosen, color=CHOSEN_COLOUR, linewidth=2.1)
        panel.plot(rejected, color=REJECTED_COLOUR, linewidth=1.9, linestyle=(0, (4, 1.5)))
        panel.plot(other, color="0.5", linewidth=1.6, linestyle=":")
        panel.axhline(chosen[0], color="0.8", linewidth=0.8, zorder=0)
        panel.set_title(title, fontsize=9.5)
        panel.set_ylim(0, 1)
    for panel in axes[1]:
        panel.set_xlabel("step", fontsize=9)
    for panel in axes[:, 0]:
        panel.set_ylabel("probability")
    for x, y, name, colour in (
        (20, 0.72, "another", "0.4"),
        (40, 0.3, "chosen", CHOSEN_COLOUR),
        (1, 0.06, "rejected", REJECTED_COLOUR),
    ):
        axes[0, 0].text(x, y, name, color=colour, fontsize=8.5)
    _save(figure, path)


# --- drawing


def _grid(
    rows: int, columns: int, *, size: tuple[float, float], share_x: bool = True, share_y: Any = "row"
) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The object interface draws without a display and without a global figure list.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=share_x, sharey=share_y, squeeze=False)
    for panel in axes.flat:
        panel.grid(alpha=0.2)
        panel.tick_params(labelsize=8.5)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _thin() -> dict[str, Any]:
    return {"arrowstyle": "-", "color": "0.6", "linewidth": 0.8}


def _save(figure: Any, path: Path) -> None:
    from matplotlib import rc_context
    from PIL import Image

    figure.set_dpi(100)
    with rc_context({"hatch.linewidth": 0.7}):
        figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    picture.quantize(NUM_COLOURS).save(path, optimize=True)


PICTURES: Mapping[str, Callable[[Path], None]] = {
    "margins.png": draw_margins,
    "sides.png": draw_sides,
    "divergences.png": draw_divergences,
    "pushes.png": draw_pushes,
    "toy.png": draw_toy,
}
"""File name and what draws it."""


def draw_all(folder: Path) -> list[Path]:
    """Writes every picture.

    Args:
      folder: made if missing.

    Returns:
      the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw(folder / name)
    return [folder / name for name in PICTURES]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="FOLDER")
    for path in draw_all(parser.parse_args().out):
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
