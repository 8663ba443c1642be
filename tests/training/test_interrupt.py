"""A first signal asks the run to stop; a second one has its usual effect."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from jdpo.training.interrupt import StopRequest, silence_lost_output


@pytest.fixture
def terminal_hangs_up() -> Iterator[None]:
    """Restores SIGHUP as in a terminal, in case nohup runs the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal_hangs_up")
@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_first_signal_asks_and_hands_the_handlers_back(
    signum: signal.Signals, exit_code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.asked()
        os.kill(os.getpid(), signum)
        assert stop.asked()
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert stop.exit_code == exit_code
    assert "a second signal stops at once" in capfd.readouterr().err


@pytest.fixture
def python_handles_ctrl_c() -> Iterator[None]:
    """Restores Python's SIGINT handler, since background jobs of a shell ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handles_ctrl_c")
def test_a_second_ctrl_c_interrupts_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked()


def test_handlers_are_restored_without_a_signal() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_outside_the_main_thread_nothing_is_touched() -> None:
    found: list[bool] = []

    def enter() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with StopRequest() as stop:
            found.append(signal.getsignal(signal.SIGTERM) == before and not stop.asked())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [True]


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_to_a_closed_terminal_goes_nowhere() -> None:
    ours, theirs = os.openpty()
    saved = os.dup(2)
    try:
        os.dup2(theirs, 2)
        silence_lost_output()
        assert os.isatty(2), "a terminal that is there is kept"
        os.close(ours)
        silence_lost_output()
        os.write(2, b"nobody reads this")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(theirs)


def test_code_may_ask_from_any_thread_and_its_first_reason_counts() -> None:
    stop = StopRequest()
    for reason in ("first", "second"):
        thread = threading.Thread(target=stop.ask, args=(reason,))
        thread.start()
        thread.join()
    assert (stop.asked(), stop.poll().stop, stop.noticed(), stop.signalled()) == (True, True, True, False)
    assert stop.reason == "first"


def test_a_signal_breaks_off_an_evaluation_and_a_callback_does_not() -> None:
    stop = StopRequest()
    assert not stop.breaks_off()
    stop.ask("loss is low enough")
    assert (stop.poll().stop, stop.breaks_off()) == (True, False)
    stop.interrupt()
    assert stop.breaks_off()
    assert stop.poll(save=True) == (True, True, True)
