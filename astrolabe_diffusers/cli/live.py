"""`astrolabe live`."""

import os
from urllib.parse import quote

from ..errors import as_user_error
from ..live.config import TOKEN_VARIABLE, LiveConfig
from .arguments import ArgumentParser, command
from .options import parse_fields


@command
def main(argv: list[str] | None):
    parser = ArgumentParser(
        prog="astrolabe live",
        description="Opens a page on which a video is made while it is watched, and follows what is typed. Without "
        f"--host nothing but this machine reaches it; otherwise set {TOKEN_VARIABLE}. The traffic is not encrypted.",
    )
    serve(LiveConfig(**parse_fields(parser, LiveConfig, argv)))


def serve(config: LiveConfig):
    """Answers until a signal comes."""
    token = os.environ.get(TOKEN_VARIABLE)
    with as_user_error("server"):
        from ..live.server import make_live_server
        from ..serving.binding import bind, check_binding
        from ..serving.running import leave_loaded_alone, run

        # Before the model, which may take minutes to load.
        listener = bind(config.host, config.port)
        check_binding("localhost" if config.public else config.host, token, TOKEN_VARIABLE)
    from ..live.load import load_live_app

    with load_live_app(config, token) as live:
        with as_user_error("server"):
            server = make_live_server(live, config.max_connections)
            listener.listen()
        query = f"?token={quote(token, safe='')}" if token else ""
        leave_loaded_alone()
        print(f"{live.model.name} at http://{config.host}:{config.port}/{query}", flush=True)
        run(server, listener)
