"""Settings of AWM."""

from dataclasses import dataclass

from ...config import option
from ..forward_process.config import ForwardProcessConfig


@dataclass
class AWMConfig(ForwardProcessConfig):
    """Settings of a run with AWM, beside those of [`OnlineConfig`] and [`ForwardProcessConfig`]."""

    algorithm = "AWM"
    paper = "https://arxiv.org/abs/2509.25050"

    output_dir: str = option("awm-lora", "everything the run writes")
