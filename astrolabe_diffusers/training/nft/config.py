"""Settings of NFT, negative-aware fine-tuning (Astrolabe, arXiv 2603.17051, after DiffusionNFT, arXiv 2509.16117)."""

from dataclasses import dataclass

from ...config import option
from ...errors import UserError
from ..config import AUTO
from ..forward_process.config import ForwardProcessConfig


@dataclass
class NFTConfig(ForwardProcessConfig):
    """Settings of a run with NFT, beside those of [`OnlineConfig`] and [`ForwardProcessConfig`]."""

    algorithm = "NFT"
    paper = "https://arxiv.org/abs/2603.17051"

    output_dir: str = option("nft-lora", "everything the run writes")
    beta: float = option(1.0, "how far the implicit policies lie from the old one", above=0)
    loss_weighting: str = option(
        "none",
        "`adaptive`: DiffusionNFT's loss, divided by the mean distance to the sample and times adv_clip_max / beta; "
        "blows up after 50 steps in Astrolabe",
        choices=("none", "adaptive"),
    )
    context_policy: str = option(
        "old", "whose K and V a clean context has: the old policy's for all, or each one's own", choices=("old", "own")
    )
    selective_kl: bool = option(False, "KL only where the primary reward ranks far above the others (Astrolabe 3.4)")
    risk_ratio: float = option(0.1, "selective_kl: part of the doubtful samples held at first", minimum=0, maximum=1)
    risk_ratio_rate: float = option(0.1, "by how much of itself it grows or shrinks", minimum=0, maximum=1)
    risk_ratio_min: float = option(0.02, "its lower limit", minimum=0, maximum=1)
    risk_ratio_max: float = option(0.2, "its upper limit", minimum=0, maximum=1)
    risk_buffer_size: int = option(20, "epochs whose mean disagreement it is compared with", minimum=1)
    risk_rule: str = option(
        "hacked",
        "doubtful: ranked above the other rewards by the primary one; or, as released, below",
        choices=("hacked", "released"),
    )
    kl_average: str = option(
        "selected",
        "selective_kl is a mean over all samples of a step that are held; or, as in the release, over those of a "
        "batch, and then over the batches, one without any counting as zero",
        choices=("selected", "batch"),
    )
    reference_reset_kl: float | None = option(
        None, "the reference becomes the current policy when the KL passes this (0.15 in the release)", minimum=0
    )
    reference_reset_epochs: int | None = option(
        None, "... or when it is older, in epochs (15 in the release)", minimum=1
    )
    reference_reset_kl_step: float = option(
        0.0,
        "by how much reference_reset_kl falls when the reference became too old, and rises when it became less than "
        "reference_reset_early_epochs old (0.01 in the release)",
        minimum=0,
    )
    reference_reset_kl_min: float = option(0.0, "it falls to this at most (0.1 in the release)", minimum=0)
    reference_reset_kl_max: float | None = option(
        None, "it rises to this at most, if given (0.05 in the release, which lowers 0.15 to it)", minimum=0
    )
    reference_reset_early_epochs: int = option(5, "a reference that did not get this old was reset early", minimum=0)
    old_policy_decay_rate: float = option(0.001, "old = d old + (1 - d) current, d = min(rate step, max)", minimum=0)
    old_policy_decay_max: float = option(0.5, "upper limit of that d", minimum=0, maximum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.selective_kl and len(self.rewards) < 2:
            raise UserError(
                "selective_kl compares the primary reward with the others: name another reward, with weight 0 if it "
                "is not to be trained on."
            )

        if self.selective_kl and self.trained_fraction < 1:
            raise UserError(
                "selective_kl chooses among all videos of an epoch, and trained_fraction leaves some out: set it to 1."
            )
        if self.train_batch_size == AUTO and self.selective_kl and self.kl_average == "batch":
            raise UserError(
                "kl_average=batch trains something else with batches of another size: give train_batch_size a number, "
                "or set kl_average=selected."
            )

    @property
    def other_adapters(self) -> list[str]:
        moves = self.reference_reset_kl is not None or self.reference_reset_epochs is not None
        return ["old"] + ["reference"] * moves + super().other_adapters
