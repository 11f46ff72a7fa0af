"""WebSockets of a server that clients who do not read, or have gone without a word, cannot hold."""

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's protocol, for its setting `ws`, which waits for ever until a client has taken what it is sent."""

    # In which a client has to take what waits for it.
    seconds = 20.0
    _timer = None

    def pause_writing(self):
        super().pause_writing()
        self._timer = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        self._timer.cancel()

    def connection_lost(self, exc):
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def keepalive_timeout(self):
        # Closing would wait until it has read.
        self.transport.abort()
