"""What is converted, and to what."""

from dataclasses import dataclass

from ..config import Config, option
from ..errors import UserError, as_user_error
from ..layouts.published_models import find_published_model


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ConversionConfig(Config):
    """A published checkpoint that becomes a pipeline folder, or a published LoRA. Checked when the object is made."""

    aliases = {"model": "recipe"}

    recipe: str | None = option(
        None, "the published model that the checkpoint is, by its name below, or a YAML file that says what one is"
    )
    checkpoint: str | None = option(None, "the published file, or a folder of shards")
    base: str | None = option(
        None,
        "folder or Hub id of the Wan2.1 pipeline in Diffusers format, of the same size: text encoder, autoencoder and "
        "the sizes of the transformer are its",
    )
    weights: str | None = option(None, "entry of the checkpoint; if not given, the one that the model's authors load")
    lora: str | None = option(None, "merged into the checkpoint, in float32; without a checkpoint, converted itself")
    lora_alpha: float | None = option(None, "alpha of a LoRA that does not say it; its rank if not given")
    output_dir: str | None = option(None, "the new folder; what lies in it under other names stays")
    overwrite: bool = option(False, "replace files of these names in output_dir")
    dtype: str | None = option(None, "of the transformer; if not given, the file's, float32 for 8-bit", choices=DTYPES)
    push_to_hub: bool = option(False, "upload what was written")
    hub_model_id: str | None = option(None, "repository to push to; the name of output_dir if not given")

    def __post_init__(self):
        super().__post_init__()
        if self.recipe is not None:
            with as_user_error("recipe"):
                find_published_model(self.recipe)
        if self.checkpoint is None and self.lora is None:
            raise UserError("nothing to convert: give checkpoint, lora or both.")
        if self.output_dir is None:
            raise UserError("output_dir is missing: name the new folder.")
        if self.checkpoint is not None and (self.recipe is None or self.base is None):
            raise UserError("checkpoint needs recipe and base.")
        needs = {"checkpoint": ("recipe", "base", "weights", "dtype")}
        needs |= {"lora": ("lora_alpha",), "push_to_hub": ("hub_model_id",)}
        for needed, names in needs.items():
            for name in names:
                if getattr(self, name) is not None and not getattr(self, needed):
                    raise UserError(f"{name} needs {needed}.")
