import ast
import math
import re
from dataclasses import dataclass

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from astrolabe_diffusers import TINY_SHAPES
from astrolabe_diffusers.reporting.model_card import findings, shareable_settings, write_card
from astrolabe_diffusers.training.nft import NFTConfig
from tests.training.helpers import config
from tests.training.hub_server import metadata_problems


MATCH, SHARPNESS, FLICKER = "match", "sharpness", "flicker"


def score(change, half=0.1):
    return {"before": 0.5, "after": 0.5 + change, "change": change, "half_width_95": half}


def results(**scores):
    return {
        "num_videos": 8,
        "num_prompts": 4,
        "size": {"height": 32, "width": 48, "num_frames": 21},
        "steps": 80,
        "num_samples": 640,
        "num_processes": 2,
        "device": "a GPU",
        "versions": {"torch": "2.13"},
        "train_seconds": 61.0,
        "samples_per_second": 10.5,
        "peak_memory_gb": 3.25,
        "scores": {"reward": score(0.25), MATCH: score(0.25), **scores},
    }


def card_of(cfg, values, prompts=("a cat",), repo_id=None):
    return ModelCard.load(write_card(cfg, values, prompts, repo_id))


@pytest.mark.parametrize(
    ("change", "half", "words"),
    [
        (0.25, 0.1, "rose on prompts that were held out: reward +0.2500  [+0.1500, +0.3500]"),
        (0.05, 0.1, "**The reward it was trained on did not clearly change"),
        (-0.00004, 0.00001, "did not clearly change"),
        # One video has no interval, and none no change.
        (-0.59, math.nan, "**Too few held-out videos were scored to say"),
        (-0.59, math.nan, "whether the reward it was trained on changed**: reward -0.5900."),
        (math.nan, math.nan, "changed**: reward nan."),
        (-0.25, 0.1, "**The reward it was trained on fell"),
    ],
)
def test_what_became_of_the_reward(change, half, words):
    first, *_ = findings({"reward": score(change, half), MATCH: score(change, half)}, {MATCH: 1.0})
    assert words in first


def test_what_fell_is_named():
    scores = {"reward": score(0.3), MATCH: score(0.3), SHARPNESS: score(-0.2), FLICKER: score(-0.05)}
    assert findings(scores, {MATCH: 1.0})[1:] == [
        "**Fell while only watched**: sharpness -0.2000  [-0.3000, -0.1000]."
    ]
    # Trained on too, and lost to the other reward.
    assert findings(scores, {MATCH: 1.0, SHARPNESS: 0.1, FLICKER: 0.1})[1].startswith(
        "**Moved against their weight**: sharpness -0.2000"
    )
    # To fall is what a negative weight is for; a weight of zero only watches.
    assert "Moved" not in " ".join(findings(scores, {MATCH: 1.0, SHARPNESS: -0.1}))
    assert "only watched**: sharpness" in findings(scores, {MATCH: 1.0, SHARPNESS: 0.0})[1]
    assert "Moved against their weight**: match +0.3000" in findings(scores, {MATCH: -1.0, SHARPNESS: -1.0})[1]
    assert findings({"reward": score(0.3), MATCH: score(0.3), FLICKER: score(0.0)}, {MATCH: 1.0})[1].endswith(
        "none clearly fell."
    )
    alone = {name: score(-0.3, math.nan) for name in ("reward", MATCH, FLICKER)}
    assert findings(alone, {MATCH: 1.0})[1:] == [
        "Too few videos were scored to say whether a score that was only watched fell."
    ]
    assert "No other score was watched" in findings({"reward": score(0.3), MATCH: score(0.3)}, {MATCH: 1.0})[1]


