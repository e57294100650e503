"""Locks of components, for what two threads may not do to one at once."""

import os
import threading
import weakref

from torch import nn

# not attributes, which would be copied and pickled with it
_locks: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_locks.clear)  # a thread that is not there may have had one


def lock_of(component: nn.Module) -> "threading.RLock":
    """The lock of a component: to be held while it is not as other threads may find it."""
    return _locks.setdefault(component, threading.RLock())
