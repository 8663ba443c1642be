"""A plan for several targets in the terminal: a table, then each target by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jdpo.planning.plan_command.outlook import Outlook, Range
from jdpo.planning.plan_command.pasted_settings import pasted_settings
from jdpo.planning.plan_command.question import Question
from jdpo.planning.plan_command.ranges import money_range, number_range, time_range
from jdpo.planning.target_plan import TargetPlan
from jdpo.safe_text import terminal, terminal_lines
from jdpo.words import figure, memory, percent

MOST_WIDTH = 110
MOST_ERROR_LINES = 8
"""Lines of a compiler's error that are shown; --json has all."""

DROPPED_FIRST = ("tokens", "remat", "mesh", "memory", "optimizer", "how")
"""Columns that are left out, in this order, until the table fits the terminal; what they say is below it, too."""

Line = tuple[str, str]
"""A label and its text."""


def print_plan(question: Question, outlooks: list[Outlook], console: Console) -> None:
    """Prints the answer for all targets."""
    console.width = min(console.width, MOST_WIDTH)
    console.print(Text(f"What jdpo {question.command} would take", "bold"))
    console.print(_grid(_asked(question)))
    console.print()
    console.print(_table(question, outlooks, console))
    if times := list(_bases(outlooks)):
        console.print()
        console.print(_grid(times))
    for outlook in outlooks:
        console.print()
        console.rule(Text(outlook.machine.name, "bold"), align="left", characters="-", style="dim")
        console.print(_grid(_details(question, outlook)))
        if outlook.plan is not None and outlook.fits:
            console.print(Text("  settings", "dim"))
            pasted = pasted_settings(outlook.plan, question.optimizer, question.rows_per_device)
            # Never broken: it is to be copied.
            console.print(Padding(Text(pasted), (0, 0, 0, 4)), soft_wrap=True)


def _asked(question: Question) -> Iterator[Line]:
    rows, run, prices = question.rows, question.run, question.prices
    unit = "pair" if question.command == "dpo" else "row"
    mean = " + ".join(f"{number:,.0f}" for number in rows.lengths.mean(0))
    alike = "each " if len(rows.lengths) == 1 else "on average "
    parts = " (prompt, chosen, rejected)" if rows.lengths.shape[1] == 3 else ""
    yield "model", terminal(question.model)
    yield "rows", f"{alike}{mean} tokens{parts}, from {terminal(rows.source)}"
    reference = f"; reference {run.reference}" if question.command == "dpo" else ""
    yield "step", f"{figure(question.rows_per_step, unit)}{reference}; optimizer {question.optimizer.name}"
    yield "run", run.why if run.num_steps is None else f"{figure(run.num_steps, 'step')}: {run.why}"
    for note in run.notes:
        yield "note", note
    if prices is not None:
        yield "prices", terminal(prices.path)


def _bases(outlooks: list[Outlook]) -> Iterator[Line]:
    """Yields what the times rest on, once for all targets of which it is the same."""
    fitting = [outlook.plan for outlook in outlooks if outlook.plan is not None and outlook.fits]
    for basis in dict.fromkeys(plan.rests_on for plan in fitting):
        yield "times", f"{', '.join(plan.target for plan in fitting if plan.rests_on == basis)}: {terminal(basis)}"


# --- the table


def _table(question: Question, outlooks: list[Outlook], console: Console) -> Table:
    rows = [_row(question, outlook) for outlook in outlooks]
    # A column that is empty, or alike with what was asked for, tells nothing.
    estimated = any(row["how"] == "formula" for row in rows)
    names = [name for name in rows[0] if any(row[name] for row in rows) and (name != "how" or estimated)]
    table = _drawn(rows, names)
    # As wide as it would be without limits, in one line per target.
    limits = console.options.update(width=1000)
    for dropped in DROPPED_FIRST:
        if Measurement.get(console, limits, table).maximum <= console.width:
            break
        names = [name for name in names if name != dropped]
        table = _drawn(rows, names)
    return table


def _drawn(rows: list[dict[str, str]], names: list[str]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        right = name in ("tokens", "memory", "step", "run", "cost")
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name], "" if name != "fits" else _style(row[name])) for name in names))
    return table


def _style(fits: str) -> str:
    return "green" if fits.startswith("yes") else "red"


def _row(question: Question, outlook: Outlook) -> dict[str, str]:
    plan = outlook.plan
    row = {"target": outlook.machine.name, "fits": fits_text(outlook)}
    empty = dict.fromkeys(("how", "mesh", "tokens", "remat", "optimizer", "memory", "step", "run", "cost"), "")
    if plan is None:
        return row | empty
    another = plan.optimizer != question.optimizer.name
    row |= empty | {
        "how": "formula" if plan.how == "estimated" else "compiled",
        "mesh": mesh_text(plan),
        "tokens": f"{plan.max_tokens_per_device:,}",
        "remat": plan.remat,
        "optimizer": plan.optimizer if another else "",
        "memory": percent(plan.peak_bytes / plan.limit_bytes),
    }
    if plan.step_seconds is not None:
        row["step"] = time_range(plan.step_seconds)
    if outlook.run_seconds is not None:
        row["run"] = time_range(outlook.run_seconds)
    if outlook.cost is not None:
        row["cost"] = money_range(outlook.cost, question.prices.currency if question.prices else "")
    return row


