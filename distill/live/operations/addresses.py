"""Names and addresses of hosts."""

import ipaddress

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def host_name(host: str) -> str:
    """The name in a Host header, without its port and brackets."""
    name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
    return name.strip("[]").lower()


def is_address(name: str) -> bool:
    """Whether it is a numeric address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(name: str) -> bool:
    """Whether it is this machine's own address."""
    return name in LOOPBACK or (is_address(name) and ipaddress.ip_address(name).is_loopback)
