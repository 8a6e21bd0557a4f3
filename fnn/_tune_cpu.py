"""`tune_cpu`: memory of large results is kept by the process instead of being fetched anew for each call."""

from __future__ import annotations

import os
import sys

import torch


def tune_cpu() -> bool:
    """Make the C library keep freed blocks of up to 32 MB, for this process and until it ends.

    glibc returns large blocks to the system when they are freed, and the next call pays for fresh pages: some tenths
    of a millisecond a MB, which can be half the time of a small Jacobian. After this call the blocks are reused.
    Numbers do not change; the resident set stays up to 64 MB larger. It helps programs that allocate blocks of 0.1
    to 32 MB over and over, and is of no use to any other.

    Returns True if it was done; False, with nothing changed, where there is nothing to do it to: elsewhere than on
    Linux with glibc, or where the environment already sets glibc's thresholds (`MALLOC_MMAP_THRESHOLD_` and others).

    Example:
        >>> import fnn
        >>> done = fnn.tune_cpu()
    """
    if not _is_adaptive():
        return False
    # glibc's own rule: when a block that was mapped by itself is freed, blocks up to its size, at most 32 MiB, are
    # no longer mapped by themselves, and up to twice its size stays with the process.
    block = torch.empty(int(31.9 * 2**20), dtype=torch.uint8)
    del block
    return True


def _is_adaptive() -> bool:
    """Whether the C library is glibc and adapts its thresholds: setting one of them turns that off."""
    if sys.platform != "linux":
        return False
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
    except ValueError:
        return False
    fixed = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    named = ("glibc.malloc.mmap_threshold", "glibc.malloc.trim_threshold", "glibc.malloc.top_pad", "malloc.mmap_max")
    return not any(name in os.environ for name in fixed) and not any(name in tunables for name in named)
