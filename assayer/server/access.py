"""Who may reach the server: the address that it listens on, and the token that it wants."""

import ipaddress
import os
import stat

from assayer.errors import UsageError
from assayer.files import printable

__all__ = ["is_loopback", "read_token"]

# Characters of a token, at least.
TOKEN_MIN = 16


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def read_token(path: str) -> str:
    """The token in a file: its first line.

    Raises:
        UsageError: it cannot be read, is open to other users, or holds no token.
    """
    try:
        with open(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--token_file {printable(path)} cannot be read: {reason}") from None
    if stat.S_ISREG(mode) and mode & 0o077:
        raise UsageError(f"--token_file {printable(path)} can be read by other users; chmod 600 {printable(path)}")
    if len(token) < TOKEN_MIN or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            f"--token_file {printable(path)} must hold a token of at least {TOKEN_MIN} letters, digits and signs in its first line"
        )
    return token
