"""`jdpo sft` and `jdpo dpo`: a training run, from its config to the exported model, read from top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

from rich.console import Console

from jdpo.checkpoint.manager import CheckpointManager
from jdpo.config import ReferenceSettings, TrainConfig
from jdpo.data.batching.loader import prefetch
from jdpo.data.sources.given_rows import Rows
from jdpo.devices import leave_out_missing_tpus
from jdpo.processes import is_first
from jdpo.reports.metrics_file import cut_metrics
from jdpo.reports.progress import RunDisplay, make_console, print_lines
from jdpo.safe_text import terminal
from jdpo.sharding.placement import micro_batch_sharding, place
from jdpo.training.answer_samples import AnswerSamples
from jdpo.training.continuing import (
    check_inputs,
    find_newest,
    is_unevaluated,
    open_checkpoints,
    position_after,
    restore_state,
    start_state,
)
from jdpo.training.evaluation import Evaluation
from jdpo.training.finish import finish_run, log_findings, step_to_export
from jdpo.training.fit.assembly import assemble
from jdpo.training.fit.compilation import compiler_threads
from jdpo.training.fit.memory_fit import exhaustion_explained, memory_limit
from jdpo.training.fit.preparation import fit_conditions, fit_record, prepare_steps, recalled_fit, remat_policies
from jdpo.training.interface.callbacks import Callback, Callbacks
from jdpo.training.interface.run_result import RunResult, result_of
from jdpo.training.interface.run_rows import check_config, rows_of_run
from jdpo.training.interrupt import StopRequest, silence_lost_output
from jdpo.training.logs.phases import PhaseClock, TimingRecord
from jdpo.training.logs.recording import Record
from jdpo.training.logs.tracking import open_trackers
from jdpo.training.mirroring import open_mirror
from jdpo.training.pages.live_report import LiveReport, renew_last_page
from jdpo.training.profile import Profiler
from jdpo.training.reference.reference_source import Reference, settle_reference
from jdpo.training.run_dir import RunDirectory
from jdpo.training.save_timer import SaveTimer
from jdpo.training.setup.batches import StepBatch, shapes_in_order
from jdpo.training.setup.numerics import jax_settings, resolve_dtype
from jdpo.training.setup.row_order import BuildStopped
from jdpo.training.setup.run_setup import Log, Setup, build
from jdpo.training.setup.tasks import task_for
from jdpo.training.setup.validation import profiled_steps
from jdpo.training.setup.weight_placement import whole_weights
from jdpo.training.step.train_step import saved_parts
from jdpo.training.step_reports import StepReports
from jdpo.words import figure


def train(
    config: TrainConfig,
    *,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Runs `jdpo sft` or `jdpo dpo`: starts, resumes, or finds the run finished. Ctrl-C saves, and returns.

    Rows are a `datasets.Dataset`, a list of dicts, or the path of a file or folder, in any format of docs/data.md. They
    are kept in the run's folder, so that `jdpo dpo resolved_config.yaml` repeats the run.

    Args:
      config: an SFTConfig or a DPOConfig.
      train_dataset: rows to train on, in place of the config's `datasets`, which is then left out.
      eval_dataset: rows to evaluate on, in place of the config's `eval_datasets`.
      callbacks: objects that the run calls as it trains.

    Returns:
      how it ended.

    Raises:
      ValueError: bad input, before anything is trained.
      FloatingPointError: loss or gradients are not finite; step and rows are named.
      OSError: the mirror cannot be reached at the start, or the run is finished and the mirror lacks some of it.
      Exception: the error of a callback, after a checkpoint was saved.
    """
    check_config(config)
    clock, calls = PhaseClock(), Callbacks(callbacks)
    with ExitStack() as resources:
        # ------------------------------------------------------------------------------------------ folder and settings
        leave_out_missing_tpus()
        given = rows_of_run(config, config.output_dir, train_dataset=train_dataset, eval_dataset=eval_dataset)
        config = dataclasses.replace(config, datasets=given.datasets, eval_datasets=given.eval_datasets)
        config = resolve_dtype(config)
        console = make_console()
        log = partial(log_on, console)
        stop = resources.enter_context(StopRequest())
        # Entered first, so that all work and all loading happens in the dtype and precision of the run.
        resources.enter_context(jax_settings(config, config.cache_dir))
        calls.check_alike()
        directory = resources.enter_context(RunDirectory(config, task_for(config).command))
        given.write(directory, log)
        mirror = resources.enter_context(open_mirror(config, directory, stop, log))
        # A second start of a finished run, such as a requeued job, trains and compiles nothing.
        if directory.finished:
            step = directory.record.results["step"]
            log(f"the run in {directory.path} is finished (step {step}): {directory.outcome}")
            renew_last_page(directory, log)
            return result_of(directory, step)
        timing = TimingRecord(clock, directory, resources)

        # ------------------------------------------------------------------------------------------------------- inputs
        # Model config, tokenizer, mesh and rows; no weights yet.
        clock.enter("data")
        newest: int | None = None  # the checkpoint that this start continues from
        try:
            setup = build(config, log, stopped=stop.noticed)
            # Before any weight is loaded: other rows or another model would be another run.
            check_inputs(setup, directory)
            newest = find_newest(setup, directory, mirror)
            trackers = resources.enter_context(open_trackers(setup, directory, newest, log))
            # Left before the trackers are, which keep its last page.
            resources.enter_context(LiveReport(setup, directory, timing, log))

            # ------------------------------------------------------------------------------------------------ reference
            clock.enter("reference")
            reference = reference_of(setup, directory, stop, log)
            if stop.asked():  # before anything is compiled
                raise BuildStopped
        except BuildStopped:
            log("stopped by a signal before the first step; what was computed is kept. Run the same command again")
            return result_of(directory, newest or 0, stop)

        # ----------------------------------------------------------------------------------------------- mesh and model
        clock.enter("compile")
        # The jitted step and evaluation. Nothing is traced before the batches are planned, on whose shapes it depends.
        first, num_steps = newest or 0, setup.num_steps
        # A signal broke off the evaluation after the last step of the earlier start.
        unevaluated = is_unevaluated(setup, directory, newest)
        # False for a run that was killed between its last step and its export.
        trains = first < num_steps or unevaluated
        assembly = assemble(setup, reference=reference.mode, remat=remat_policies(setup)[0])
        base_identity = setup.base_identity()  # now, as the folder may change or go while the run trains
        manager = open_checkpoints(setup, directory, newest, mirror)
        resources.callback(manager.close)

        # ------------------------------------------------------------------------------------------------------- memory
        # How much a device computes at once, and what the backward pass recomputes: the fastest policy that fits.
        # Programs compile in the background while weights are loaded.
        evaluation: Evaluation | None = None
        if trains:
            assemblies = {remat: assembly.with_remat(remat) for remat in remat_policies(setup)}
            limit, conditions = memory_limit(), fit_conditions(assembly, reference.mode)
            recalled = recalled_fit(directory.record.fit, conditions, limit)
            pool = resources.enter_context(compiler_threads())
            fit, assembly, batches, programs = prepare_steps(
                setup, assemblies, reference.train, pool, log, limit=limit, recalled=recalled
            )
            clock.watch(programs)
            # Kept, so that a resumed run has the same batches and is bitwise the uninterrupted one.
            directory.update(fit=fit_record(fit, conditions, limit), **setup.sizes)
            # The programs of the first steps come first, so that training starts while later ones compile.
            programs.prepare(shapes_in_order(batches, map(setup.row_plan.step, range(first, num_steps))))
            if setup.eval_data is not None:
                tokens = fit.max_tokens_per_device
                evaluation = Evaluation(setup, assembly, reference.eval, pool, clock, max_tokens_per_device=tokens)
                evaluation.prepare()

        # -------------------------------------------------------------------------------------------------------- state
        clock.enter("load")
        live = reference.mode == "live" and trains
        if newest is None:
            if directory.has_metrics():
                log(f"no whole checkpoint in {directory.checkpoints}: starting again from step 0")
            state, frozen, position = start_state(setup, assembly, live=live)
        else:
            # A finished run whose adapters are exported alone needs no model under them.
            with_base = trains or bool(calls) or setup.exports_merged
            state, frozen, position = restore_state(setup, assembly, manager, newest, live=live, with_base=with_base)
            log(f"resuming from the checkpoint of step {newest}")
        if is_first() and (note := cut_metrics(directory.metrics, newest)) is not None:
            log(f"warning: {note}")
        # Loading weights takes minutes, in which a signal may have come.
        if stop.asked():
            return stopped(first, newest, manager, stop, calls, directory, log)
        clock.enter("other")
        weights = partial(whole_weights, setup)  # as the model runs on them
        if calls:
            calls.begin(setup, stop, first, weights(state.params, frozen.base))
            if stop.asked():
                return stopped(first, newest, manager, stop, calls, directory, log)

        # --------------------------------------------------------------------------------------------------------- loop
        if trains:
            last_saved, save_timer = newest, SaveTimer(config.save_minutes)
            metrics: Mapping[str, float] = {}
            record = Record(setup, directory, resources, trackers, position)
            samples = AnswerSamples(setup, directory.samples, record, log, continued_from=newest)
            if newest is None and samples.is_due(0):
                with clock.within("sampling"):
                    samples.take(0, weights(state.params, frozen.base))
            display = RunDisplay(
                first_step=first, num_steps=num_steps, unit=setup.task.unit, console=console, shown=is_first()
            )
            # A function, since a checkpoint may be saved before the report of an earlier step is read.
            reports = StepReports(setup, record, display, lambda: last_saved, log)
            profiler = Profiler(profiled_steps(config.profile_steps), directory.path / "profile")
            if profiler.is_over(first):
                log(f"profile_steps {config.profile_steps}: these steps were made before; nothing is traced")
            batch_sharding = micro_batch_sharding(setup.mesh)

            def make_batch(step: int) -> tuple[StepBatch, Any]:
                """The batch of a step on the devices, and its FLOPs; made on a thread while earlier steps run."""
                batch, rows = batches.make(setup.row_plan.step(step))
                return StepBatch(place(batch, batch_sharding), rows), assembly.flops(batch)

            # Packing and transfers happen on a thread, so that they take no time of the devices.
            # Where the devices are faster, they end their step first: what is then waited for is the batch alone.
            ahead = prefetch(make_batch, range(first, num_steps), before_waiting=clock.within("step")(reports.read))
            clock.enter("step")
            step = first
            # Left in reverse order: the thread that makes batches ends first.
            with exhaustion_explained(fit), display, closing(profiler), closing(ahead):
                if evaluation is not None and (unevaluated or (newest is None and config.eval_on_start)):
                    with reports.untimed(), clock.within("other"):
                        metrics = evaluation.log(first, state, frozen, record, display, log, stop.breaks_off)
                        calls.after_evaluation(first, metrics, weights(state.params, frozen.base))
                    if stop.asked():
                        return stopped(first, newest, manager, stop, calls, directory, log)
                    if unevaluated:
                        manager.rate(first, metrics.get(config.metric_for_best_model))
                for step, ((batch, rows), flops) in enumerate(clock.waiting(ahead), start=first + 1):
                    # Work that does not count as a step's time must not happen while one runs.
                    if step == 2 or not programs.ready(batch) or profiler.is_due(step):
                        reports.read()
                    with reports.untimed():
                        with display.compiling(), clock.within("compile"):
                            program = programs.of(batch)
                        profiler.begin(step)
                    with profiler.around(step):
                        state, report = program(state, frozen, batch)
                    # The devices compute this step while the host reads the report of the one before.
                    reports.read()
                    reports.launched(step, rows, flops, report)
                    if calls.due(step) or profiler.is_last(step):
                        logged = reports.read()
                        with reports.untimed(), clock.within("other"):
                            profiler.end(step)
                            calls.after_step(step, logged, weights(state.params, frozen.base))
                    is_last = step == num_steps
                    evaluating = evaluation is not None and (is_last or _is_due(step, config.eval_steps))
                    if evaluating or samples.is_due(step):
                        reports.read()
                    metrics = {}
                    with reports.untimed(), clock.within("other"):
                        # Before the checkpoint, from which a resumed run would not sample this step again.
                        if samples.is_due(step):
                            with clock.within("sampling"):
                                samples.take(step, weights(state.params, frozen.base))
                        if evaluation is not None and evaluating:
                            metrics = evaluation.log(step, state, frozen, record, display, log, stop.breaks_off)
                            calls.after_evaluation(step, metrics, weights(state.params, frozen.base))
                    # Polled in every step, as all processes must take part in the answer.
                    asked = stop.poll(save=save_timer.is_due())
                    if is_last or asked.stop or asked.save or _is_due(step, config.save_steps):
                        reports.read()
                        with reports.untimed():
                            metric = metrics.get(config.metric_for_best_model)
                            unevaluated = evaluating and not metrics  # as a signal broke it off
                            saved = position_after(step, setup, record, base_identity, unevaluated=unevaluated)
                            with clock.within("save"):
                                manager.save(step, saved_parts(state), saved, metric=metric)
                            last_saved = step
                            save_timer.restart()
                            timing.save()
                    # A failed save or compilation is raised now, and not after hours of training.
                    manager.poll()
                    programs.check()
                    if asked.stop:
                        break
            clock.enter("save")
            if late := clock.num_late:  # planning knows all shapes: this is a fault of jdpo, and costs the user time
                log(f"note: programs for {figure(late, 'shape')} of batches were not compiled ahead of their step")
            if stop.asked():
                return stopped(step, last_saved, manager, stop, calls, directory, log)

        calls.end()

        # ------------------------------------------------------------------------------------------------------- export
        # Only a merge still reads the frozen weights.
        base = frozen.base if setup.exports_merged else None
        del frozen  # the reference is no longer needed
        manager.wait()
        clock.enter("export")
        exported = step_to_export(setup, manager)
        params = state.params
        del state  # the best checkpoint needs its memory
        if exported != num_steps:
            del params
            params = manager.restore(exported, saved_parts(assembly.state)).state["params"]
        finish_run(setup, directory, params, base, exported, log)
        if (note := setup.train_data.drop_note) is not None:
            log(f"note: {note}")
        log_findings(directory, "finished", num_steps, log)
        log(f"done: {directory.outcome}, metrics in {directory.metrics}, report in {directory.report}")
        return result_of(directory, num_steps)