def test_card_of_a_model_on_the_hub(tmp_path):
    cfg = config(
        model="someone/self-forcing",
        revision="v1",
        rewards={MATCH: 2.0},
        output_dir=tmp_path / "my-lora",
        hub_license="cc-by-nc-4.0",
        seed=7,
    )
    values = results(**{FLICKER: score(-0.2), "empty": score(math.nan, math.nan)})
    card = card_of(cfg, values, ["a cat", 'a dog\'s "life"'], "me/my-lora")
    assert card.data.base_model == "someone/self-forcing" and card.data.library_name == "diffusers"
    assert card.data.license == "cc-by-nc-4.0" and "cc-by-nc-4.0. The licence of the base" in card.text
    evaluated = {(r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert evaluated == {("reward", 0.75), (MATCH, 0.75), (FLICKER, 0.3)}
    assert [(w["text"], w["output"]["url"]) for w in card.data.widget] == [
        ("a cat", "eval_videos/step-80/000.mp4"),
        ('a dog\'s "life"', "eval_videos/step-80/001.mp4"),
    ]
    for text in (
        'from_pretrained("someone/self-forcing", revision="v1")',
        'load_lora_weights("me/my-lora")',
        'pipe("a cat", height=32, width=48, num_frames=21)',
        "`match` (weight 2)",
        "**Fell while only watched**: flicker",
        "before_after.gif",
        "2 x a GPU, 1:01 without evaluations, peak memory 3.2 GB",
        "torch 2.13",
        "seed 7, held-out seeds 0 to",
    ):
        assert text in card.text, text
    table = [re.split(r" *\| *", line.strip("| ")) for line in card.text.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == ["reward", MATCH, FLICKER, "empty"]
    assert table[3] == [MATCH, "2", "0.5000", "0.7500", "+0.2500  [+0.1500, +0.3500]"]
    assert str(tmp_path) not in str(card)
    (settings,) = re.findall(r"```yaml\n(.*?)```", card.text, re.S)
    # A run with these settings is this run.
    assert shareable_settings(NFTConfig(**yaml.safe_load(settings))) == yaml.safe_load(settings)
    assert yaml.safe_load(settings)["seed"] == 7
    assert not metadata_problems(str(card))


def test_card_of_a_model_in_a_folder_names_no_path(model_folder, tmp_path):
    values = {"output_dir": tmp_path / "my-lora", "prompts": model_folder / "prompts", "init_lora": tmp_path / "first"}
    (tmp_path / "first").mkdir()
    cfg = config(model=model_folder, rewards={MATCH: 1.0}, **values)
    card = card_of(cfg, results())
    assert card.data.base_model is None and not metadata_problems(str(card))
    assert f'from_pretrained("{model_folder.name}")' in card.text and 'load_lora_weights("my-lora")' in card.text
    assert "the LoRA `first` it started from" in card.text
    assert str(tmp_path) not in str(card) and str(model_folder.parent) not in str(card)
    assert shareable_settings(cfg)["prompts"] == "prompts"
    cfg.hub_base_model = "someone/base"
    card = card_of(cfg, results())
    assert card.data.base_model == "someone/base" and "model `someone/base`" in card.text


def test_card_names_no_place_of_a_reward(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    cfg = config(
        rewards={MATCH: 1.0},
        output_dir=tmp_path / "my-lora",
        reward_options={MATCH: {"checkpoint": str(weights), "frames": "stride:4"}},
        reward_placement={MATCH: "http://rewards.internal:8000"},
    )
    (tmp_path / "my-lora").mkdir()
    card = card_of(cfg, results())
    assert str(tmp_path) not in str(card) and "internal" not in str(card)
    assert shareable_settings(cfg)["reward_options"] == {MATCH: {"checkpoint": "weights", "frames": "stride:4"}}


def test_whatever_is_in_prompts_and_names_shows_as_it_is(tmp_path):
    """Read by other parsers: of YAML by huggingface_hub, of Markdown by markdown-it, of the code by Python."""
    prompts = ["```\n# a heading\n---\nlicense: mit", "- a [link](javascript:alert(1)) | <img src=x>", '"); exit() #']
    prompts += ["{{ 7 * 7 }} {% raw %} {# gone #}"]
    name = "`rm` |</code>\n```"
    cfg = config(
        model="someone/a`b",
        revision='"), exit("',
        rewards={MATCH: 1.0},
        output_dir=tmp_path,
        hub_model_id='me/a"b<i>`{{ title }}',
        hub_license="mit\n---\n# <b>owned</b>",
        prompt_column=name,
    )
    card = card_of(cfg, results(), prompts)
    lines = [re.sub(r"\s+", " ", prompt) for prompt in prompts]
    assert [widget["text"] for widget in card.data.widget] == [prompt.replace("\n", " ") for prompt in prompts]
    assert card.data.license == cfg.hub_license and card.data.base_model == "someone/a`b"
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    own = ["What it changes", "Videos", "Training", "Licence"]
    assert [shown(title) for title in titles] == ['a"b<i>`{{ title }}', *own]
    items = [tokens[i + 2] for i, token in enumerate(tokens) if token.type == "list_item_open"]
    assert [shown(item) for item in items if shown(item) in lines] == lines
    inside = [token for inline in tokens for token in inline.children or ()]
    assert [token.content.strip() for token in tokens + inside if "html" in token.type] == ["<Gallery />"]
    assert all("javascript" not in token.attrs.get("href", "") for token in inside if token.type == "link_open")
    code, settings = [token.content for token in tokens if token.type == "fence"]
    nodes = list(ast.walk(ast.parse(code)))
    calls = {node.func.attr: node for node in nodes if isinstance(node, ast.Call) and hasattr(node.func, "attr")}
    assert ast.literal_eval(calls["load_lora_weights"].args[0]) == cfg.hub_model_id
    assert ast.literal_eval(calls["from_pretrained"].keywords[0].value) == cfg.revision
    assert prompts[0] in [node.value for node in nodes if isinstance(node, ast.Constant)]
    assert yaml.safe_load(settings)["prompt_column"] == name


def shown(inline):
    """The text of a line without what Markdown makes of it."""
    return "".join(token.content for token in inline.children)


@dataclass
class OtherConfig(NFTConfig):
    algorithm = "my *best* algorithm"
    paper = None


@dataclass
class PublishedConfig(NFTConfig):
    algorithm = "AWM"
    paper = "https://arxiv.org/abs/2509.25050"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NFTConfig, "NFT, as in [Astrolabe](https://arxiv.org/abs/2603.17051)"),
        (OtherConfig, r"my \*best\* algorithm"),
        (PublishedConfig, "AWM, as in [arxiv.org/abs/2509.25050](https://arxiv.org/abs/2509.25050)"),
    ],
)
def test_card_names_the_algorithm(tmp_path, kind, words):
    card = card_of(kind(rewards={MATCH: 1.0}, output_dir=tmp_path), results())
    assert f"trained by reinforcement learning ({words}) on" in card.text


def test_card_without_videos(tmp_path):
    cfg = config(model=TINY_SHAPES, rewards={MATCH: 1.0}, output_dir=tmp_path)
    card = card_of(cfg, results(), prompts=())
    assert "before_after" not in card.text and not card.data.widget
    assert "from_pretrained(astrolabe_diffusers.TINY_SHAPES)" in card.text
