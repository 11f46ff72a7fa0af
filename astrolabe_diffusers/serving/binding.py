"""Where a server listens, and who may reach it there."""

import ipaddress
import socket
from contextlib import suppress
from urllib.parse import urlsplit


def check_key(key: str, name: str):
    """`ValueError` unless a header can hold the key `name`."""
    if not all("!" <= c <= "~" for c in key):
        raise ValueError(f"{name} holds a blank, a line break or another character that no header can have.")


def is_loopback(host: str) -> bool:
    """Whether an address, or the name of one, is of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_this_machine(host: str) -> bool:
    """Whether `Host` of a request is a name of this machine alone. Without a token no other is to be answered: a page
    of elsewhere can have its own name mean this machine."""
    with suppress(ValueError):
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    return False


def check_binding(host: str, token: str | None, variable: str, also: str = ""):
    """`ValueError` if others than this machine could ask the server without a token, or none could send the token.
    The environment's `variable` holds it; `also` says where it is set beside here."""
    if token:
        check_key(token, variable)
    elif not is_loopback(host):
        raise ValueError(f"a server on {host} can be reached from elsewhere: set {variable}{also}.")


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet; `OSError` or `ValueError` if there cannot be one."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"there is no address {host!r}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    # As everywhere: so that a server can be started anew at once.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror}") from None
    return listener
