"""What errors of back-ends, of the host and of file systems are about."""

import errno
import os

import numpy as np
import pytest

from panacea_jax.errors import no_space, out_of_memory, out_of_reach


@pytest.mark.parametrize(
    ("error", "said"),
    [
        # As they were met in public reports: a GPU's allocator, old and new, a TPU's run and compilation, the CPU.
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes."), "running: 4.44 GiB were asked for"),
        (RuntimeError("RESOURCE_EXHAUSTED: Failed to allocate request for 176.00MiB (184549376B) on device ordinal 0"),
         "running: 0.17 GiB were asked for"),
        (RuntimeError("RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 4.88G. That was not possible. There are "
                      "3.05G free.; (0x0x0_HBM0)"), "running: 4.88 GiB were asked for"),
        (RuntimeError("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 9.08G of 7.48G "
                      "hbm. Exceeded hbm capacity by 1.60G."), "compiling: 9.08 GiB were asked for"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 107374182400 bytes."), "running: 100.00 GiB were asked for"),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"),
         "running: 7.45 GiB were asked for"),
        (MemoryError(), "running"),
        (RuntimeError("RESOURCE_EXHAUSTED: CompileTimeHbmOom"), "compiling"),
        (RuntimeError("INTERNAL: wug"), None),
        (ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"), None),
    ],
)  # fmt: skip
def test_memory(error, said):
    assert out_of_memory(error) == said
    outer = KeyError("x")
    outer.__cause__ = error
    assert out_of_memory(outer) == said


def test_memory_that_numpy_does_not_get():
    with pytest.raises(MemoryError) as error:
        np.ones(2**50)
    assert out_of_memory(error.value) == f"running: {2**23:.2f} GiB were asked for"


def test_files_that_are_gone_or_closed(tmp_path):
    ours, other = str(tmp_path / "run" / "x"), "/elsewhere/x"

    def of(number, file):
        return out_of_reach(OSError(number, os.strerror(number), file), [str(tmp_path / "run")])

    assert of(errno.EACCES, ours) == (ours, "Permission denied")
    assert of(errno.ENOENT, ours) == (ours, "No such file or directory")
    assert of(errno.EACCES, other) is None and of(errno.ENOENT, None) is None  # a defect of ours, perhaps
    assert of(errno.ESTALE, other) == (other, os.strerror(errno.ESTALE)) and of(errno.EIO, None) == ("", "Input/output error")
    late = ValueError(f'PERMISSION_DENIED: Error opening local file "{ours}": Permission denied')
    assert out_of_reach(late, [str(tmp_path)]) == (ours, "Permission denied")
    assert out_of_reach(ValueError(f'NOT_FOUND: Error reading local file "{ours}"'), [str(tmp_path)]) == (ours, "No such file or directory")
    assert out_of_reach(ValueError("Permission denied"), [str(tmp_path)]) is None


def test_a_limit_on_the_size_of_files_is_no_room():
    assert no_space(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/x")) == ("/x", "File too large")
