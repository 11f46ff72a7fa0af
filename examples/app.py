"""The live page as a Hugging Face Space: a copy of this file is its `app.py`.

Whoever opens the Space may type. Viewers take turns, and see their place in the queue. In the Space's requirements is
`astrolabe_diffusers[live]`; another model is a folder or a Hub id.
"""

from astrolabe_diffusers.cli.live import main


if __name__ == "__main__":
    raise SystemExit(main(["--model", "tiny_shapes", "--host", "0.0.0.0", "--public", "true", "--sessions", "2"]))
