"""Objects that hold threads, processes or connections, which end with a `with`."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager


class Closing(AbstractContextManager, ABC):
    """A context manager that calls [`close`] at its end, whatever happened inside."""

    @abstractmethod
    def close(self):
        """Ends what this object has started. A second call does nothing."""

    def __exit__(self, *exception):
        self.close()
