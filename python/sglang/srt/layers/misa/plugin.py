"""The entry point through which SGLang loads MISA into the launcher, the engine and every scheduler."""

from sglang.srt.layers.misa import process


def register() -> None:
    """Register the hooks; SGLang applies them once every plugin has registered its own.

    Raises:
        SystemExit: the hooks could not be registered in a process that was started with --enable-misa. SGLang would log
            any other exception and serve without them.
    """
    try:
        # Imported here, so that an import that fails is seen here too.
        from sglang.srt.layers.misa.patches import PATCHES
        from sglang.srt.plugins.hook_registry import HookRegistry

        for patch in PATCHES:
            HookRegistry.register(patch.target, patch.hook, patch.kind)
    except Exception as error:
        if process.requires_misa:
            raise SystemExit(
                f"--enable-misa: the plugin failed to load in {process.description()}: {error!r}"
            )
        raise
