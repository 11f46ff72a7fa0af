"""The routes of a server: the page, its WebSocket, and files over HTTP for those who are let in."""

import json
from pathlib import Path

from .app import LiveApp


try:
    from fastapi import APIRouter, FastAPI, Request, WebSocket
    from fastapi.responses import FileResponse, JSONResponse, Response
    from fastapi.staticfiles import StaticFiles

    from ..serving.bounded_protocol import ConnectionLimits, make_server
    from ..serving.bounded_websocket import BoundedWebSocket
    from .viewer import POLICY_VIOLATION, Viewer
except ImportError as error:
    raise ImportError(
        f"the live page needs FastAPI and websockets ({error}): pip install 'astrolabe_diffusers[live]'"
    ) from error


PAGE = Path(__file__).parent / "page"
MAX_MESSAGE = 2**16
# Connections beyond those of viewers, for the page's files, recordings and /health.
HTTP_CONNECTIONS = 8
HEADERS = {
    # Nothing is from elsewhere, and what a viewer types runs nowhere.
    "Content-Security-Policy": (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "worker-src 'self' blob:; connect-src 'self' ws: wss:; object-src 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # An address may have the token.
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


router = APIRouter()


@router.get("/health")
async def health(request: Request):
    """Without a token."""
    return {"status": "ok", "sessions": request.app.state.live.engine.running}


@router.get("/")
async def page():
    return FileResponse(PAGE / "index.html")


@router.get("/recordings/{name}.mp4")
async def recording(request: Request, name: str, token: str | None = None):
    live: LiveApp = request.app.state.live
    if not live.knows(token):
        return JSONResponse({"error": "no token, or a wrong one"}, 401)
    if name not in live.recordings:
        return JSONResponse({"error": "there is no such recording, or not any more"}, 404)
    return FileResponse(live.recordings[name], media_type="video/mp4", filename="astrolabe.mp4")


@router.get("/sessions/{name}.json")
async def session(request: Request, name: str, token: str | None = None):
    """Of a viewer who is there. Not over the WebSocket, where pictures and pings would wait behind a large one."""
    live: LiveApp = request.app.state.live
    if not live.knows(token):
        return JSONResponse({"error": "no token, or a wrong one"}, 401)
    record = next((viewer.session.record() for viewer in live.viewers if viewer.name == name and viewer.session), None)
    if record is None:
        return JSONResponse({"error": "there is no such session, or not any more"}, 404)
    headers = {"Content-Disposition": f'attachment; filename="session-{record["seed"]}.json"'}
    return Response(json.dumps(record, indent=1), media_type="application/json", headers=headers)


@router.websocket("/ws")
async def connect(websocket: WebSocket, token: str | None = None):
    live: LiveApp = websocket.app.state.live
    host = websocket.headers.get("host", "")
    if not live.serves(host) or not live.is_own(websocket.headers.get("origin"), host):
        await websocket.close()  # before it was accepted: status 403
        return
    await websocket.accept()
    viewer = Viewer(websocket, live)
    if not live.knows(token):
        await viewer.leave("this server wants its token: open the page by the address that has it", POLICY_VIOLATION)
        return
    if len(live.viewers) >= websocket.app.state.max_viewers:
        text = f"{len(live.viewers)} pages are open already, and there may be no more: reload it later"
        await viewer.leave(text, POLICY_VIOLATION)
        return
    await viewer.run()


def create_app(live: LiveApp, max_viewers: int) -> FastAPI:
    """The ASGI application of a server; the context of `live` has to be entered."""
    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(title="astrolabe_diffusers live", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.live, app.state.max_viewers = live, max_viewers
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=PAGE), name="static")

    @app.middleware("http")
    async def check_host(request: Request, call_next):
        if not live.serves(request.headers.get("host", "")):
            return JSONResponse({"error": "this server has another name"}, 403)
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    return app


def make_live_server(live: LiveApp, max_connections: int = 64, ping_seconds: float = 5.0):
    """The uvicorn server of it, with bounds for messages and for connections, of viewers and a few more. That a viewer
    has gone without a word is found out after three times `ping_seconds`."""
    return make_server(
        create_app(live, max_connections),
        ConnectionLimits(max_connections + HTTP_CONNECTIONS),
        ws=BoundedWebSocket,
        ws_max_size=MAX_MESSAGE,
        # Frames are compressed, and windows of compression are memory of each connection.
        ws_per_message_deflate=False,
        ws_ping_interval=ping_seconds,
        ws_ping_timeout=2 * ping_seconds,
    )
