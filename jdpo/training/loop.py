"""The training run, read from top to bottom: set up, restore or start, step, evaluate, save, export."""

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
from jdpo.config import DPOConfig, TrainConfig, to_dict
from jdpo.data.loader import prefetch
from jdpo.reports.progress import RunDisplay, figures_of, make_console
from jdpo.reports.writers import JsonlWriter, Writer, cut_metrics, make_trackers
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated
from jdpo.training.batches import StepBatch
from jdpo.training.checks import check_evaluation, check_finite, check_start
from jdpo.training.compilation import Stopwatch, compiler_threads, persistent_cache
from jdpo.training.evaluation import Evaluation
from jdpo.training.finish import finish_run, step_to_export
from jdpo.training.fit import peak_memory
from jdpo.training.flops import StepFlops, peak_flops
from jdpo.training.interrupt import StopRequest
from jdpo.training.metrics import Throughput, Window, mean_over_rows, rows_at
from jdpo.training.preparation import (
    circumstances,
    fit_to_remember,
    prepare_steps,
    remembered_fit,
    rows_of_step,
    shapes_in_order,
)
from jdpo.training.processes import agree_on, is_first
from jdpo.training.profile import Profiler
from jdpo.training.reference import Reference, settle_reference
from jdpo.training.run_dir import RunDirectory
from jdpo.training.scoring import BuildStopped
from jdpo.training.setup import Setup, build, load_reference, load_start, numerics, program_folder, resolve_dtype
from jdpo.training.step import StepReport, TrainState, saved_parts
from jdpo.training.tasks import task_for

Params = Any
OnStep = Callable[[int, Params], None]


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


def train(config: TrainConfig, *, on_step: OnStep | None = None) -> RunResult:
    """Runs `jdpo sft` or `jdpo dpo`: starts, resumes, or finds the run finished.

    Args:
      config: an SFTConfig or a DPOConfig.
      on_step: called as on_step(step, params) before the first update of this process and after each update;
        the params are on the mesh and valid during the call only, as the next update reuses their memory.

    Returns:
      how it ended.

    Raises:
      ValueError: bad input, before anything is trained.
      FloatingPointError: loss or gradients are not finite; step and rows are named.
    """
    console = make_console()

    say = partial(_say, console)
    config = resolve_dtype(config)
    with (
        StopRequest() as stop,
        numerics(config),
        persistent_cache(program_folder(config)),
        closing(RunDirectory(config, task_for(config).command)) as directory,
    ):
        if directory.finished:
            step = directory.state()["results"]["step"]
            say(f"the run in {directory.path} is finished (step {step}); its model is {directory.model}")
            return RunResult(step, False, 0, directory)
        setup = build(config, say)
        directory.check_inputs(setup.inputs())
        try:
            reference = _settle(setup, directory, stop, say)
        except BuildStopped:
            say("stopped by a signal; what was computed is kept. Run the same command again to go on")
            return RunResult(0, True, stop.exit_code, directory)
        with ExitStack() as resources:
            return Run(setup, directory, stop, console, reference, resources).go(on_step)


def _settle(setup: Setup, directory: RunDirectory, stop: StopRequest, say: Callable[[str], None]) -> Reference:
    config = setup.config
    if not isinstance(config, DPOConfig):
        return Reference(mode="none")
    began_as: Any = directory.recall("reference")
    reference = settle_reference(
        setup,
        asked=config.reference,
        needs_reference=setup.task.uses_reference,
        sync_ref_model=config.sync_ref_model,
        began_as=began_as,
        stopped=stop.asked,
        say=say,
    )
    if began_as is None:
        directory.remember("reference", reference.mode)
    return reference


