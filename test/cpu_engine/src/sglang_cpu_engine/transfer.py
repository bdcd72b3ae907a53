# SPDX-License-Identifier: Apache-2.0
"""What Mooncake does between a prefill and a decode server, for two of one machine."""

import ctypes
import os

_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)
_libc = ctypes.CDLL(None, use_errno=True)


class _Bytes(ctypes.Structure):
    """`struct iovec`."""

    _fields_ = [("address", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class TransferEngine:
    """In place of SGLang's `MooncakeTransferEngine`: its sessions are processes of this machine."""

    def __init__(self, hostname: str, gpu_id=None, ib_device=None):
        self.session_id = f"{hostname}:{os.getpid()}"
        # Where a process may write to its children alone, others are allowed to write to this one.
        _libc.prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)

    def get_session_id(self) -> str:
        return self.session_id

    def batch_register(self, addresses: list[int], lengths: list[int]) -> int:
        return 0

    def batch_deregister(self, addresses: list[int]) -> int:
        return 0

    def batch_transfer_sync(
        self,
        session_id: str,
        sources: list[int],
        targets: list[int],
        lengths: list[int],
    ) -> int:
        """Copy bytes of this process to the addresses `targets` of the session's.

        Raises:
            OSError: they could not be written.
        """
        process = int(session_id.rpartition(":")[2])
        for source, target, length in zip(sources, targets, lengths):
            here, there = _Bytes(source, length), _Bytes(target, length)
            written = _libc.process_vm_writev(
                process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0
            )
            if written != length:
                raise OSError(ctypes.get_errno(), f"wrote {written} of {length} bytes")
        return 0
