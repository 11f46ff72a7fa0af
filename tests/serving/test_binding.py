"""Where a server may listen, and what with a token."""

import pytest

from astrolabe_diffusers.serving.binding import bind, check_binding


def test_addresses_that_cannot_be_listened_at():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError, match="cannot listen at 127.0.0.1:.*: Address already in use"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="there is no address 'no such host'"):
        bind("no such host", 8000)


def test_a_token_that_no_header_can_have():
    with pytest.raises(ValueError, match="MY_TOKEN holds a blank, a line break or another character"):
        check_binding("127.0.0.1", "two\nlines", "MY_TOKEN")


def test_only_this_machine_is_served_without_a_token():
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_binding(host, None, "MY_TOKEN")
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ValueError, match=f"{host} can be reached from elsewhere: set MY_TOKEN, here and there"):
            check_binding(host, None, "MY_TOKEN", ", here and there")
        check_binding(host, "secret", "MY_TOKEN")
