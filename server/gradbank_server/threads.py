"""Which threads compute, and how torch's helpers wait for them.

torch computes on a CPU with OpenMP: a thread that computes has helpers, of its own, which wait for its next operation.
See docs/decisions/0013.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # what sets its environment must come before it
    import torch

T = TypeVar("T")

_SPINS = "10000"  # about half a millisecond: longer than from one operation of a step to the next
_SOFTLY = 1  # omp_pause_soft: what a thread knows stays as it is


def sleep_between_steps() -> None:
    """Has helpers sleep once a step is over, unless the environment says how they are to wait.

    By default they look for more for many milliseconds, on the processor that a trainer on the same machine wants: its
    step then waits until the system takes the processor away from them. To be called before torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def let_helpers_go() -> None:
    """Ends the helpers of the calling thread, if it has any; its next large operation starts others.

    Those of a thread that idles count all the same, and once there are more than processors, everybody's sleep after
    every operation. Without effect where torch computes with another library.
    """
    _pause()(_SOFTLY)


@cache
def _pause() -> Callable[[int], object]:
    """`omp_pause_resource_all` of the library that torch computes with."""
    import torch

    try:
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return lambda _: None


class Computing:
    """Sees to it that there are no more helpers than processors, if that can be.

    Steps are handed to one thread, whose helpers stay; while that computes one, another session's is computed by the
    thread that has it, which then lets its helpers go: no step waits for that of another session.

    Args:
        device: where losses are computed. On a GPU there is little for helpers to do, and nothing is handed over.
    """

    def __init__(self, device: "torch.device") -> None:
        self._thread, self._free = ThreadPoolExecutor(1, thread_name_prefix="gradbank-compute"), threading.Lock()
        self._hands_over = device.type == "cpu"
        self._under_way, self._counting = 0, threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a step is under way."""
        return self._under_way > 0

    def run(self, step: Callable[[], T]) -> T:
        """What `step` gives."""
        with self._counting:
            self._under_way += 1
        try:
            return self._ran(step)
        except Exception:
            raise
        except BaseException as error:  # of a component: nobody's thread is to end by it, without an answer
            raise RuntimeError(f"{type(error).__name__} was raised as a step was computed") from error
        finally:
            with self._counting:
                self._under_way -= 1

    def _ran(self, step: Callable[[], T]) -> T:
        if not self._hands_over or not self._free.acquire(blocking=False):
            try:
                return step()
            finally:
                let_helpers_go()
        try:
            return self._thread.submit(step).result()
        finally:
            self._free.release()

    def close(self) -> None:
        """Ends the thread, once its step is over."""
        self._thread.shutdown(wait=False)
