"""A training run, read from top to bottom: prepare, restore or start, step, evaluate, save, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jdpo._version import __version__
from jdpo.checkpoint.manager import CheckpointManager
from jdpo.config import to_public_dict
from jdpo.data.batching.loader import prefetch
from jdpo.models.transformer import Weights
from jdpo.processes import is_first
from jdpo.reports.metrics_file import cut_metrics
from jdpo.reports.progress import RunDisplay, figures_of, print_lines
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.training.evaluation import Evaluation
from jdpo.training.finish import finish_run, step_to_export
from jdpo.training.fit.assembly import Assembly, assemble
from jdpo.training.fit.compilation import Stopwatch, compiler_threads
from jdpo.training.fit.flops import StepFlops
from jdpo.training.fit.memory_fit import exhaustion_explained, memory_limit
from jdpo.training.fit.preparation import (
    circumstances,
    fit_to_remember,
    prepare_steps,
    remembered_fit,
    rows_of_step,
    shapes_in_order,
)
from jdpo.training.interrupt import StopRequest, silence_lost_output
from jdpo.training.logs.metrics import mean_over_rows, rows_at
from jdpo.training.logs.recording import Record
from jdpo.training.profile import Profiler
from jdpo.training.reference.reference_source import Reference
from jdpo.training.run_dir import RunDirectory
from jdpo.training.sanity_checks import GradientWatch, check_evaluation, check_finite, check_start
from jdpo.training.setup.batches import StepBatch
from jdpo.training.setup.run_setup import Setup
from jdpo.training.setup.weight_placement import load_frozen, load_reference, load_start, whole_weights
from jdpo.training.step.train_step import Frozen, StepReport, TrainState, saved_parts
from jdpo.types import completions_of
from jdpo.words import figure

Params = Any
OnStep = Callable[[int, Params | Weights], None]


class RunResult(NamedTuple):
    """How a run ended.

    Attributes:
      step: updates made.
      interrupted: whether a signal stopped it; a checkpoint of `step` stands then.
      exit_code: 0, or 128 + the signal's number.
      directory: where everything lies.
    """

    step: int
    interrupted: bool
    exit_code: int
    directory: RunDirectory


def say_on(console: Console, text: str) -> None:
    """One message, once, whatever the number of processes; above the progress bar where there is one."""
    if is_first():
        try:
            print_lines(console, text)
        except OSError:  # the terminal, or what the output was piped to, is gone: no reason to end a run
            silence_lost_output()


class _Launched(NamedTuple):
    """A step whose report is still on its way.

    Attributes:
      done: updates made with it.
      indices: its rows.
      made: how they are laid out.
      flops: that it takes.
      on_device: its StepReport.
    """

    done: int
    indices: np.ndarray
    made: StepBatch
    flops: StepFlops
    on_device: StepReport


class Run:
    """The moving parts of a run, and the steps that move them."""

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        stop: StopRequest,
        console: Console,
        reference: Reference,
        resources: ExitStack,
        newest: int | None = None,
    ) -> None:
        """
        Args:
          newest: the step to continue from, from `find_newest`; None: this start begins at step 0.
          resources: takes what is to be closed when the run ends, however it ends.
        """
        config = setup.config
        self.setup, self.directory, self.stop, self.reference = setup, directory, stop, reference
        self.console, self.say = console, partial(say_on, console)
        self.resources = resources
        self.record = Record(setup, directory)
        self.base_identity = setup.base_identity()  # once: the folder may change or go while the run goes on
        self.manager = CheckpointManager(
            directory.checkpoints,
            max_to_keep=config.save_total_limit,
            # Evaluation may change when a run goes on; values on other rows are no better or worse.
            metric_name=f"{config.metric_for_best_model} on {setup.eval_data.digest if setup.eval_data else 'nothing'}",
            greater_is_better=not config.metric_for_best_model.endswith("loss"),
            verified=newest,
        )
        resources.callback(self.manager.close)
        self.last_saved = newest
        self.gradients = GradientWatch(
            setup.task.loss, learning_rate=config.learning_rate, compute_dtype=config.compute_dtype
        )
        self.assembly: Assembly

    # --- start or resume

    def go(self, on_step: OnStep | None) -> RunResult:
        """Everything from the first array to the exported model."""
        num_steps, first = self.setup.num_steps, self.last_saved or 0
        if first < num_steps:
            self._prepare(first)
        else:  # there is a model to export, and nothing to compile
            self.assembly = assemble(self.setup, reference=self.reference.mode, remat=self.setup.model.remat)
        # Of a run that ended, adapters are exported without the model under them.
        state, frozen = self._start(
            first, with_base=first < num_steps or on_step is not None or self.setup.exports_merged
        )
        if self.stop.asked():
            return self._interrupted(first)
        if on_step is not None:
            on_step(first, whole_weights(self.setup, state.params, frozen.base))
        if first < num_steps:
            with exhaustion_explained(self.fit):
                state, done = self._steps(state, frozen, first, on_step)
            if self.stop.asked():
                return self._interrupted(done)
        base = frozen.base if self.setup.exports_merged else None  # the reference is no longer needed
        del frozen
        self.manager.wait()
        exported = step_to_export(self.setup, self.manager)
        params = state.params
        del state  # the best checkpoint needs its room
        if exported != num_steps:
            del params
            params = self.manager.restore(exported, saved_parts(self.assembly.state)).state["params"]
        if (note := self.gradients.at_end()) is not None:
            self.say(note)
        self.say(f"exporting the model of step {exported} to {self.directory.model}")
        finish_run(self.setup, self.directory, params, base, exported, self.say)
        if (note := self.setup.train_data.drop_note) is not None:
            self.say(f"note: {note}")
        self.say(f"done: model in {self.directory.model}, metrics in {self.directory.metrics}")
        return RunResult(num_steps, False, 0, self.directory)

    def _prepare(self, first: int) -> None:
        """Settles how steps are computed, and starts compiling what those from `first` on need."""
        setup, directory = self.setup, self.directory
        pool = self.resources.enter_context(compiler_threads())
        now, limit = circumstances(setup, self.reference), memory_limit()
        remembered = remembered_fit(directory.recall("fit"), now, limit)
        prepared = prepare_steps(setup, self.reference, pool, self.say, remembered=remembered)
        directory.remember("fit", fit_to_remember(prepared.fit, now, limit))
        self.assembly, self.train_batches, self.programs = prepared.assembly, prepared.batches, prepared.programs
        self.fit = prepared.fit
        self.batch_sharding = micro_batch_sharding(setup.mesh)
        self.evaluation = None
        if setup.eval_data is not None:
            self.evaluation = Evaluation(
                setup,
                self.assembly,
                self.reference,
                pool,
                max_tokens_per_device=prepared.fit.max_tokens_per_device,
            )
        steps = (rows_of_step(setup, step) for step in range(first, setup.num_steps))
        self.programs.prepare(shapes_in_order(self.train_batches, steps))
        if self.evaluation is not None:
            self.evaluation.prepare()

    def _start(self, first: int, *, with_base: bool) -> tuple[TrainState, Frozen]:
        """The state behind step `first`, and the frozen weights beside it."""
        num_steps = self.setup.num_steps
        if self.last_saved is None:
            if self.directory.has_metrics():
                self.say(f"no whole checkpoint in {self.directory.checkpoints}: starting again from step 0")
            state, frozen = self._fresh_state()  # there are steps ahead, which need the base
        else:
            frozen = self._load_frozen(None, live=first < num_steps, with_base=with_base)
            restored = self.manager.restore(first, saved_parts(self.assembly.state))
            state = TrainState(**restored.state)
            self.record.restore(restored.position)
            self.say(f"resuming from the checkpoint of step {first}")
        if is_first():
            if (note := cut_metrics(self.directory.metrics, first)) is not None:
                self.say(f"warning: {note}")
            if first < num_steps:
                self.record.open(self.resources)
        return state, frozen

    def _fresh_state(self) -> tuple[TrainState, Frozen]:
        setup, assembly = self.setup, self.assembly
        params = load_start(setup)
        frozen = self._load_frozen(params, live=True)
        rng = jax.random.key_data(jax.random.key(setup.config.seed))
        step, rng, loss_state = jax.device_put(
            (jnp.int32(0), rng, assembly.objective.init_state), replicated(setup.mesh)
        )
        init_opt_state = jax.jit(assembly.optimizer.init, out_shardings=assembly.state_shardings.opt_state)
        state = TrainState(step, params, init_opt_state(params), rng, loss_state)
        if assembly.sync:
            state = state._replace(reference_params=load_reference(setup, params, moves=True))
        return state, frozen

    def _load_frozen(self, start: Params | None, *, live: bool, with_base: bool = True) -> Frozen:
        return load_frozen(
            self.setup,
            start,
            live=live and self.reference.mode == "live",
            moves=self.assembly.sync is not None,
            with_base=with_base,
        )

    # --- the loop

    def _steps(self, state: TrainState, frozen: Frozen, first: int, on_step: OnStep | None) -> tuple[TrainState, int]:
        """The updates from `first` on. The host launches a step before it reads what the one before it gave."""
        setup, config = self.setup, self.setup.config
        display = RunDisplay(
            first_step=first, num_steps=setup.num_steps, unit=setup.task.unit, console=self.console, shown=is_first()
        )
        watch, profiler = Stopwatch(), Profiler(config.profile_steps, self.directory.path / "profile")
        take = partial(self._take, display, watch)
        waiting: list[_Launched] = []  # one at most
        batches = prefetch(self._train_batch, range(first, setup.num_steps))
        done = first
        if profiler.is_over(first):
            self.say(f"profile_steps {config.profile_steps}: these steps were made before; nothing is traced")
        with display, closing(profiler), closing(batches):
            for indices, made, flops in batches:
                # What would not be counted as a step's time must not happen while one runs.
                if done == 1 or not self.programs.ready(made.batch) or profiler.is_due(done + 1):
                    take(waiting)
                with watch.paused():
                    with display.compiling():
                        program = self.programs.of(made.batch)
                    profiler.begin(done + 1)
                with profiler.around(done + 1):
                    state, on_device = program(state, frozen, made.batch)
                done += 1
                take(waiting)
                waiting.append(_Launched(done, indices, made._replace(batch=None), flops, on_device))
                if on_step is not None or profiler.is_last(done):
                    take(waiting)
                    with watch.paused():
                        profiler.end(done)
                        if on_step is not None:
                            on_step(done, whole_weights(self.setup, state.params, frozen.base))
                is_last, stopping = done == setup.num_steps, self.stop.poll()
                evaluating = self.evaluation is not None and (is_last or _is_due(done, config.eval_steps))
                saving = is_last or stopping or _is_due(done, config.save_steps)
                if evaluating or saving:
                    take(waiting)
                with watch.paused():
                    metric = self._evaluate(done, state, frozen, display) if evaluating else None
                    if saving:
                        self._save(done, state, metric)
                self.manager.poll()
                self.programs.check()
                if stopping:
                    break
        late = self.programs.num_late + (self.evaluation.programs.num_late if self.evaluation else 0)
        if late:  # planning knows all shapes: this is a fault of ours, and costs the user time
            self.say(f"note: programs for {figure(late, 'shape')} of batches were not compiled ahead of their step")
        return state, done

    def _train_batch(self, step: int) -> tuple[np.ndarray, StepBatch, StepFlops]:
        """The rows of a step, on the devices; made on a thread while earlier steps run."""
        indices = rows_of_step(self.setup, step)
        made = self.train_batches.make(indices)
        flops = self.assembly.flops(made.batch)
        return indices, made._replace(batch=place(made.batch, self.batch_sharding)), flops

    def _take(self, display: RunDisplay, watch: Stopwatch, waiting: list[_Launched]) -> None:
        """Waits for the report of the step under way, if any: checks its numbers, adds them up, logs where due."""
        if not waiting:
            return
        done, indices, made, flops, on_device = waiting.pop()
        report: StepReport = fetch(on_device)
        seconds = watch.lap()
        rows = rows_at(report.rows, made.at)
        loss, grad_norm = float(report.loss), float(report.grad_norm)
        data = self.setup.train_data
        if not report.finite:
            origins = [data[int(index)].origin for index in indices]
            # With finite numbers it is the update that went wrong.
            whole = not np.isfinite([loss, grad_norm]).all()
            check_finite(done, loss, grad_norm, rows["loss"], origins, self.last_saved, weights_finite=whole)
        if done == 1:
            with watch.paused():
                self._check_start(rows, indices)
        values = {**mean_over_rows(rows), "loss": loss}
        if report.aux_loss is not None:
            values["aux_loss"] = float(report.aux_loss)
        padding = 1 - made.real_slots / made.num_slots
        rates = self.record.add(
            {**values, "grad_norm": grad_norm, "padding": padding},
            rows,
            indices,
            num_tokens=made.num_tokens,
            flops=flops,
            seconds=seconds,
        )
        display.step(done, values, rates)
        if _is_due(done, self.setup.config.logging_steps) or done == self.setup.num_steps:
            averages = self.record.log(done, report.learning_rate)
            if (note := self.gradients.see(done, averages, self.last_saved)) is not None:
                self.say(note)

    def _check_start(self, rows: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
        loss = self.setup.task.loss
        if loss is None or not loss.needs_reference:
            return
        pairs = [self.setup.train_data[int(index)] for index in indices]
        self.say(
            check_start(
                rows,
                loss,
                lengths=np.array([[mask.sum() for _, mask in completions_of(pair)] for pair in pairs]),
                compute_dtype=self.setup.config.compute_dtype,
                reference_is_start=self.setup.reference_is_start,
            )
        )

    def _evaluate(self, done: int, state: TrainState, frozen: Frozen, display: RunDisplay) -> float:
        """Writes the held-out metrics down; returns the one that ranks checkpoints."""
        assert self.evaluation is not None
        with display.compiling():  # which is no part of its time
            self.evaluation.programs.wait()
        started = time.perf_counter()
        averages = self.evaluation.averages(state, frozen)
        seconds = time.perf_counter() - started
        metrics = {f"eval_{name}": value for name, value in averages.items()}
        check_evaluation(done, metrics)
        rate = {f"eval_{self.setup.task.unit}_per_second": len(self.evaluation) / seconds}
        self.record.write(done, metrics | rate)
        self.say(f"held-out after step {done}: {figures_of(averages)}")
        return metrics[self.setup.config.metric_for_best_model]

    def _save(self, done: int, state: TrainState, metric: float | None) -> None:
        """Starts an asynchronous save; the lines of metrics.jsonl it vouches for are on the disk before."""
        position = {
            "step": done,
            "epoch": done / self.setup.steps_per_epoch,
            **self.record.position(),
            "config": to_public_dict(self.setup.config),
            "jdpo": __version__,
        }
        if self.base_identity is not None:
            position["base"] = self.base_identity
        self.manager.save(done, saved_parts(state), position, metric=metric)
        self.last_saved = done

    def _interrupted(self, done: int) -> RunResult:
        self.manager.wait()
        saved = f"step {self.last_saved} is saved" if self.last_saved is not None else "nothing was trained yet"
        self.say(f"stopped by a signal; {saved}. Run the same command again to go on")
        return RunResult(done, True, self.stop.exit_code, self.directory)


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
