"""The policies on one transformer: each is a LoRA adapter, and the reference, unless it moves, none."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from ..distributed.sharding import gathered, is_sharded, keeps_gathered
from ..errors import close_matches
from ..layouts.experts import MEMORY_TRANSFORMER, TRANSFORMER
from ..models.expert_pair import adapted_experts, experts_of
from ..models.lora_layers import LoraDiff, tuner_layers
from .merging import merged_weights


# The current policy has peft's and diffusers' default name, so that their savers and loaders take it.
CURRENT, OLD, REFERENCE, EMA = "default", "old", "reference", "ema"
# The adapters of the policies that `use_policy` knows.
POLICIES = {"current": CURRENT, "old": OLD, "reference": REFERENCE, "ema": EMA, "base": None}
# peft's and TRL's word for every Linear layer there is.
ALL_LINEAR = "all-linear"


def block_linear_names(transformer: nn.Module) -> list[str]:
    """Suffixes of the names of all Linear layers in the transformer's repeated blocks (`attn1.to_q`, ...)."""
    names = set()
    for block in transformer.modules():
        if type(block).__name__ in transformer._repeated_blocks:
            names |= {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names)


def target_module_names(transformer: nn.Module, target_modules: Sequence[str] = ()) -> list[str]:
    """Suffixes of the names of the modules that get a LoRA, as peft takes them: those given, or else those of
    [`block_linear_names`]. Among those given, `"all-linear"` stands for every Linear layer, those outside of the
    blocks too, as RAVEN's LoRA has them. A `ValueError` if one is no module's: peft passes over it beside others."""
    in_blocks = block_linear_names(transformer)
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    all_linear = in_blocks + [name for name in linears if not any(_ends_with(name, known) for known in in_blocks)]
    names = []
    for target in target_modules or in_blocks:
        if target != ALL_LINEAR and not any(_ends_with(name, target) for name, _ in transformer.named_modules()):
            near = close_matches(target, all_linear)
            choices = ", ".join([ALL_LINEAR, *all_linear])
            raise ValueError(f"no module is called {target!r}{near}; target modules can be {choices}.")
        names += all_linear if target == ALL_LINEAR else [target]
    return list(dict.fromkeys(names))


def _ends_with(name: str, suffix: str) -> bool:
    return f".{name}".endswith(f".{suffix}")


def add_policies(
    transformer: nn.Module,
    rank: int,
    lora_alpha: int,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = (),
    others: Sequence[str] = (OLD,),
    components: Sequence[str] = (TRANSFORMER,),
):
    """Freeze the transformer and add the adapter `default` (the current policy, trainable) and those of others; of an
    [`ExpertPair`] to the experts that `components` names.

    LoRA weights are float32 whatever the base is. They start as peft has it, with B zero, so that all policies
    coincide. `"old"` and `"ema"` start as the current policy, `"reference"` as the transformer alone.
    """
    experts = experts_of(transformer)
    for name in components:
        config = LoraConfig(
            r=rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_module_names(experts[name], target_modules),
        )
        experts[name].add_adapter(config, adapter_name=CURRENT)
    _complete_policies(transformer, others)


def load_policies(
    pipeline, lora: str | Path, others: Sequence[str] = (OLD,), components: Sequence[str] = (TRANSFORMER,)
):
    """As `add_policies`, with a LoRA that `load_lora_weights` takes as the policies to start from: rank, alpha and
    target modules are its own. The reference is the transformer without it."""
    for_memory = list(components) == [MEMORY_TRANSFORMER]
    pipeline.load_lora_weights(lora, adapter_name=CURRENT, load_into_memory_transformer=for_memory)
    adapted = adapted_experts(pipeline.denoiser)
    if adapted.keys() != set(components):
        raise ValueError(f"it is of {' and '.join(adapted)}, and lora_expert says {' and '.join(components)}.")
    if any(expert.peft_config[CURRENT].use_dora for expert in adapted.values()):
        raise ValueError("a DoRA cannot be trained on: only plain LoRAs can.")
    if any(isinstance(module, LoraDiff) for module in pipeline.denoiser.modules()):
        raise ValueError(
            "it adds to norms or modulation, which the LoRA that is trained cannot: load it in a pipeline, "
            "fuse_lora(), save_pretrained(), and train on that model."
        )
    _complete_policies(pipeline.denoiser, others)


def _complete_policies(transformer: nn.Module, others: Sequence[str]):
    transformer.requires_grad_(False)
    with warnings.catch_warnings():
        # peft takes a second adapter for a mistake.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        for expert in adapted_experts(transformer).values():
            for name in others:
                expert.add_adapter(copy.deepcopy(expert.peft_config[CURRENT]), adapter_name=name)
    for name in transformer.peft_config:
        for parameter in policy_parameters(transformer, name):
            parameter.data = parameter.data.float()
        if name != CURRENT:
            follow_current(transformer, name, decay=0.0)
    if REFERENCE in others:
        for name, parameter in transformer.named_parameters():
            if f".lora_B.{REFERENCE}." in name:
                parameter.data.zero_()
    # Before DDP wraps the model: it synchronises the parameters that are trainable then, and no others.
    transformer.set_adapter(CURRENT)


