"""What the C library is told about large buffers, seen in a process of its own."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from phalanx.rpc.buffers import reuse_large_buffers

if "reuse" in sys.argv:
    assert reuse_large_buffers(heaps=1)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
meet = threading.Barrier(3)

def work():
    address = libc.malloc(1000)
    meet.wait(20)
    libc.free(address)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fclose.argtypes = [ctypes.c_void_p]
stream = libc.fopen(b"/dev/stdout", b"w")
libc.malloc_info(0, stream)
libc.fclose(stream)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.parametrize("how", ["reuse", "as it comes"])
def test_all_threads_share_one_heap(how):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=60
    )
    heaps = done.stdout.count("<heap nr=")
    assert heaps == 1 if how == "reuse" else heaps > 1
