"""What one check of `fnn doctor` found."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    status: "ok"; "warn" where something is slower than it could be, or missing; "fail" where training would stop with
    an error. `cure` says what to do about it; where the status is "ok" it is only an offer.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    cure: str = ""
