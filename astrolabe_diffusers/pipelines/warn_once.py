"""Warnings about what a user gave, which is often given many times."""

import logging
from functools import lru_cache


logger = logging.getLogger(__name__)


@lru_cache(maxsize=1024)
def warn_once(message: str):
    logger.warning(message)
