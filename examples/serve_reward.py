"""Serves rewards over HTTP for training runs on other machines, or for several processes of one.

    python examples/serve_reward.py --rewards sharpness,dynamic_degree --port 8000

A run then has `--rewards sharpness=1 --reward_placement sharpness=http://127.0.0.1:8000`. Without `--host` nothing but
this machine reaches it; otherwise set ASTROLABE_REWARD_TOKEN here and for the run. The traffic is not encrypted.
`--help` lists the options.
"""

from astrolabe_diffusers.cli.serve import main


if __name__ == "__main__":
    raise SystemExit(main())
