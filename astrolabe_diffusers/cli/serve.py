"""`astrolabe serve`."""

import os
from dataclasses import dataclass
from typing import Any

from ..config import Config, option
from ..errors import UserError, as_user_error
from .arguments import ArgumentParser, command
from .options import parse_fields


@dataclass
class ServerConfig(Config):
    """Settings of a server. Checked when the object is made."""

    aliases = {"reward": "rewards"}
    removed = {"cache_size": "scores are computed anew"}

    rewards: list[str] = option([], "names of the rewards, comma-separated")
    reward_options: dict[str, dict[str, Any]] = option({}, "their arguments: name.argument=value,name.argument=value")
    device: str | None = option(None, "where their weights are, such as cuda:1; where each puts them if not given")
    host: str = option("127.0.0.1", "address to listen at; others than this machine's own need a token")
    port: int = option(8000, "port to listen at", minimum=1, maximum=65535)
    max_request_mb: int = option(1024, "larger requests are refused", minimum=1)
    max_batch: int = option(16, "videos of several clients that are scored together at most", minimum=1)
    max_waiting: int = option(64, "requests that may wait; a client asks again later", minimum=1)
    max_waiting_mb: int = option(4096, "... and the memory for them all, twice their size", minimum=1)
    max_connections: int = option(256, "connections at a time; further ones are closed", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.rewards:
            raise UserError("rewards is empty: name at least one to serve.")
        if self.max_waiting_mb < 2 * self.max_request_mb:
            raise UserError(
                f"max_waiting_mb={self.max_waiting_mb} is less than one request may take, twice max_request_mb="
                f"{self.max_request_mb}."
            )


@command
def main(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe serve",
        description="Serves rewards over HTTP. Without --host nothing but this machine reaches it; otherwise set "
        "ASTROLABE_REWARD_TOKEN here and for the run. The traffic is not encrypted.",
    )
    serve(ServerConfig(**parse_fields(parser, ServerConfig, argv)))


def serve(config: ServerConfig):
    """Answers until a signal comes."""
    with as_user_error("server"):
        from ..rewards.placement.remote import TOKEN_VARIABLE
        from ..rewards.placement.server import create_app
        from ..serving.binding import bind, check_binding
        from ..serving.bounded_protocol import ConnectionLimits, make_server
        from ..serving.running import run

        token = os.environ.get(TOKEN_VARIABLE)
        # Before the rewards, which may take minutes to load.
        listener = bind(config.host, config.port)
        check_binding(config.host, token, TOKEN_VARIABLE, ", here and for the runs")
    from ..rewards.placement.local import LocalRewards

    with as_user_error("rewards"):
        rewards = LocalRewards(config.rewards, config.reward_options, config.device)
    limits = ConnectionLimits(config.max_connections)
    sizes = (config.max_request_mb * 2**20, config.max_batch, config.max_waiting, config.max_waiting_mb * 2**20)
    with as_user_error("server"):
        server = make_server(create_app(rewards, token, *sizes, limits), limits)
        listener.listen()
    print(f"{', '.join(config.rewards)} at http://{config.host}:{config.port}", flush=True)
    run(server, listener)