def _say(console: Console, text: str) -> None:
    """One message, once, whatever the number of processes; above the progress bar where there is one."""
    if is_first():
        console.print(text, markup=False, highlight=False)


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
    ) -> None:
        """
        Args:
          resources: takes what is to be closed when the run ends, however it ends.
        """
        config = setup.config
        self.setup, self.directory, self.stop, self.reference = setup, directory, stop, reference
        self.console, self.say = console, partial(_say, console)
        self.resources = resources
        pool = resources.enter_context(compiler_threads())
        now = circumstances(setup)
        prepared = prepare_steps(
            setup, reference, pool, self.say, remembered=remembered_fit(directory.recall("fit"), now)
        )
        directory.remember("fit", fit_to_remember(prepared.fit, now))
        self.assembly, self.train_batches, self.programs = prepared.assembly, prepared.batches, prepared.programs
        self.batch_sharding = micro_batch_sharding(setup.mesh)
        self.evaluation = None
        if setup.eval_data is not None:
            self.evaluation = Evaluation(
                setup,
                self.assembly,
                reference,
                pool,
                max_tokens_per_device=prepared.fit.max_tokens_per_device,
            )
        self.manager = CheckpointManager(
            directory.checkpoints,
            max_to_keep=config.save_total_limit,
            # Evaluation may change when a run goes on; values on other rows are no better or worse.
            metric_name=f"{config.metric_for_best_model} on {setup.eval_data.digest if setup.eval_data else 'nothing'}",
            greater_is_better=not config.metric_for_best_model.endswith("loss"),
        )
        resources.callback(self.manager.close)
        self.window, self.num_tokens = Window(), 0
        self.throughput = Throughput(
            unit=setup.task.unit,
            num_devices=setup.mesh.size,
            peak=peak_flops(setup.mesh.devices.flat[0].device_kind, config.compute_dtype),
        )
        self.last_saved: int | None = None
        self.writers: list[Writer] = []
        self.jsonl: JsonlWriter | None = None

    # --- start or resume

    def go(self, on_step: OnStep | None) -> RunResult:
        """Everything from the first array to the exported model."""
        num_steps = self.setup.num_steps
        state, reference, first = self._start()
        if self.stop.asked():
            return self._interrupted(first)
        if on_step is not None:
            on_step(first, state.params)
        if first < num_steps:
            state, done = self._steps(state, reference, first, on_step)
            if self.stop.asked():
                return self._interrupted(done)
        del reference
        self.manager.wait()
        exported = step_to_export(self.setup, self.manager)
        params = state.params
        del state  # the best checkpoint needs its room
        if exported != num_steps:
            del params
            params = self.manager.restore(exported, saved_parts(self.assembly.state)).state["params"]
        self.say(f"exporting the model of step {exported} to {self.directory.model}")
        finish_run(self.setup, self.directory, params, exported)
        self.say(f"done: model in {self.directory.model}, metrics in {self.directory.metrics}")
        return RunResult(num_steps, False, 0, self.directory)

    def _start(self) -> tuple[TrainState, Params, int]:
        config = self.setup.config
        newest = agree_on(self.manager.newest_whole_step() if is_first() else None)
        self._compile_from(newest or 0)
        if newest is None:
            if self.directory.has_metrics():
                self.say(f"no whole checkpoint in {self.directory.checkpoints}: starting again from step 0")
            state, frozen = self._fresh_state()
        else:
            frozen = None if self.assembly.sync else self._load_reference(None)
            restored = self.manager.restore(newest, saved_parts(self.assembly.state))
            state, position = TrainState(**restored.state), restored.position
            self.window, self.num_tokens = Window(position["window"]), position["num_tokens"]
            self.last_saved = newest
            self.say(f"resuming from the checkpoint of step {newest}")
        if is_first():
            cut_metrics(self.directory.metrics, newest or 0)
            self.jsonl = JsonlWriter(self.directory.metrics)
            self.writers = [self.jsonl, *make_trackers(config.report_to, self.directory.path, to_dict(config))]
            for writer in self.writers:
                self.resources.callback(writer.close)
        return state, frozen, newest or 0

    def _compile_from(self, first: int) -> None:
        """Starts compiling what the steps from here on need, while weights are being read."""
        steps = (rows_of_step(self.setup, step) for step in range(first, self.setup.num_steps))
        self.programs.prepare(shapes_in_order(self.train_batches, steps))
        if self.evaluation is not None:
            self.evaluation.prepare()

    def _fresh_state(self) -> tuple[TrainState, Params]:
        setup, assembly = self.setup, self.assembly
        params = load_start(setup)
        frozen = self._load_reference(params)
        rng = jax.random.key_data(jax.random.key(setup.config.seed))
        step, rng, loss_state = jax.device_put(
            (jnp.int32(0), rng, assembly.objective.init_state), replicated(setup.mesh)
        )
        init_opt_state = jax.jit(assembly.optimizer.init, out_shardings=assembly.state_shardings.opt_state)
        state = TrainState(step, params, init_opt_state(params), rng, loss_state)
        return (state._replace(reference_params=frozen), None) if assembly.sync else (state, frozen)

    def _load_reference(self, start: Params | None) -> Params | None:
        if self.reference.mode != "live":
            return None
        return load_reference(self.setup, start, moves=self.assembly.sync is not None)

    # --- the loop

    def _steps(
        self, state: TrainState, reference: Params, first: int, on_step: OnStep | None
    ) -> tuple[TrainState, int]:
        """The updates from `first` on. The host launches a step before it reads what the one before it gave."""
        setup, config = self.setup, self.setup.config
        display = RunDisplay(
            first_step=first, num_steps=setup.num_steps, unit=setup.task.unit, console=self.console, shown=is_first()
        )
        watch, profiler = Stopwatch(), Profiler(config.profile_steps, self.directory.path / "profile")
        take = partial(self._take, display, watch)
        waiting: _Launched | None = None
        done = first
        with display, closing(profiler):
            for indices, made, flops in prefetch(self._train_batch, range(first, setup.num_steps)):
                # What would not be counted as a step's time must not happen while one runs.
                apart = done == 1 or not self.programs.ready(made.batch) or profiler.is_due(done + 1)
                if apart and waiting is not None:
                    take(waiting)
                    waiting = None
                with watch.paused():
                    program = self.programs.of(made.batch)
                with profiler.step(done + 1):
                    state, on_device = program(state, reference, made.batch)
                    done += 1
                    before, waiting = waiting, _Launched(done, indices, made._replace(batch=None), flops, on_device)
                    if before is not None:
                        take(before)
                    if profiler.is_last(done):
                        jax.block_until_ready(on_device)
                if on_step is not None:
                    on_step(done, state.params)
                is_last, stopping = done == setup.num_steps, self.stop.poll()
                evaluating = self.evaluation is not None and (is_last or _is_due(done, config.eval_steps))
                saving = is_last or stopping or _is_due(done, config.save_steps)
                if evaluating or saving:
                    take(waiting)
                    waiting = None
                    with watch.paused():
                        metric = self._evaluate(done, state, reference) if evaluating else None
                        if saving:
                            self._save(done, state, metric)
                self.manager.poll()
                if stopping:
                    break
        if self.programs.num_late:  # planning knows all shapes: this is a fault of ours, and costs the user time
            self.say(f"note: {self.programs.num_late} shape(s) of batches were not compiled ahead of their step")
        return state, done

    def _train_batch(self, step: int) -> tuple[np.ndarray, StepBatch, StepFlops]:
        """The rows of a step, on the devices; made on a thread while earlier steps run."""
        indices = rows_of_step(self.setup, step)
        made = self.train_batches.make(indices)
        flops = self.assembly.flops(made.batch)
        return indices, made._replace(batch=place(made.batch, self.batch_sharding)), flops

    def _take(self, display: RunDisplay, watch: Stopwatch, launched: _Launched) -> None:
        """Waits for a step's report, checks its numbers, adds them to the window, logs where that is due."""
        done, indices, made, flops, on_device = launched
        report: StepReport = fetch(on_device)
        seconds = watch.lap()
        rows = rows_at(report.rows, made.at)
        loss, grad_norm = float(report.loss), float(report.grad_norm)
        data = self.setup.train_data
        if not report.finite:
            origins = [data[int(index)].origin for index in indices]
            weights = bool(np.isfinite([loss, grad_norm]).all())  # then it is the update that went wrong
            check_finite(done, loss, grad_norm, rows["loss"], origins, self.last_saved, weights_finite=not weights)
        if done == 1:
            with watch.paused():
                self._check_start(rows, indices)
        self.num_tokens += made.num_tokens
        values = {**mean_over_rows(rows), "loss": loss}
        padding = 1 - made.real_slots / made.num_slots
        self.window.add({**values, "grad_norm": grad_norm, "padding": padding})
        self.throughput.add(num_rows=len(indices), num_tokens=made.num_tokens, flops=flops, seconds=seconds)
        display.step(done, values, self.throughput.rates())
        if _is_due(done, self.setup.config.logging_steps) or done == self.setup.num_steps:
            self._log(done, report)

    def _check_start(self, rows: Mapping[str, np.ndarray], indices: np.ndarray) -> None:
        loss = self.setup.task.loss
        if loss is None or not loss.needs_reference:
            return
        pairs = [self.setup.train_data[int(index)] for index in indices]
        self.say(
            check_start(
                rows,
                loss,
                lengths=np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]),
                compute_dtype=self.setup.config.compute_dtype,
                reference_is_start=self.setup.reference_folder is None,
            )
        )

    # --- what is written on the way

    def _log(self, done: int, report: StepReport) -> None:
        self._write(
            {
                "step": done,
                "epoch": done / self.setup.steps_per_epoch,
                **self.window.averages(),
                # str gives the shortest decimal that is this float32: 0.001, not 0.0010000000474974513.
                "learning_rate": float(str(report.learning_rate)),
                "num_tokens": self.num_tokens,
                **self.throughput.rates(),
                "peak_memory_gib": peak_memory() / 2**30,
            }
        )
        self.window = Window()
        self.throughput.clear()

    def _write(self, line: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.write(line)

    def _evaluate(self, done: int, state: TrainState, reference: Params) -> float:
        """Writes the held-out metrics down; returns the one that ranks checkpoints."""
        assert self.evaluation is not None
        started = time.perf_counter()
        averages = self.evaluation.averages(state, reference)
        metrics = {f"eval_{name}": value for name, value in averages.items()}
        check_evaluation(done, metrics)
        seconds = time.perf_counter() - started
        line = {"step": done, "epoch": done / self.setup.steps_per_epoch, **metrics}
        self._write({**line, f"eval_{self.setup.task.unit}_per_second": len(self.evaluation) / seconds})
        self.say(f"held-out after step {done}: {figures_of(averages)}")
        return metrics[self.setup.config.metric_for_best_model]

    def _save(self, done: int, state: TrainState, metric: float | None) -> None:
        """Starts an asynchronous save; the lines of metrics.jsonl it vouches for go to the disk first."""
        if self.jsonl is not None:
            self.jsonl.sync()
        position = {
            "step": done,
            "epoch": done / self.setup.steps_per_epoch,
            "num_tokens": self.num_tokens,
            "window": self.window.to_json(),
            "config": to_dict(self.setup.config),
            "jdpo": __version__,
        }
        self.manager.save(done, saved_parts(state), position, metric=metric)
        self.last_saved = done

    def _interrupted(self, done: int) -> RunResult:
        self.manager.wait()
        saved = f"step {self.last_saved} is saved" if self.last_saved is not None else "nothing was trained yet"
        self.say(f"stopped by a signal; {saved}. Run the same command again to go on")
        return RunResult(done, True, self.stop.exit_code, self.directory)


def _is_due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
