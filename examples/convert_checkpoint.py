"""Converts a published checkpoint to a Diffusers pipeline folder, or a published LoRA to a Diffusers LoRA."""

from astrolabe_diffusers.cli.convert import main


if __name__ == "__main__":
    raise SystemExit(main())
