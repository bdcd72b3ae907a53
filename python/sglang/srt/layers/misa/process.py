"""What a process of SGLang's has to know about itself."""

import os

# Whether this process was handed arguments with --enable-misa.
requires_misa = False


def description() -> str:
    """This process in a message: its number and its title, which SGLang and Ray set to its role."""
    # Imported here: nothing but the standard library may keep the plugin from saying what is wrong.
    import setproctitle

    return f"process {os.getpid()} ({setproctitle.getproctitle()[:60]})"
