"""Opens a page on which a video is made while it is watched, and follows what is typed.

    python examples/live.py --model tiny_shapes

Without `--host` nothing but this machine reaches it; otherwise set ASTROLABE_LIVE_TOKEN. `--help` lists the options.
"""

from astrolabe_diffusers.cli.live import main


if __name__ == "__main__":
    raise SystemExit(main())
