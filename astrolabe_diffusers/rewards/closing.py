"""Objects that hold threads, processes or connections, which end with a `with`."""

from contextlib import AbstractContextManager


class Closing(AbstractContextManager):
    """A context manager that at its end, whatever happened inside, calls its `close`: that ends what the object has
    started, and does nothing when it is called again."""

    def __exit__(self, *exception):
        self.close()
