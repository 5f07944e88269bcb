"""A network namespace of this process's own: loopback, and an address that others could reach.

Without the second one a server that listens on "this machine's address" would pass for one that
listens on loopback.
"""

from __future__ import annotations

import ctypes
import fcntl
import shutil
import socket
import struct
import subprocess
import threading

CLONE_NEWNET = 0x40000000
OUTER_ADDRESS = "192.0.2.1"  # of RFC 5737, which nobody has
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def enter_private_network() -> bool:
    """Move this thread, and all that it starts from now on, into a new network namespace.

    False where the system does not allow it (not root): tests then run on the host's loopback.
    """
    assert threading.current_thread() is threading.main_thread()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh22x", b"lo", 0)
        answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, request)
        flags = struct.unpack("16sh22x", answer)[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | IFF_UP))
    if ip := shutil.which("ip"):
        for words in (
            f"address add {OUTER_ADDRESS}/24 dev lo",
            f"route add default dev lo src {OUTER_ADDRESS}",
        ):
            subprocess.run([ip, *words.split()], check=True)
    return True
