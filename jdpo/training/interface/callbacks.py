"""Callbacks: objects of Python code that a run calls as it trains, and the view of the run that they get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jdpo.generation.loaded_model import LoadedModel
from jdpo.generation.values import Answer
from jdpo.models.transformer import Params, Weights
from jdpo.processes import any_process, differing, run_jointly
from jdpo.safe_text import terminal
from jdpo.training.answer_samples import memory_explained
from jdpo.training.interrupt import StopRequest
from jdpo.training.setup.run_setup import Setup
from jdpo.types import Message

Prompts = list[str] | list[list[Message]]


class RunView:
    """A run, as a callback sees it.

    Attributes:
      step: number of updates made.
      num_steps: number of updates of the whole run.
      config: the settings of the run, as they were given to `jdpo.train`, with its rows.
      output_dir: the run's folder.
      params: the current weights on the mesh, valid during the call only, as the next update reuses their memory.
      model: the current weights with their tokenizer, for `logps` and `next_tokens`; valid during the call only.
    """

    step: int
    num_steps: int
    config: Any
    output_dir: Path

    def __init__(self, setup: Setup, stop: StopRequest, step: int) -> None:
        self.step = step
        self.num_steps = setup.num_steps
        self.config = setup.config
        self.output_dir = Path(setup.config.output_dir)
        self._setup, self._stop = setup, stop
        self._weights: Params | Weights | None = None

    def __repr__(self) -> str:
        return f"<RunView: step {self.step} of {self.num_steps} in {self.output_dir}>"

    @property
    def params(self) -> Params | Weights:
        if self._weights is None:
            raise ValueError(
                "the weights of a run are at hand while it calls on_start, on_step, on_log or on_evaluate, and not "
                "afterwards; copy what is needed later with jax.device_get, or open the run with jdpo.load"
            )
        return self._weights

    @property
    def model(self) -> LoadedModel:
        setup = self._setup
        return LoadedModel(
            model=setup.model,
            params=self.params,
            tokenizer=setup.tokenizer,
            mesh=setup.mesh,
            name=f"{self.output_dir} (step {self.step})",
            digest="",  # which would cost reading all weights
            end_token_ids=setup.tokenizer.end_token_ids,
        )

    def stop(self, reason: str = "") -> None:
        """Ends the run after the current step, with a checkpoint of it saved; a later call of `jdpo.train` resumes.

        May be called from any thread and at any time. With several processes the run ends one step later, and it is
        enough that one process asks. After the last step it has no effect.

        Args:
          reason: for the log and for `RunResult.stopped`.
        """
        # After the last step there is nothing left to stop, and the run exports its model.
        if self.step < self.num_steps:
            self._stop.ask(str(reason) or "no reason given")

    def sample(
        self,
        prompts: Prompts,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """Draws answers with the current weights; training is not changed.

        With several processes every process must call this with the same prompts, and each gets all answers.

        Args:
          prompts: texts, or lists of messages.
          n: number of answers to each prompt.
          temperature, top_p, top_k, max_new_tokens, seed: see `LoadedModel.generate`.

        Returns:
          For each prompt, its n answers.

        Raises:
          ValueError: a value is out of range, a prompt is too long, or a device has too little memory to answer.
        """
        # `generate` takes one prompt, too, and then returns its answers alone.
        if isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts):
            raise ValueError("prompts: expected a list of prompts, found one; write run.sample([prompt])")
        with memory_explained("run.sample"):
            return self.model.generate(
                prompts,
                n=n,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                max_new_tokens=max_new_tokens,
                seed=seed,
            )


class Callback:
    """The base class of callbacks of a run. Every method does nothing; override those that are needed.

    They are called in the thread of the run, between two steps, and on every process if there are several. They change
    neither the rows nor the numbers of training. If one raises, the run saves a checkpoint and ends with that error; a
    KeyboardInterrupt has the effect of Ctrl-C: the run saves, and `jdpo.train` returns an interrupted result.
    """

    def on_start(self, run: RunView) -> None:
        """Called before the first update of this process: at step 0, or at the step that a run resumes from."""

    def on_step(self, run: RunView) -> None:
        """Called after each update. The next one begins only when it returns, so it should be quick."""

    def on_log(self, run: RunView, metrics: Mapping[str, float]) -> None:
        """Called every `logging_steps`, with the values of the line in metrics.jsonl."""

    def on_evaluate(self, run: RunView, metrics: Mapping[str, float]) -> None:
        """Called after each evaluation, also that before the first step, with its metrics, {"eval_<name>": value}."""

    def on_end(self, run: RunView) -> None:
        """Called when the last step is made, or the run is stopped and saved; without weights, before the export."""


METHODS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def _is_class_of_callbacks(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Callback)


class Callbacks:
    """The callbacks of a run, called in their order."""

    def __init__(self, given: Sequence[Callback]) -> None:
        """
        Raises:
          ValueError: one of them is not a callback, or has a method on_... that a run does not call.
        """
        if isinstance(given, Callback):
            raise ValueError("callbacks: expected a list of callbacks, found one; write callbacks=[...]")
        for index, callback in enumerate(given):
            if not isinstance(callback, Callback):
                called = f"; write {callback.__name__}()" if _is_class_of_callbacks(callback) else ""
                raise ValueError(
                    f"callbacks[{index}]: expected an object of a class that extends jdpo.Callback, found "
                    f"{terminal(callback)}{called}"
                )
            # Otherwise a method with a name that other trainers have would be there and never be called.
            for name in dir(callback):
                if name.startswith("on_") and not hasattr(Callback, name):
                    raise ValueError(f"callbacks[{index}]: jdpo calls no method {name}; it calls {', '.join(METHODS)}")
        self._all = tuple(given)
        self._view: RunView | None = None
        self._error: Exception | None = None
        self._is_over = False

    def __len__(self) -> int:
        return len(self._all)

    def check_alike(self) -> None:
        """Refuses callbacks that differ between processes, which would wait for each other. Every process calls this.

        Raises:
          ValueError: naming those of this process.
        """
        names = ", ".join(type(callback).__qualname__ for callback in self._all)
        if differing({"callbacks": names}):
            raise ValueError(
                f"the processes of this run have different callbacks (here: {names or 'none'}); give every process the "
                "same, and let a callback do nothing where jax.process_index() is not 0"
            )

    def begin(self, setup: Setup, stop: StopRequest, step: int, weights: Params | Weights) -> None:
        """Calls `on_start`.

        Args:
          stop: takes the wish of a callback to end the run, and ends it if a callback raises.
          step: updates made by earlier starts of the run.
          weights: the whole weights, as the model runs on them.
        """
        self._setup, self._stop = setup, stop
        self._view = RunView(setup, stop, step)
        self._call("on_start", step, weights)

    def due(self, step: int) -> bool:
        """Returns True if a callback is to be called after this update, which must then be complete."""
        return self._override("on_step") or (self._override("on_log") and self._setup.logs_after(step))

    def after_step(self, step: int, logged: Mapping[str, float] | None, weights: Params | Weights) -> None:
        """Calls `on_log`, where a line was logged, and `on_step`."""
        if logged is not None:
            self._call("on_log", step, weights, logged)
        self._call("on_step", step, weights)

    def after_evaluation(self, step: int, metrics: Mapping[str, float], weights: Params | Weights) -> None:
        """Calls `on_evaluate`, unless a signal broke off the evaluation, which then has no metrics."""
        if metrics:
            self._call("on_evaluate", step, weights, metrics)

    def end(self) -> None:
        """Calls `on_end`, unless a callback has raised; every process must call this.

        Raises:
          Exception: the error of a callback, on every process.
        """
        if self._view is not None:
            self._call("on_end", self._view.step, None)
        run_jointly(self._raise_error)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _override(self, name: str) -> bool:
        return any(getattr(type(callback), name) is not getattr(Callback, name) for callback in self._all)

    def _call(self, name: str, step: int, weights: Params | Weights | None, *arguments: Any) -> None:
        view = self._view
        if view is None or self._is_over:
            return
        view.step, view._weights = step, weights
        for callback in self._all if self._override(name) else ():
            try:
                getattr(callback, name)(view, *arguments)
            except KeyboardInterrupt:
                # After a first signal this is the second one, which ends the run at once. Without one, the callback has
                # raised it itself: the run's handler does not.
                if self._stop.signum is not None:
                    raise
                self._stop.interrupt()
            except Exception as error:
                # Raised when the run has saved what it has learnt so far.
                self._error = error
                self._stop.ask(f"it raised {type(error).__name__}")
            # Agreed on now: a process whose callback samples next would wait forever for one that has failed.
            self._is_over = any_process(self._error is not None)
            if self._is_over:
                break
        view._weights = None
