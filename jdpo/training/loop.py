"""The training run, read from top to bottom: set up, restore or start, step, evaluate, save, export."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jdpo._version import __version__
from jdpo.checkpoint.hf_export import export_model
from jdpo.checkpoint.manager import CheckpointManager
from jdpo.config import DPOConfig, TrainConfig, to_dict, to_yaml
from jdpo.data.loader import plan, prefetch
from jdpo.data.prepare import PreparedData
from jdpo.data.reference_cache import ReferenceCache
from jdpo.losses.objective import Totals
from jdpo.models.transformer import abstract_params
from jdpo.reports.model_card import model_card
from jdpo.reports.plots import write_plots
from jdpo.reports.progress import RunDisplay, figures_of, make_console
from jdpo.reports.writers import JsonlWriter, Writer, cut_metrics, make_trackers, read_metrics
from jdpo.sharding.mesh import num_batch_shards
from jdpo.sharding.placement import fetch, micro_batch_sharding, place, replicated, state_shardings
from jdpo.training.batches import MAX_TOKENS_PER_DEVICE, Batches, PackedBatches, PaddedBatches, StepBatch
from jdpo.training.checks import check_evaluation, check_finite, check_start
from jdpo.training.interrupt import StopRequest
from jdpo.training.metrics import RowAverages, Throughput, Window, mean_over_rows, rows_at
from jdpo.training.optimizer import learning_rate_schedule, make_optimizer
from jdpo.training.processes import agree_on, barrier, is_first
from jdpo.training.reference import Reference, settle_reference
from jdpo.training.reference_build import BuildStopped
from jdpo.training.run_dir import RunDirectory
from jdpo.training.setup import Setup, build, load_reference, load_start, numerics, resolve_dtype
from jdpo.training.step import ReferenceSync, StepReport, TrainState, compile_step, saved_parts
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
        run = Run(setup, directory, stop, console, reference)
        try:
            return run.go(on_step)
        finally:
            run.close()


def _settle(setup: Setup, directory: RunDirectory, stop: StopRequest, say: Callable[[str], None]) -> Reference:
    config = setup.config
    if not isinstance(config, DPOConfig):
        return Reference(mode="none")
    began_as: Any = directory.reference_mode
    reference = settle_reference(
        setup,
        asked=config.reference,
        needs_reference=setup.task.uses_reference,
        sync_ref_model=config.sync_ref_model,
        began_as=began_as,
        stopped=stop.asked,
        say=say,
    )
    directory.remember_reference(reference.mode)
    return reference


def _say(console: Console, text: str) -> None:
    """One message, once, whatever the number of processes; above the progress bar where there is one."""
    if is_first():
        console.print(text, markup=False, highlight=False)


class Run:
    """The moving parts of a run, and the steps that move them."""

    def __init__(
        self, setup: Setup, directory: RunDirectory, stop: StopRequest, console: Console, reference: Reference
    ) -> None:
        config, task = setup.config, setup.task
        self.setup, self.directory, self.stop, self.reference = setup, directory, stop, reference
        self.console, self.say = console, partial(_say, console)
        optimizer = make_optimizer(config, setup.num_steps)
        shapes, shardings = abstract_params(setup.model), setup.shardings
        objective = task.objective(setup.model, setup.mesh, packing=config.packing)
        self.init_loss_state = objective.init_state
        self.sync = _sync_of(config)
        abstract = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=shapes,
            opt_state=jax.eval_shape(optimizer.init, shapes),
            rng=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(config.seed))),
            loss_state=jax.eval_shape(lambda: objective.init_state),
            reference_params=shapes if self.sync else None,
        )
        self.shardings: TrainState = state_shardings(abstract, shapes, shardings, setup.mesh)
        self.abstract_state: TrainState = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            self.shardings,
        )
        self.compiled = compile_step(
            objective=objective,
            optimizer=optimizer,
            schedule=learning_rate_schedule(config, setup.num_steps),
            mesh=setup.mesh,
            state_shardings=self.shardings,
            with_reference=reference.mode == "live",
            sync=self.sync,
        )
        self.init_opt_state = jax.jit(optimizer.init, out_shardings=self.shardings.opt_state)
        self.batch_sharding = micro_batch_sharding(setup.mesh)
        self.train_batches = self._batches(setup.train_data, map(self._plan, range(setup.num_steps)), reference.train)
        if setup.eval_data is not None:
            self.eval_batches = self._batches(setup.eval_data, self._eval_rows(), reference.eval)
            self.eval_totals = self._eval_totals(setup.eval_data)
        self.manager = CheckpointManager(
            directory.checkpoints,
            max_to_keep=config.save_total_limit,
            # Evaluation may change when a run goes on; values on other rows are no better or worse.
            metric_name=f"{config.metric_for_best_model} on {setup.eval_data.digest if setup.eval_data else 'nothing'}",
            greater_is_better=not config.metric_for_best_model.endswith("loss"),
        )
        self.window, self.num_tokens = Window(), 0
        self.last_saved: int | None = None
        self.writers: list[Writer] = []
        self.jsonl: JsonlWriter | None = None

    # --- start or resume

    def go(self, on_step: OnStep | None) -> RunResult:
        """Everything from the first array to the exported model."""
        state, reference, first = self._start()
        if self.stop.asked():
            return self._interrupted(first)
        if on_step is not None:
            on_step(first, state.params)
        if first < self.setup.num_steps:
            state, done = self._steps(state, reference, first, on_step)
            if self.stop.asked():
                return self._interrupted(done)
        del reference
        self.manager.wait()
        exported = self._step_to_export()
        if exported == self.setup.num_steps:
            return self._finish(state.params, exported)
        del state  # the best checkpoint needs its room
        best = self.manager.restore(exported, saved_parts(self.abstract_state)).state
        return self._finish(best["params"], exported)

    def _start(self) -> tuple[TrainState, Params, int]:
        setup, config = self.setup, self.setup.config
        newest = agree_on(self.manager.newest_whole_step() if is_first() else None)
        if newest is None:
            if self.directory.has_metrics():
                self.say(f"no whole checkpoint in {self.directory.checkpoints}: starting again from step 0")
            params = load_start(setup)
            frozen = self._load_reference(params)
            rng = jax.random.key_data(jax.random.key(config.seed))
            step, rng, loss_state = jax.device_put((jnp.int32(0), rng, self.init_loss_state), replicated(setup.mesh))
            state = TrainState(step, params, self.init_opt_state(params), rng, loss_state)
            if self.sync:
                state, frozen = state._replace(reference_params=frozen), None
        else:
            frozen = None if self.sync else self._load_reference(None)
            restored = self.manager.restore(newest, saved_parts(self.abstract_state))
            state, position = TrainState(**restored.state), restored.position
            self.window, self.num_tokens = Window(position["window"]), position["num_tokens"]
            self.last_saved = newest
            self.say(f"resuming from the checkpoint of step {newest}")
        if is_first():
            cut_metrics(self.directory.metrics, newest or 0)
            self.jsonl = JsonlWriter(self.directory.metrics)
            self.writers = [self.jsonl, *make_trackers(config.report_to, self.directory.path, to_dict(config))]
        return state, frozen, newest or 0

    def _load_reference(self, start: Params | None) -> Params | None:
        if self.reference.mode != "live":
            return None
        return load_reference(self.setup, start, moves=self.sync is not None)

    # --- the loop

    def _steps(
        self, state: TrainState, reference: Params, first: int, on_step: OnStep | None
    ) -> tuple[TrainState, int]:
        setup, config = self.setup, self.setup.config
        display = RunDisplay(
            first_step=first, num_steps=setup.num_steps, unit=setup.task.unit, console=self.console, shown=is_first()
        )
        done, throughput, resumed_at = first, Throughput(), time.perf_counter()
        with display:
            for indices, made in prefetch(self._train_batch, range(first, setup.num_steps)):
                state, on_device = self.compiled.train_step(state, reference, place(made.batch, self.batch_sharding))
                report: StepReport = fetch(on_device)
                seconds = time.perf_counter() - resumed_at
                done += 1
                rows = rows_at(report.rows, made.at)
                self._take(report, rows, done, indices, made.num_tokens)
                throughput.add(num_rows=len(indices), num_tokens=made.num_tokens, seconds=seconds)
                values = {**mean_over_rows(rows), "loss": float(report.loss)}
                display.step(done, values, len(indices) / seconds)
                if on_step is not None:
                    on_step(done, state.params)
                is_last = done == setup.num_steps
                if done % config.logging_steps == 0 or is_last:
                    self._log(done, report, throughput)
                    throughput = Throughput()
                metric = None
                if setup.eval_data is not None and (is_last or (config.eval_steps and done % config.eval_steps == 0)):
                    metric = self._evaluate(done, state, reference)[config.metric_for_best_model]
                stopping = self.stop.asked()
                if done % config.save_steps == 0 or is_last or stopping:
                    self._save(done, state, metric)
                self.manager.poll()
                if stopping:
                    break
                resumed_at = time.perf_counter()
        return state, done

    def _plan(self, step: int) -> np.ndarray:
        """The rows of a training step."""
        setup, config = self.setup, self.setup.config
        return plan(
            step,
            num_rows=len(setup.train_data),
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            shuffle=config.shuffle,
        )

    def _train_batch(self, step: int) -> tuple[np.ndarray, StepBatch]:
        indices = self._plan(step)
        return indices, self.train_batches.make(indices)

    def _eval_rows(self) -> list[np.ndarray]:
        """The evaluation rows, a batch at a time."""
        data, size = self.setup.eval_data, self.setup.config.global_batch_size
        assert data is not None
        return [np.arange(start, min(start + size, len(data))) for start in range(0, len(data), size)]

    def _eval_totals(self, data: PreparedData) -> Totals | None:
        """What losses read of all evaluation rows; supervised rows need nothing of each other."""
        if self.setup.task.loss is None:
            return None
        counts = np.float32(len(data)), np.float32(data.num_chosen_tokens())
        return place(Totals(*counts), replicated(self.setup.mesh))

    def _batches(self, data: PreparedData, steps: Iterable[np.ndarray], cache: ReferenceCache | None) -> Batches:
        setup, config = self.setup, self.setup.config
        if not config.packing:
            return PaddedBatches(
                setup.task,
                data,
                setup.layout,
                max_length=config.max_length,
                pad_token_id=setup.tokenizer.pad_token_id,
                cache=cache,
            )
        return PackedBatches(
            setup.task,
            data,
            steps,
            num_shards=num_batch_shards(setup.mesh),
            max_tokens_per_device=config.max_tokens_per_device or MAX_TOKENS_PER_DEVICE,
            micro_batch_size=config.micro_batch_size,
            cache=cache,
        )

    def _take(
        self, report: StepReport, rows: dict[str, np.ndarray], done: int, indices: np.ndarray, num_tokens: int
    ) -> None:
        """Checks a step's numbers and adds them to the window."""
        loss, grad_norm = float(report.loss), float(report.grad_norm)
        data = self.setup.train_data
        if not report.finite:
            origins = [data[int(index)].origin for index in indices]
            weights = bool(np.isfinite([loss, grad_norm]).all())  # then it is the update that went wrong
            check_finite(done, loss, grad_norm, rows["loss"], origins, self.last_saved, weights_finite=not weights)
        if done == 1:
            self._check_start(rows, indices)
        self.num_tokens += num_tokens
        self.window.add({**mean_over_rows(rows), "loss": loss, "grad_norm": grad_norm})

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

    def _log(self, done: int, report: StepReport, throughput: Throughput) -> None:
        self._write(
            {
                "step": done,
                "epoch": done / self.setup.steps_per_epoch,
                **self.window.averages(),
                # str gives the shortest decimal that is this float32: 0.001, not 0.0010000000474974513.
                "learning_rate": float(str(report.learning_rate)),
                "num_tokens": self.num_tokens,
                **throughput.rates(self.setup.task.unit),
            }
        )
        self.window = Window()

    def _write(self, line: Mapping[str, Any]) -> None:
        for writer in self.writers:
            writer.write(line)

    def _evaluate(self, done: int, state: TrainState, reference: Params) -> dict[str, float]:
        data = self.setup.eval_data
        assert data is not None
        reference = state.reference_params if self.sync else reference
        averages, started = RowAverages(), time.perf_counter()
        for indices in self._eval_rows():
            made = self.eval_batches.make(indices)
            placed = place(made.batch, self.batch_sharding)
            report = fetch(self.compiled.evaluate(state.params, reference, placed, state.loss_state, self.eval_totals))
            averages.add(rows_at(report.rows, made.at), float(report.normalizer))
        metrics = {f"eval_{name}": value for name, value in averages.averages().items()}
        check_evaluation(done, metrics)
        seconds = time.perf_counter() - started
        line = {"step": done, "epoch": done / self.setup.steps_per_epoch, **metrics}
        self._write({**line, f"eval_{self.setup.task.unit}_per_second": len(data) / seconds})
        self.say(f"held-out after step {done}: {figures_of(averages.averages())}")
        return metrics

    def _save(self, done: int, state: TrainState, metric: float | None) -> None:
        """Starts an asynchronous save; the lines of metrics.jsonl it vouches for go to the disk first."""
        if self.jsonl is not None:
            self.jsonl.sync()
        config = self.setup.config
        position = {
            "step": done,
            "epoch": done / self.setup.steps_per_epoch,
            "num_tokens": self.num_tokens,
            "window": self.window.to_json(),
            "config": to_dict(config),
            "jdpo": __version__,
        }
        self.manager.save(done, saved_parts(state), position, metric=metric)
        self.last_saved = done

    # --- the end

    def _interrupted(self, done: int) -> RunResult:
        self.manager.wait()
        saved = f"step {self.last_saved} is saved" if self.last_saved is not None else "nothing was trained yet"
        self.say(f"stopped by a signal; {saved}. Run the same command again to go on")
        return RunResult(done, True, self.stop.exit_code, self.directory)

    def _step_to_export(self) -> int:
        """The best step where the config asks for it and one was evaluated, else the last."""
        if not self.setup.config.load_best_model_at_end:
            return self.setup.num_steps
        best = agree_on(self.manager.best_step() if is_first() else None)
        return self.setup.num_steps if best is None else best

    def _finish(self, params: Params, exported: int) -> RunResult:
        setup, config = self.setup, self.setup.config
        lines = read_metrics(self.directory.metrics)
        results = _results(lines, exported)
        self.say(f"exporting the model of step {exported} to {self.directory.model}")
        export_model(
            params,
            setup.model.config,
            self.directory.model,
            source_folder=setup.model_folder,
            tokenizer=setup.tokenizer.hf,
            end_token_ids=setup.tokenizer.end_token_ids,
            export_dtype=config.export_dtype,
            max_shard_size=config.max_shard_size,
            model_card=model_card(
                command=setup.task.command,
                config=to_dict(config),
                results=results,
                rows=setup.train_data.summary(),
                version=__version__,
                config_yaml=to_yaml(config),
            ),
        )
        if is_first():
            write_plots(lines, self.directory.plots, title=f"jdpo {setup.task.command}: {config.model_name_or_path}")
        barrier("exported")
        self.directory.finish({**results, "step": setup.num_steps, "exported_step": exported})
        self.say(f"done: model in {self.directory.model}, metrics in {self.directory.metrics}")
        return RunResult(setup.num_steps, False, 0, self.directory)

    def close(self) -> None:
        """Lets go of files and threads; what was being saved is finished."""
        for writer in self.writers:
            writer.close()
        self.manager.close()


def _sync_of(config: TrainConfig) -> ReferenceSync | None:
    if not isinstance(config, DPOConfig) or not config.sync_ref_model:
        return None
    return ReferenceSync(config.ref_model_mixup_alpha, config.ref_model_sync_steps)


def _results(lines: list[dict[str, Any]], step: int) -> dict[str, Any]:
    """The values of the last training and evaluation lines up to a step."""
    results: dict[str, Any] = {}
    for line in lines:
        if line["step"] <= step:
            results.update(line)
    return results
