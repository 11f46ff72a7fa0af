"""Noise levels of a block's denoising steps, as users give them."""

from collections.abc import Iterable


def check_sigmas(sigmas: Iterable[float], name: str = "sigmas") -> list[float]:
    """The noise levels, before the scheduler's shift, as a list: numbers that fall, from at most 1, all noise, to at
    least 0, none; else a `ValueError` that calls them `name`."""
    try:
        levels = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a list of numbers, as [1.0, 0.75, 0.5, 0.25], not {sigmas!r}.") from None
    # Written so that NaN does not pass.
    falling = all(high > low for high, low in zip(levels, levels[1:]))
    if not (levels and falling and 0 < levels[0] <= 1 and levels[-1] >= 0):
        hint = "; if these are timesteps, divide them by 1000" if max(levels, default=0) > 1 else ""
        raise ValueError(
            f"`{name}` must fall from at most 1 to at least 0, as [1.0, 0.75, 0.5, 0.25] do, not {levels}{hint}."
        )
    return levels
