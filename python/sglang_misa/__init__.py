"""Lets Python find the layer under its name in SGLang, `sglang.srt.layers.misa`, wherever SGLang itself is installed.

It cannot be installed under that name: a folder `sglang` in site-packages hides an SGLang that is installed with `pip install
-e`. So it is installed as `sglang_misa.layer`, is never imported as that, and the finder below answers for it. `sglang_misa.pth`
imports this module at every start of the interpreter, because a scheduler unpickles objects of the layer before it loads
plugins. So nothing else is imported here, SGLang least of all.

Beside the layer and not in it: `server` and `client`, with which the tests, the demo and the benchmarks start and ask SGLang. What
only asks a server, by its URL, needs no SGLang.
"""

import sys


class LayerFinder:
    """Finds `sglang.srt.layers.misa`; Python finds the modules in it by its path."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The spec of the layer, or None for any other name, and where the layer is gone."""
        if name != "sglang.srt.layers.misa":
            return None
        from importlib.util import find_spec, spec_from_file_location

        layer = find_spec("sglang_misa.layer")
        return layer and spec_from_file_location(
            name,
            layer.origin,
            submodule_search_locations=layer.submodule_search_locations,
        )


# First, so that an empty folder of this name in SGLang, left by an older installation, is not taken for the layer.
sys.meta_path.insert(0, LayerFinder)
