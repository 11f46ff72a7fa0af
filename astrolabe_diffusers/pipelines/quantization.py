"""8-bit linear layers by torchao, as an option of generation: those of the transformer's blocks, and no others."""

from typing import TYPE_CHECKING

import torch

from ..errors import UserError


if TYPE_CHECKING:
    from diffusers import PipelineQuantizationConfig
    from torchao.core.config import AOBaseConfig

QUANTIZATIONS = ("float8", "int8_weight_only")
# Outside of the blocks: a hundredth of the time and of the memory, and all that is seen goes through them.
NOT_QUANTIZED = ["condition_embedder", "proj_out"]
# Of the first cards with 8-bit floating-point products, Ada's.
FLOAT8_CAPABILITY = (8, 9)


def quant_type(quantization: str) -> "AOBaseConfig":
    """torchao's configuration of a layer: `float8` are products of 8 bits, with a scale for each row of weights and
    each token, `int8_weight_only` weights of 8 bits that are products of bfloat16."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow
    except ImportError as error:
        raise UserError(
            f"quantization {quantization} needs torchao: pip install 'astrolabe_diffusers[quantization]' ({error})"
        ) from error
    # Its settings of the compiler are the whole process's, and try kernels for minutes.
    if quantization == "float8":
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    return Int8WeightOnlyConfig(set_inductor_config=False)


def quantization_config(quantization: str, device: torch.device) -> "PipelineQuantizationConfig":
    """
    `from_pretrained(quantization_config=...)` of a pipeline, in bfloat16, that is to run on `device`.

    Raises:
        UserError: torchao is missing, or the device has no 8-bit floating-point products.
    """
    from diffusers import PipelineQuantizationConfig, TorchAoConfig

    if quantization == "float8":
        check_float8(device)
    config = TorchAoConfig(quant_type(quantization), modules_to_not_convert=[*NOT_QUANTIZED])
    return PipelineQuantizationConfig(quant_mapping={"transformer": config})


def check_float8(device: torch.device):
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
