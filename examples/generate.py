"""Generates many videos, on all processes of `accelerate launch`, and writes each as MP4 while it is generated.

    accelerate launch examples/generate.py --prompts prompts.txt --model FOLDER_OR_HUB_ID --output_dir videos

The same command again makes what is missing.
"""

from astrolabe_diffusers.cli.generate import main


if __name__ == "__main__":
    raise SystemExit(main())
