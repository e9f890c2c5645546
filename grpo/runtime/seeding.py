"""One run seed -> every other seed, by name. No global state: a step's randomness does not depend on its past."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the thing called `names`, such as (seed, "rollout", step).

    Hashed, not added: neighbouring steps or rows must not share random streams.
    """
    text = "/".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
