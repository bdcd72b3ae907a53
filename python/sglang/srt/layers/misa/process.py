"""What a process of SGLang's has to know about itself."""

import os

import setproctitle

# Whether this process was handed arguments with --enable-misa.
requires_misa = False


def description() -> str:
    """This process in a message: its number and its title, which SGLang and Ray set to its role."""
    return f"process {os.getpid()} ({setproctitle.getproctitle()[:60]})"