def fits_text(outlook: Outlook) -> str:
    """Returns whether a run fits, in a few words."""
    plan = outlook.plan
    if plan is None:
        return "not planned"
    if plan.fits:
        return "yes"
    return f"no, {memory(plan.missing_bytes)} short" if plan.missing_bytes else "no"


def mesh_text(plan: TargetPlan) -> str:
    """Returns the axes of a mesh that have more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1 device"


# --- one target


def _details(question: Question, outlook: Outlook) -> Iterator[Line]:
    machine, plan = outlook.machine, outlook.plan
    pieces = figure(machine.chips, "GPU" if machine.is_gpu else "chip")
    devices = f" ({figure(machine.num_devices, 'device')})" if machine.num_devices != machine.chips else ""
    slices = f", {machine.slices} slices" if machine.slices > 1 and not machine.is_gpu else ""
    yield "machine", f"{pieces}{devices} on {figure(machine.num_hosts, 'host')}{slices}: {machine.kind}"
    if plan is None:
        yield "failed", _shortened(outlook.failure or "")
        return
    yield "fits", fits_text(outlook)
    yield "memory", _memory(plan)
    if plan.error is not None:
        yield "compiler", _shortened(plan.error)
    yield from _work(question, plan)
    if plan.step_seconds is not None:
        yield from _time(question, outlook, plan, plan.step_seconds)
    how = figure(plan.num_compilations, "compilation") if plan.how == "compiled" else "by formula, nothing was compiled"
    yield "made", f"{how}{'; planned earlier, from the cache' if plan.from_cache else ''}"
    for suggestion in plan.suggestions:
        yield "change", terminal(suggestion)


def _memory(plan: TargetPlan) -> str:
    kinds = ", ".join(f"{kind} {memory(size)}" for kind, size in plan.as_dict()["memory"].items() if size)
    allowed = f"{memory(plan.limit_bytes)} of {memory(plan.hbm_bytes)}"
    return f"{memory(plan.peak_bytes)} at the peak of a step, which may use {allowed}: {kinds}"


def _work(question: Question, plan: TargetPlan) -> Iterator[Line]:
    unit = "pairs" if question.command == "dpo" else "rows"
    of_one = f"{plan.pairs_per_micro_batch:,.4g} {unit if plan.pairs_per_micro_batch != 1 else unit[:-1]}"
    batches = "1 micro-batch" if plan.micro_batches == 1 else f"{plan.micro_batches:,} micro-batches"
    yield "mesh" if plan.fits else "tried", f"{mesh_text(plan)}; remat {plan.remat}; optimizer {plan.optimizer}"
    yield (
        "batch",
        f"{batches} of {of_one}, at most {plan.max_tokens_per_device:,} tokens per "
        f"device; {plan.padding:.2f} slots computed per token",
    )
    if plan.wire_inside_bytes is not None and plan.num_devices > 1:
        across = "" if plan.num_slices == 1 else f", {memory(plan.wire_across_bytes or 0)} across slices or nodes"
        yield "links", f"a device sends {memory(plan.wire_inside_bytes)} per step within its slice or node{across}"


def _time(question: Question, outlook: Outlook, plan: TargetPlan, step_seconds: Range) -> Iterator[Line]:
    low, high = step_seconds
    speed = number_range((plan.tokens_per_step / high, plan.tokens_per_step / low))
    mfu = "" if plan.mfu is None else f"; MFU {number_range((100 * plan.mfu[0], 100 * plan.mfu[1]))} %"
    yield "speed", f"{time_range(step_seconds)} per step, {speed} tokens per second{mfu}"
    if outlook.run_seconds is not None and outlook.training_seconds is not None:
        before = outlook.reference_seconds
        more = "" if before is None else f" and {time_range(before)} for the reference's log-probs, once"
        run = f"{time_range(outlook.training_seconds)} of steps{more}; without start-up, evaluation and saving"
        yield "run", run
    if question.prices is None:
        return
    if outlook.price_per_hour is None:
        name = outlook.machine.version
        yield "cost", f"{terminal(question.prices.path)} has no price for it: add {name} under per_chip_hour"
    elif outlook.cost is not None:
        currency = question.prices.currency
        yield (
            "cost",
            f"{money_range(outlook.cost, currency)} at {outlook.price_per_hour:,.2f} {currency}".rstrip() + " per hour",
        )


def _shortened(text: str) -> str:
    lines = terminal_lines(text).strip().splitlines()
    more = len(lines) - MOST_ERROR_LINES
    shown = lines[:MOST_ERROR_LINES]
    return "\n".join(shown + ([f"({figure(more, 'more line')}; --json shows all)"] if more > 0 else []))


def _grid(lines: Iterable[Line]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=10)
    grid.add_column(overflow="fold")  # never cut: paths and errors are to be copied
    for label, text in lines:
        # Text objects, never strings: rich reads [bold] in a string as markup.
        grid.add_row(Text(f"  {label}", "dim"), Text(text))
    return grid
