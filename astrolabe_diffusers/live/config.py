"""The settings of a server of streams."""

from dataclasses import dataclass

from ..config import option
from ..errors import UserError
from ..pipelines.config import PipelineConfig


# The environment variable with what viewers have to know.
TOKEN_VARIABLE = "ASTROLABE_LIVE_TOKEN"
# By what they cost and what they send, as docs/benchmarks.md has it; H.264 needs PyAV.
CODECS = ("h264", "jpeg", "webp")


@dataclass
class LiveConfig(PipelineConfig):
    """Settings of `astrolabe live`. Checked when the object is made."""

    host: str = option("127.0.0.1", "address to listen at; others than this machine's own need a token")
    port: int = option(7860, "port to listen at", minimum=1, maximum=65535)
    public: bool = option(False, "whoever reaches the server may use it without a token, as in a Space")
    device: str | None = option(None, "such as cuda:1; the GPU if there is one, if not given")
    num_frames: int | None = option(
        None, "frames after which a video ends; never if the model can go on, if not given", minimum=1
    )
    sessions: int = option(1, "viewers whose videos are made at the same time, in turns", minimum=1)
    waiting: int = option(16, "viewers that may wait for one of these to leave", minimum=0)
    idle_seconds: float = option(60, "after which a paused viewer makes room for one who waits", minimum=1)
    max_pixels: int | None = option(None, "of a frame, at most; those of the model's own size if not given", minimum=1)
    max_connections: int = option(64, "pages that are open at a time; further ones are told to come later", minimum=1)
    codecs: list[str] = option(list(CODECS), "how frames may be sent; the first that a viewer can decode is taken")
    max_recordings: int = option(16, "recordings that are kept; the oldest goes first", minimum=1)
    max_recording_seconds: float = option(600, "of video in a recording", above=0)

    def __post_init__(self):
        super().__post_init__()
        unknown = [codec for codec in self.codecs if codec not in CODECS]
        if unknown or not self.codecs:
            raise UserError(f"codecs may be {', '.join(CODECS)}, not {', '.join(unknown) or 'empty'}.")
        if self.compile and self.lora:
            raise UserError("compile takes no lora here: each weight that a viewer sets would be compiled anew.")
        if self.offload != "none" and self.sessions > 1:
            raise UserError("offload is for one session: with several the models would come and go with every block.")
