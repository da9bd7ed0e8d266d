"""Every choice of a service, in one place: the flags of `faithdiff serve` are made of these fields.

Nothing here imports JAX or a web framework, so that help and wrong flags need not wait for them.
"""

import dataclasses
import ipaddress

from faithdiff_jax.config import Range
from faithdiff_jax.errors import InputError
from faithdiff_jax.inference.about import check_each, option

SHORTEST_TOKEN = 8
PATIENCE = 10
"""Seconds for which a sender may pause, or begin slowly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceOptions:
    """Where a service listens, whom it answers, and how much it takes on.

    Raises:
        InputError: values of another type or out of their range, all of them at once.
    """

    host: str = option("127.0.0.1", "address to listen at; as it is, programs of this machine alone reach it")
    port: int = option(8000, "port to listen at; 0 for any that is free", within=Range(0, 65535))
    token: str | None = option(
        None,
        f"whoever asks must send this, {SHORTEST_TOKEN} characters or more; better given as FAITHDIFF_TOKEN in the "
        "environment, which other users of the machine do not see",
        kind=str,
    )
    queue: int = option(
        64, "pictures that may wait; others are sent away with the time to wait", within=Range(1, 10000)
    )
    max_bytes: int = option(2**25, "bytes of a request, the picture among them", within=Range(2**10, 2**32))
    min_rate: int = option(
        2**17,
        f"bytes a second, on average after {PATIENCE} seconds, below which whoever sends a picture loses its place",
        within=Range(1, 2**32),
    )
    max_pixels: int = option(2**24, "pixels of a picture as it is given", within=Range(2**6, 2**27))
    max_result_pixels: int = option(2**25, "pixels of a restored picture", within=Range(2**6, 2**28))
    keep: int = option(3600, "seconds for which results are kept", within=Range(1, 10**7))
    kept: int = option(256, "results that are kept; one more removes the oldest", within=Range(1, 10**6))
    drain: int = option(
        600,
        "seconds after SIGTERM in which pictures that wait are finished; the rest is handed back",
        within=Range(0, 10**6),
    )
    linger: int = option(
        30, "seconds after the last of them in which results not fetched yet can be fetched", within=Range(0, 10**6)
    )

    def __post_init__(self) -> None:
        faults = check_each(self)
        if self.token is not None and (len(self.token) < SHORTEST_TOKEN or not _plain(self.token)):
            faults.append(f"token: must be {SHORTEST_TOKEN} or more printable ASCII characters without blanks")
        if not self.host.strip():
            faults.append(f"host is {self.host!r}: must not be empty")
        if faults:
            raise InputError("; ".join(faults))

    @property
    def loopback(self) -> bool:
        """Whether nothing but this machine reaches the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False


def _plain(text: str) -> bool:
    return all("!" <= letter <= "~" for letter in text)
