from __future__ import annotations

from jdpo.generation.schedule import Layout, Schedule


def test_rows_are_given_samples_then_prompts_then_samples_of_other_places() -> None:
    schedule = Schedule([7, 5, 6], range(3), Layout(places=2, rows=1))
    work = schedule.next_work()
    assert work.admitted == {0: 7, 1: 5}
    assert work.begun == {(0, 0): 0, (1, 0): 0}
    assert schedule.could_use_places()
    for sample in (1, 2):
        schedule.finish(1, 0)
        assert schedule.next_work() == ({}, {}, {(1, 0): sample})
    schedule.finish(1, 0)
    assert schedule.next_work() == ({1: 6}, {}, {(1, 0): 0})
    assert schedule.working() == {(0, 0): (7, 0), (1, 0): (6, 0)}
    for sample in (1, 2):
        schedule.finish(0, 0)
        assert schedule.next_work() == ({}, {}, {(0, 0): sample})
    # No prompt waits any more: the free place takes the later half of the samples of the other one.
    schedule.finish(0, 0)
    assert schedule.next_work() == ({}, {0: 1}, {(0, 0): 2})
    assert schedule.compact(1) is None
    schedule.finish(1, 0)
    assert schedule.next_work() == ({}, {}, {(1, 0): 1})
    assert not schedule.could_use_places()
    schedule.finish(0, 0)
    assert schedule.next_work() == ({}, {}, {})
    assert schedule.compact(1) == [1]
    assert schedule.working() == {(0, 0): (6, 1)}
    schedule.finish(0, 0)
    assert not schedule.working()


def test_every_sample_is_begun_once_whatever_the_layout() -> None:
    for places, rows in ((1, 1), (8, 1), (2, 3), (4, 4)):
        schedule, begun, step = Schedule(range(5), range(7), Layout(places, rows)), [], 0
        while True:
            schedule.next_work()
            working = schedule.working()
            if not working:
                break
            # Answers end after different numbers of steps.
            for number, (at, answer) in enumerate(working.items()):
                if (number + step) % 3 == 0:
                    begun.append(answer)
                    schedule.finish(*at)
            step += 1
        assert sorted(begun) == [(prompt, sample) for prompt in range(5) for sample in range(7)]
