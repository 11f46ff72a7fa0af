"""8-bit linear layers by torchao, as an option of generation: those of the transformers' blocks, and no others."""

from typing import TYPE_CHECKING

from ..errors import UserError
from ..layouts.experts import EXPERTS


# Settings name the kinds, and `--help` is to load none of these.
if TYPE_CHECKING:
    import torch
    from diffusers import PipelineQuantizationConfig
    from torchao.core.config import AOBaseConfig

QUANTIZATIONS = ("float8", "int8_weight_only")
# Outside of the blocks: two hundredths of the weights, and all that is seen goes through them.
NOT_QUANTIZED = ["condition_embedder", "proj_out"]
ZERO = 1e-12
# Ada's, the first with 8-bit floating-point products.
FLOAT8_CAPABILITY = (8, 9)


def quant_type(quantization: str) -> "AOBaseConfig":
    """torchao's configuration of a layer: `float8` are products of 8 bits, with a scale for each row of weights and
    each token, `int8_weight_only` weights of 8 bits in products of bfloat16. A [`UserError`] without torchao."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow
    except ImportError as error:
        raise UserError(
            f"quantization {quantization} needs torchao: pip install 'astrolabe_diffusers[quantization]' ({error})"
        ) from error
    # torchao's settings of the compiler would hold for the whole process, and have it try kernels for minutes.
    if quantization == "float8":
        # Without the bound a token of zeros, as padding of a prompt can be, has the scale 0 and is NaN.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), activation_value_lb=ZERO, set_inductor_config=False
        )
    return Int8WeightOnlyConfig(set_inductor_config=False)


def quantization_config(quantization: str, device: "torch.device") -> "PipelineQuantizationConfig":
    """
    `from_pretrained(quantization_config=...)` of a pipeline, in bfloat16, that is to run on `device`.

    Raises:
        UserError: torchao is missing, or the device has no 8-bit floating-point products.
    """
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    if quantization == "float8":
        check_float8(device)
    # One for each: what loads a model adds to its lists.
    configs = {
        name: TorchAoConfig(quant_type(quantization), modules_to_not_convert=[*NOT_QUANTIZED])
        for name in EXPERTS
    }
    return PipelineQuantizationConfig(quant_mapping=configs)


def check_float8(device: "torch.device"):
    import torch

    found = "a CPU" if device.type == "cpu" else device.type
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= FLOAT8_CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)}, of {capability[0]}.{capability[1]}"
    raise UserError(
        f"quantization float8 needs a GPU of compute capability {'.'.join(map(str, FLOAT8_CAPABILITY))} or more (Ada, "
        f"Hopper, Blackwell), and this is {found}: choose int8_weight_only, or none."
    )
