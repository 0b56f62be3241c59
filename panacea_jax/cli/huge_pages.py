"""Memory of a process that computes on the CPU, in large pages that it keeps.

XLA's programs ask for their temporaries anew at every call. glibc maps blocks of that size each time and gives them back afterwards, so
that a step of training touches hundreds of thousands of pages of 4 KiB for the first time, which takes up to a third of it
(docs/memory.md).
"""

import os
import sys

# Pages of 2 MiB where Linux gives them on request (glibc 2.35 and newer), and blocks below 8 GiB are not given back.
TUNABLES = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={8 * 2**30}:glibc.malloc.trim_threshold={16 * 2**30}"


def in_huge_pages() -> None:
    """Start this process anew, once, with glibc set so: it reads ``GLIBC_TUNABLES`` at the start only.

    A ``GLIBC_TUNABLES`` of the user's own, an empty one too, stays as it is, and then nothing is started anew.
    """
    if "GLIBC_TUNABLES" in os.environ or "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", ()):
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