# --- parts of a run, in the order in which they come


def log_on(console: Console, text: str) -> None:
    """Prints a message, once whatever the number of processes, above the progress bar where there is one."""
    if is_first():
        try:
            print_lines(console, text)
        except OSError:  # the terminal, or the reader of the output, is gone: no reason to end a run
            silence_lost_output()


def reference_of(setup: Setup, directory: RunDirectory, stop: StopRequest, log: Log) -> Reference:
    """Returns where the reference's log-probs come from; computes those that are to be cached.

    Raises:
      BuildStopped: a signal ended the computation.
    """
    config = setup.config
    if not isinstance(config, ReferenceSettings):
        return Reference(mode="none")
    began_as = directory.record.reference
    reference = settle_reference(
        setup,
        asked=config.reference,
        needs_reference=setup.task.uses_reference,
        sync_ref_model=config.sync_ref_model,
        began_as=began_as,
        stopped=stop.asked,
        log=log,
    )
    if began_as is None:
        directory.update(reference=reference.mode)
    return reference


def stopped(
    step: int,
    last_saved: int | None,
    manager: CheckpointManager,
    stop: StopRequest,
    calls: Callbacks,
    directory: RunDirectory,
    log: Log,
) -> RunResult:
    """Ends a run that a signal or a callback stopped: waits for its checkpoint, and says how to continue.

    Raises:
      Exception: the error of a callback, if it is what stopped the run.
    """
    manager.wait()
    log_findings(directory, "stopped", step, log)
    saved = f"step {last_saved} is saved" if last_saved is not None else "nothing was trained yet"
    result = result_of(directory, step, stop)
    why = "a signal" if result.stopped is None else f"a callback: {terminal(result.stopped)}"
    log(f"stopped by {why}; {saved}. Run the same command again, or make the same call, to continue")
    calls.end()
    return result


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
