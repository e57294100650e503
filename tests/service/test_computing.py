"""Which threads compute, and what becomes of torch's helpers."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from gradbank_server.threads import Computing

LET_GO = """
import os, threading, time
from gradbank_server.threads import let_helpers_go, sleep_between_steps
sleep_between_steps()
import torch
torch.set_num_threads(3)
counts = []
def compute():
    count = lambda: len(os.listdir("/proc/self/task"))
    counts.append(count())
    torch.ones(10**6).add_(1)
    counts.append(count())
    let_helpers_go()
    counts.append(count())
    torch.ones(10**6).add_(1)
    counts.append(count())
thread = threading.Thread(target=compute)
thread.start()
thread.join()
print(*(count - counts[0] for count in counts), os.environ["GOMP_SPINCOUNT"])
"""


def let_go(**environment: str | None) -> list[str]:
    """What the program prints, in an environment with these variables, or without those that are None."""
    known = {**os.environ, **environment}
    env = {name: value for name, value in known.items() if value is not None and name != "OMP_WAIT_POLICY"}
    run = subprocess.run(
        [sys.executable, "-c", LET_GO], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    return run.stdout.split()


@pytest.fixture
def computing() -> Computing:
    return Computing(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_helpers_that_are_let_go_end_and_others_start_when_they_are_needed() -> None:
    assert let_go(GOMP_SPINCOUNT=None) == ["0", "2", "0", "2", "10000"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_how_helpers_wait_is_left_to_the_environment_where_it_says() -> None:
    assert let_go(GOMP_SPINCOUNT="77")[-1] == "77"


def test_steps_of_all_threads_are_computed_by_one(computing: Computing) -> None:
    computed_by: list[int] = []
    for _ in range(3):
        taker = threading.Thread(target=lambda: computed_by.append(computing.run(threading.get_ident)))
        taker.start()
        taker.join(10)
    assert len(set(computed_by)) == 1
    assert threading.get_ident() not in computed_by
    computing.close()


def test_a_step_does_not_wait_for_that_of_another(computing: Computing) -> None:
    begun, over = threading.Event(), threading.Event()

    def long() -> bool:
        begun.set()
        return over.wait(20)

    ended: list[bool] = []
    other = threading.Thread(target=lambda: ended.append(computing.run(long)))
    other.start()
    assert begun.wait(10)
    assert computing.run(threading.get_ident) == threading.get_ident()  # by the thread that has it
    over.set()
    other.join(10)
    assert ended == [True]
    computing.close()


def test_on_a_gpu_nothing_is_handed_over() -> None:
    assert Computing(torch.device("cuda")).run(threading.get_ident) == threading.get_ident()


def test_what_a_step_raises_is_raised_and_the_thread_goes_on(computing: Computing) -> None:
    def fails() -> None:
        raise MemoryError("as it may be")

    for _ in range(2):
        with pytest.raises(MemoryError, match="as it may be"):
            computing.run(fails)
    assert computing.run(lambda: 1) == 1
    computing.close()
