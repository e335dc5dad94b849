"""Large tensors of the same few sizes come and go all through a walk.

The C library gives each of them fresh pages from the system and takes them back, and zeroing pages cost a tenth of a
calibrated run. Told to keep what is freed, it hands the same pages out again. That is for activations: whole weights of
large models, of other sizes from layer to layer, would only pile up (an 8 GB model rounded to nearest peaked at 3.4 GB
in place of 2.3), so the largest tensors go back to the system, and runs without calibration are left alone.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


LARGEST = 64 << 20


def keep_freed_memory(limit: int = LARGEST) -> bool:
    """Serve allocations up to ``limit`` bytes from memory that stays with the process. False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(key, value) for key, value in ((M_MMAP_THRESHOLD, limit), (M_TRIM_THRESHOLD, 8 * limit)))
