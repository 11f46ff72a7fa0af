"""The recipe by which a pipeline makes its videos."""

from diffusers import DiffusionPipeline

from ..errors import as_user_error
from ..models.transformer_causal_wan import check_window
from .config import RecipeConfig


def apply_recipe(pipeline: DiffusionPipeline, config: RecipeConfig):
    """What the settings say about how the model attends and samples; its own where they do not.

    Raises:
        UserError: the model cannot have this window or sink.
    """
    attention = {"local_attn_size": config.local_attn_size, "sink_size": config.sink_size}
    for expert in pipeline.experts.values():
        expert.register_to_config(**{name: value for name, value in attention.items() if value is not None})
    with as_user_error("this model's window or sink cannot be that"):
        check_window(pipeline.transformer.config)
    if config.sigmas:
        pipeline.register_to_config(sigmas=config.sigmas, first_block_sigmas=None)
    if config.num_context_frames is not None:
        pipeline.register_to_config(num_context_frames=config.num_context_frames or None)
