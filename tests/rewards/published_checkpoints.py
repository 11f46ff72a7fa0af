"""Small Qwen2-VL reward models, saved as the published ones are: the stock classes with filled-in weights, their names
those of transformers 4."""

import json
import math

import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration


SPECIAL = [
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
]
DIMENSIONS = ("VQ", "MQ", "TA")
NORMS = {f"{name}_{what}": value for name, pair in zip(DIMENSIONS, ((0.5, 2.0), (-0.25, 0.5), (1.0, 4.0)))
         for what, value in zip(("mean", "std"), pair)}  # fmt: skip
ALPHA = 6

HPS_TEMPLATE = '''
import a_package_that_is_nowhere

INSTRUCTION = """
Rate this picture.
Textual prompt - {text_prompt}

"""
prompt_with_special_token = """
The rating: <|Reward|>

END
"""
'''
VIDEO_TEMPLATE = '''
DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """
Rate this video.
**Quality:**  <|VQ_reward|>
END
**Motion:** <|MQ_reward|>
END
Textual prompt - {text_prompt}
**Alignment:** <|TA_reward|>
END
"""
'''


def tokenizer():
    """Byte-level BPE with a few merges and Qwen2-VL's special tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [HPS_TEMPLATE, VIDEO_TEMPLATE, "a red fox runs over the snow"],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def config(tokens, hidden_size=64):
    ids = tokens.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokens) + 20,  # the base has unused rows, as the published one does
            hidden_size=hidden_size,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        ),
        vision_config=dict(depth=2, embed_dim=32, hidden_size=hidden_size, num_heads=2, mlp_ratio=2),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        bos_token_id=None,
        eos_token_id=None,
    )


def fill(module):
    """Weights from a hash, the same with every version of every library, in values that bfloat16 holds exactly."""
    for index, (name, parameter) in enumerate(sorted(module.named_parameters())):
        mixed = (torch.arange(parameter.numel()) + 7919 * index + 1) * 2654435761 % 2**32
        mixed = (mixed ^ (mixed >> 15)) * 1540483477 % 2**32
        noise = (mixed ^ (mixed >> 13)).double() / 2**31 - 1
        scale = 0.1 if parameter.ndim < 2 else 2.0 / math.sqrt(parameter[0].numel())
        value = scale * noise + (parameter.ndim < 2 and "norm" in name)
        parameter.data = value.view(parameter.shape).float().bfloat16().float()
    return module.eval()


def old_name(name):
    """transformers 5 -> 4."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


class Published:
    """A small published model.

    Attributes:
        base: folder with `config.json` and the tokenizer of the base model.
        model: the stock class with the weights.
        head: its reward head.
        tokens: the tokenizer with the reward tokens.
    """

    def __init__(self, folder, reward_tokens, head, hidden_size=64):
        self.base = folder / "base"
        self.tokens = tokenizer()
        self.config = config(self.tokens, hidden_size)
        self.tokens.save_pretrained(self.base)
        self.config.save_pretrained(self.base)
        self.tokens.add_tokens(list(reward_tokens), special_tokens=True)
        self.config.text_config.vocab_size = len(self.tokens)
        self.model = fill(Qwen2VLForConditionalGeneration(self.config))
        self.head = fill(head)

    def old_layout(self):
        """As transformers 4 saved it."""
        weights = {old_name(name): tensor for name, tensor in self.model.state_dict().items()}
        return weights | {f"rm_head.{name}": tensor for name, tensor in self.head.state_dict().items()}


def hpsv3(folder, hidden_size=64):
    """`folder/base`, and `folder/hpsv3` with the weights and the text."""
    head = nn.Sequential(
        nn.Linear(hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    made = Published(folder, ["<|Reward|>"], head, hidden_size)
    made.folder = folder / "hpsv3"
    made.folder.mkdir()
    (made.folder / "data_collator_qwen.py").write_text(HPS_TEMPLATE)
    save_file(made.old_layout(), made.folder / "HPSv3.safetensors")
    return made


def videoreward(folder, outputs=1, hidden_size=64):
    """`folder/base`, and `folder/videoreward` as it is published: PEFT-wrapped in `checkpoint-11/model.pth`."""
    from peft import LoraConfig, get_peft_model

    head = nn.Linear(hidden_size, outputs, bias=False)
    made = Published(folder, [f"<|{name}_reward|>" for name in DIMENSIONS], head, hidden_size)
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    wrapped = get_peft_model(made.model, LoraConfig(r=4, lora_alpha=ALPHA, target_modules=targets))
    fill(wrapped)
    made.wrapped = wrapped.eval()
    made.folder = folder / "videoreward"
    checkpoint = made.folder / "checkpoint-11"
    checkpoint.mkdir(parents=True)
    (made.folder / "checkpoint-9").mkdir()
    (made.folder / "prompt_template.py").write_text(VIDEO_TEMPLATE)
    settings = {"inference_config": NORMS, "peft_lora_config": {"lora_r": 4, "lora_alpha": ALPHA}}
    (made.folder / "model_config.json").write_text(json.dumps(settings))
    made.tokens.save_pretrained(checkpoint / "tokenizer")
    made.weights = {old_name(name): tensor for name, tensor in wrapped.state_dict().items()}
    made.weights |= {f"base_model.model.rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    torch.save(made.weights, checkpoint / "model.pth")
    return made


def save_file(weights, path):
    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, path)
