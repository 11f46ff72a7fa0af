"""MP4 files that are written while their frames are generated."""

from contextlib import suppress
from pathlib import Path
from typing import Self

import imageio_ffmpeg
import numpy as np

from .writing import PARTIAL


class VideoWriter:
    """
    Encodes frames to H.264 as they come; only the encoder's look-ahead is kept in memory. A context manager: the file
    gets its name when the context ends and it is whole, and replaces one that has it. After an exception nothing is
    left of it. Height and width, in pixels, are even numbers.
    """

    def __init__(self, path: Path, height: int, width: int, fps: int):
        self.path, self.num_frames = path, 0
        self._partial = path.with_name(path.name + PARTIAL)
        self._encoder = imageio_ffmpeg.write_frames(
            str(self._partial),
            (width, height),
            fps=fps,
            # Sizes that are no multiple of 16 would be scaled; 4:2:0 needs even ones.
            macro_block_size=2,
            # By its name ffmpeg could not tell the format.
            output_params=["-f", "mp4"],
            # It says what ends it in lines of its own; what is wrong is said once, below.
            ffmpeg_log_level="fatal",
        )

    def __enter__(self) -> Self:
        self._encoder.send(None)
        return self

    def write(self, frames: np.ndarray):
        """Appends `frames` `(F, H, W, 3)`, uint8."""
        try:
            self._encoder.send(np.ascontiguousarray(frames))
        except OSError as error:
            raise OSError(f"ffmpeg ended while it wrote {self._partial}: is the disk full?") from error
        self.num_frames += len(frames)

    def __exit__(self, kind, *_):
        try:
            self._encoder.close()
            if kind is None:
                # The writer does not say that ffmpeg failed, on a full disk for example.
                written = 0
                with suppress(RuntimeError):
                    written, _ = imageio_ffmpeg.count_frames_and_secs(str(self._partial))
                if written != self.num_frames:
                    arrived = f"only {written} of {self.num_frames} frames arrived in {self._partial}"
                    raise OSError(f"{arrived}: is the disk full?")
                self._partial.replace(self.path)
        finally:
            self._partial.unlink(missing_ok=True)
