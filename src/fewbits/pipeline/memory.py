"""Large tensors of the same few sizes come and go all through a walk.

The C library gives each of them fresh pages from the system and takes them back, and zeroing pages cost a tenth of a
calibrated run. Told to keep what is freed, it hands the same pages out again.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


def keep_freed_memory(limit: int = 1 << 30) -> bool:
    """Serve allocations up to ``limit`` bytes from memory that stays with the process. False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(key, value) for key, value in ((M_MMAP_THRESHOLD, limit), (M_TRIM_THRESHOLD, limit)))
