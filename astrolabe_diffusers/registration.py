"""Classes that diffusers is to find by the names in a folder."""

import diffusers


def register_with_diffusers(cls: type):
    """Makes a class an attribute of diffusers, among which it looks for what model_index.json and config.json name.

    Raises:
        ImportError: there is a class of another module by that name.
    """
    existing = getattr(diffusers, cls.__name__, cls)
    if existing.__module__ != cls.__module__:
        raise ImportError(
            f"{cls.__name__} is {existing.__module__}'s name already, which {cls.__module__} cannot have."
        )
    setattr(diffusers, cls.__name__, cls)
