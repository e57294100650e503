"""What must outlive a session's memory, behind one small interface.

`MemoryStorage` keeps it as long as the process lives. A storage that keeps it longer has the same methods,
each of which returns only once what it was given is safe.
"""

from gradbank_server.storage.memory import MemoryStorage
from gradbank_server.storage.records import ProducerRecord, Storage

__all__ = ["MemoryStorage", "ProducerRecord", "Storage"]
