r"""Scenes in a prompt: `"a cat sleeps [8s] | it wakes up [5s flush] | it eats [5s#] | a dog"`.

A scene is a text and, in brackets at its end, how long it lasts in seconds and one of `TRANSITIONS`, how the video
goes on from there; `#` is short for `cut`. `\|`, `\[`, `\]` and `\\` stand for the characters themselves.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral


# How a video goes on with another prompt, in the order of how much it forgets ([`CausalWanStream.set_prompt`]).
TRANSITIONS = ("roll", "recache", "flush", "rope_cut", "cut")
# 14 blocks of 3 latent frames at 16 frames a second.
DEFAULT_SECONDS = 10.5
# A day; what has no end is a stream with `num_frames=math.inf`.
MAX_SECONDS = 86400
# 512 tokens are about 2500; a text may have many scenes. What is far beyond is a file passed for a prompt.
MAX_CHARACTERS = 100_000
# What UMT5 and the Wan models were trained with. Longer ones are made by nobody, and the padding costs memory.
MAX_SEQUENCE_LENGTH = 512

_TEXT = re.compile(r"(?:\\[\\|\[\]]|[^|\[])*")
_ENDING = re.compile(
    rf"\[\s*(?:(\d+(?:\.\d*)?|\.\d+)\s*s)?\s*(#|\b(?:{'|'.join(TRANSITIONS)})\b)?\s*\]\s*(?=\||$)"
)


@dataclass(frozen=True)
class Scene:
    """`seconds` is `None` where the prompt does not say; `transition` is how the video comes to this scene."""

    text: str
    seconds: float | None = None
    transition: str = "roll"


def check_text(text: str):
    """Raises a `ValueError` if a prompt is no text, or longer than `MAX_CHARACTERS`."""
    if not isinstance(text, str):
        raise ValueError(f"a prompt has to be a `str`, and {text!r} is no text.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a prompt of {len(text)} characters: at most {MAX_CHARACTERS}; is it a file's content?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prompt, character {error.start + 1}: half of a surrogate pair, which is no character; were its bytes in "
            "UTF-8?"
        ) from None


def check_transition(transition: str, possible: Sequence[str]):
    """Raises a `ValueError` if it is none of `possible`, which a pipeline has in `transitions`."""
    if transition not in possible:
        needs = ""
        if transition in TRANSITIONS:
            needs = (
                " It needs a cache that lasts, so no `num_context_frames`, no EMA sink and no memory bank, and a "
                "transformer that `can_flush` it."
            )
        raise ValueError(f"`transition` must be one of {possible} but is {transition!r}.{needs}")


def check_sequence_length(length: int):
    if not isinstance(length, Integral) or not 1 <= length <= MAX_SEQUENCE_LENGTH:
        raise ValueError(f"`max_sequence_length` must be from 1 to {MAX_SEQUENCE_LENGTH} tokens, not {length}.")


def parse_scenes(prompt: str) -> list[Scene]:
    """A `ValueError`, which says at which character, for a scene without text or a bracket that is no ending."""
    check_text(prompt)
    scenes: list[Scene] = []
    position, transition = 0, "roll"
    while True:
        start, text = position, _TEXT.match(prompt, position)[0]
        position += len(text)
        seconds, next_transition = None, "roll"
        if prompt.startswith("[", position):
            ending = _ENDING.match(prompt, position)
            if ending is None or not (ending[1] or ending[2]) or (ending[1] and not float(ending[1])):
                names = ", ".join(TRANSITIONS)
                message = f"a duration is [8s], [8s#], [#] or [8s flush] at a scene's end, with one of {names}"
                raise _error(prompt, position, message + r"; \[ is a bracket")
            if ending[1] and float(ending[1]) > MAX_SECONDS:
                raise _error(prompt, position, f"a scene lasts at most {MAX_SECONDS} seconds")
            seconds = ending[1] and float(ending[1])
            next_transition = "cut" if ending[2] == "#" else ending[2] or "roll"
            position = ending.end()
        # The empty prompt is a prompt; an empty scene among others is a slip.
        if not text.strip() and prompt.strip():
            raise _error(prompt, start, "a scene has no text")
        scenes.append(Scene(re.sub(r"\\([\\|\[\]])", r"\1", text).strip(), seconds, transition))
        if position == len(prompt):
            return scenes
        position += 1  # a bar
        transition = next_transition


def has_scene_marks(prompt: str) -> bool:
    """Whether [`parse_scenes`] makes anything but one scene of the same text of it."""
    if not any(mark in prompt for mark in "|[\\"):  # as in nearly all of a set of a million
        return False
    try:
        return [scene.text for scene in parse_scenes(prompt)] != [prompt.strip()]
    except ValueError:
        return False


def escape_scenes(text: str) -> str:
    """A prompt that is `text` and nothing else."""
    return re.sub(r"([\\|\[\]])", r"\\\1", text)


def _error(prompt: str, position: int, message: str) -> ValueError:
    place = prompt[max(position - 20, 0) : position] + " >>> " + prompt[position : position + 20]
    return ValueError(f"prompt, character {position + 1}: {message}: {place!r}")


def plan_scenes(
    scenes: list[Scene], seconds_per_block: float, num_blocks: int | None = None
) -> tuple[dict[int, Scene], int]:
    """The scenes by the block with which each begins, and the number of blocks of the video.

    Each scene is a whole number of blocks, at least one. With `num_blocks` of a video the last is cut or stretched.
    """
    planned, start = {}, 0
    for scene in scenes:
        planned[start] = scene
        # Whole blocks, rounded down; the quotient of decimal fractions may lie just below a whole number.
        start += max(1, int((scene.seconds or DEFAULT_SECONDS) / seconds_per_block + 1e-9))
    if num_blocks is None:
        return planned, start
    return {start: scene for start, scene in planned.items() if start < num_blocks}, num_blocks
