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
        from sglang.srt.layers.misa.evaluation.patches import patches
        from sglang.srt.layers.misa.patches import PATCHES
        from sglang.srt.layers.misa.patching import register as register_patches

        register_patches([*PATCHES, *patches()])
    except Exception as error:
        if process.requires_misa:
            raise SystemExit(
                f"--enable-misa: the plugin failed to load in {process.description()}: {error!r}"
            )
        raise
