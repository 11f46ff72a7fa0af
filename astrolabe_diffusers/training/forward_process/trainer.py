"""What the trainers have in common that go through the transformer block by block."""

from ..trainer import OnlineTrainer
from .compilation import compiles_blocks
from .config import BlockwiseConfig
from .predictors import check_context


class BlockwiseTrainer(OnlineTrainer):
    """An [`OnlineTrainer`] of an algorithm that predicts blocks of what was sampled ([`BlockwisePredictor`])."""

    config: BlockwiseConfig

    def compiles(self) -> bool:
        return compiles_blocks(self.config, self.transformer, self.windows.size, self.accelerator.device)

    def prepare(self):
        check_context(self.config, self.transformer, self.windows.have_past, self.pipeline.config.past_weight)
        super().prepare()
