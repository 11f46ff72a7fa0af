import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "astrolabe_diffusers" / "__init__.py").read_text(), re.M)[1]

INSTALL_REQUIRES = [
    # Tested from 2.11 (CUDA) to 2.14; no newer one is known to break. constraints.txt has the versions of the tests.
    "torch>=2.11",
    # The transformer subclasses WanTransformer3DModel and the loader WanLoraLoaderMixin as they are since 0.42.
    "diffusers>=0.42",
    # Major version 5 changed the tokenizers; tested with 5.17 and 5.23.
    "transformers>=5,<6",
    # The oldest versions whose treatment of several adapters, and of the state that resuming needs, was tested.
    "accelerate>=1.15,<2",
    "peft>=0.21",
    "datasets>=4",
    "safetensors>=0.8",
    "numpy>=2",
    "pillow>=10.1",
    "pyyaml>=6",
    "tqdm>=4.66",
    # Both come with torch, huggingface_hub and accelerate.
    "filelock>=3.12",
    "psutil>=5.9",
    "tensorboard>=2.16",
    # imageio-ffmpeg ships ffmpeg; without it export_to_video falls back to OpenCV.
    "imageio>=2.34",
    "imageio-ffmpeg>=0.5",
    "matplotlib>=3.9",
    # Rewards on a server or behind a judge's endpoint; diffusers has it too.
    "requests>=2.32",
    # Wan's prompt cleaning, and UMT5 folders that hold a SentencePiece model alone.
    "ftfy>=6.1",
    "sentencepiece>=0.2",
]

EXTRAS_REQUIRE = {
    # Reward models built on CLIP. Never required: a torchvision fits one torch only, and one that does not fit breaks
    # transformers, peft and diffusers on import. 0.26 belongs to torch 2.11. Where torch comes from an index of its
    # own (CPU builds), torchvision has to as well.
    "rewards": ["open_clip_torch>=3", "torchvision>=0.26"],
    # Only its weights are read. Its libsvm is compiled on installation; `pip install --no-deps brisque` is enough.
    "brisque": ["brisque>=0.2"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    # The oldest uvicorn with the WebSocket protocol that waits for a client to read. Without av frames are sent as
    # images.
    "live": ["fastapi>=0.115", "uvicorn>=0.54", "websockets>=17", "av>=18"],
    # The oldest version that diffusers dispatches to. It is compiled against the installed torch: install that first,
    # then this extra with pip's --no-build-isolation.
    "flash": ["flash-attn>=2.6.3"],
    # Of its versions that are compiled for torch 2.11 and later the one that was tested first.
    "quantization": ["torchao>=0.18"],
    "wandb": ["wandb>=0.31"],
    "docs": ["mkdocs-material>=9.5"],
    # A minor version of ruff may change its rules.
    "test": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.17,<0.18", "wandb>=0.31", "markdown-it-py>=3"],
    # With a Chromium of the system: `pytest tests -m browser`.
    "browser": ["playwright>=1.50"],
}
EXTRAS_REQUIRE["test"] += EXTRAS_REQUIRE["serve"] + EXTRAS_REQUIRE["live"]
EXTRAS_REQUIRE["dev"] = EXTRAS_REQUIRE["test"] + EXTRAS_REQUIRE["browser"] + ["build>=1.2"]

setup(
    name="astrolabe_diffusers",
    version=VERSION,
    description="Online reinforcement learning and streaming generation for causal video models, native to diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion", "video generation", "autoregressive", "reinforcement learning", "lora", "diffusers"],
    packages=find_packages(include=["astrolabe_diffusers", "astrolabe_diffusers.*"]),
    package_data={"astrolabe_diffusers": ["assets/**", "recipes/**/*.yaml", "reporting/*.md", "live/page/**"]},
    # diffusers 0.42 needs it.
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={"console_scripts": ["astrolabe = astrolabe_diffusers.cli.main:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
