"""Streams that are watched and steered: sessions -> an engine that makes their blocks in turn -> a server, a page."""
