"""Which network addresses a judge may live at. Pure; the connection asks it about every address it is about to use."""

from __future__ import annotations

import ipaddress
from typing import Literal, TypeAlias

Scope: TypeAlias = Literal["loopback", "private", "public"]
"""loopback: this machine alone. public: the internet alone. private: the internet and private networks."""

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
SHARED = ipaddress.IPv4Network("100.64.0.0/10")  # carrier-grade NAT (RFC 6598); ipaddress does not call it private
METADATA = frozenset(
    ipaddress.ip_address(address)
    for address in ("169.254.169.254", "169.254.170.2", "fd00:ec2::254", "fd20:ce::254", "100.100.100.200")
)
"""Where clouds hand out their machines' credentials."""


def scope_of(host: str, *, is_private: bool) -> Scope:
    """The scope of an endpoint whose URL names `host`."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host.lower() == "localhost"
    if is_loopback:
        return "loopback"
    return "private" if is_private else "public"


def address_problem(text: str, *, scope: Scope) -> str | None:
    """Why this address must not be connected to; None where it may.

    Args:
        text: an IP address, as a resolver gives it.
        scope: where the endpoint is declared to live.
    """
    try:
        address = _innermost(ipaddress.ip_address(text))
    except ValueError:
        return "it is not an IP address"
    if address in METADATA:
        return "it is a cloud's metadata service"
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        return "it is link-local, multicast or unspecified"
    if scope == "loopback":
        return None if address.is_loopback else "it is not this machine, as the endpoint's URL says"
    if address.is_loopback:
        return "it is this machine, though the endpoint's URL names another"
    if address.is_private or address in SHARED:
        return None if scope == "private" else "it is in a private network, and the endpoint is not declared private"
    return None if address.is_global else "it is reserved"


def _innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to: a check of the outer address alone could be walked around."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.scope_id is not None:
        raise ValueError("an address with a zone")
    teredo = address.teredo
    inner = address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)
    if inner is None and address in NAT64:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return inner or address