def policy_parameters(transformer: nn.Module, adapter: str = CURRENT) -> list[nn.Parameter]:
    """LoRA parameters of an adapter, in the order of the modules: those of two adapters correspond pairwise."""
    return [parameter for name, parameter in transformer.named_parameters() if f".{adapter}." in name]


@contextmanager
def exchanged(parameters: Sequence[nn.Parameter], values: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values, and the tensors that hold them the parameters' own."""

    @torch.no_grad()
    def exchange():
        for parameter, value in zip(parameters, values, strict=True):
            held = parameter.clone()
            parameter.copy_(value)
            value.copy_(held)

    exchange()
    try:
        yield
    finally:
        exchange()


@contextmanager
def use_policy(transformer: nn.Module, policy: str, merge: bool = False) -> Iterator[nn.Module]:
    """Run as one of `POLICIES`, in eval mode and without gradients. `"base"` is the transformer alone, and so is the
    reference without an adapter of its own.

    With `merge` its LoRA is merged into the weights ([`merged_weights`]), and a pass costs what that of the
    transformer alone does. For videos: predictions that are compared with those of unmerged policies would differ from
    them by the rounding of weights.

    Afterwards, come what may, the current policy is active and trainable again. peft ties `requires_grad` to the
    active adapter and gradients are lost without an error if it changes between forward and backward: finish the
    backward pass before entering.
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` must be one of {tuple(POLICIES)}, not {policy!r}.")
    adapter = POLICIES[policy]
    has_adapter = adapter in transformer.peft_config
    if not has_adapter and policy not in ("reference", "base"):
        raise ValueError(f"this run has no policy {policy!r}: its adapters are {', '.join(transformer.peft_config)}.")
    merge = merge and has_adapter
    alone = merge or not has_adapter
    training = transformer.training
    transformer.eval()
    try:
        if alone:
            transformer.disable_adapters()
        elif adapter != CURRENT:
            transformer.set_adapter(adapter)
        with torch.no_grad(), merged_weights(transformer, adapter) if merge else nullcontext():
            yield transformer
    finally:
        if alone:
            transformer.enable_adapters()
        elif adapter != CURRENT:
            transformer.set_adapter(CURRENT)
        transformer.train(training)


def leave_casts_to_autocast(transformer: nn.Module):
    """Of a transformer whose forward pass is under autocast. peft makes float32 of what LoRA layers are given, as
    their weights are, and autocast makes its own dtype of that again."""
    # Dropout rounds differently in another dtype.
    if not transformer.peft_config[CURRENT].lora_dropout:
        for layer in tuner_layers(transformer):
            layer.cast_input_dtype_enabled = False


@contextmanager
def many_passes(transformer: nn.Module) -> Iterator[None]:
    """Inside, where nothing may change the weights, passes share what can be made once for all of them.

    Under autocast these are the LoRA weights in its dtype; gradients are added up in the weights' float32, pass by
    pass. A thread that leaves autocast has all copies made anew: that which decodes for the rewards, and on CUDA that
    of the backward pass, for every block it computes again. In shards it is the whole weights, where
    [`keeps_gathered`] says so.
    """
    with ExitStack() as stack:
        if keeps_gathered():
            stack.enter_context(gathered(transformer))
        # In shards copies would be of whole weights, and all of them there at once. And a gradient that goes through
        # a copy of an earlier pass comes to the weight after FSDP has averaged those of its block.
        if not is_sharded() or (keeps_gathered() and not torch.is_grad_enabled()):
            # Autocast forgets its copies at the end of its outermost context, which was that of a forward pass, and of
            # every block that the backward pass computes again. Disabled, for what is around these passes never was
            # under it.
            device = next(transformer.parameters()).device.type
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@torch.no_grad()
def follow_current(transformer: nn.Module, adapter: str, decay: float):
    """`adapter <- decay adapter + (1 - decay) current`, in place, parameter by parameter (local shards if sharded)."""
    pairs = zip(policy_parameters(transformer, adapter), policy_parameters(transformer, CURRENT), strict=True)
    for follower, current in pairs:
        follower.lerp_(current, 1 - decay)


def ema_decay(step: int, maximum: float) -> float:
    """`min((1 + step) / (10 + step), maximum)` after `step` earlier updates: the average is of the last policies from
    the start, as in the code released with DiffusionNFT and Astrolabe, and not of the untrained one."""
    return min((1 + step) / (10 + step), maximum)
