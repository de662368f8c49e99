"""For nbval: kernels that start at the same moment can draw the same port, and one of them never answers.

So they talk through files instead of ports, each in a folder of its own (Windows has no such files).
"""

import atexit
import shutil
import sys
import tempfile

import nbval.kernel
from jupyter_client.manager import KernelManager


def kernel_manager(**options) -> KernelManager:
    folder = tempfile.mkdtemp(prefix="kernel-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return KernelManager(transport="ipc", ip=f"{folder}/ipc", **options)


if sys.platform != "win32":
    nbval.kernel.KernelManager = kernel_manager
