"""`python -m sglang.srt.layers.misa.doctor`: does MISA fit the SGLang that is installed here?"""

import sys

import torch

from sglang.srt.plugins import load_plugins


def main() -> int:
    load_plugins()
    from sglang.srt.layers.misa.patches import PATCHES, problems
    from sglang.version import __version__

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"sglang {__version__}, torch {torch.__version__}, {device}\n")
    for patch in PATCHES:
        state = "ok" if patch.engaged() else "FAILED"
        print(f"{state:7}{patch.kind.value:8} {patch.target}\n{'':16}{patch.reason}")
    found = problems()
    print("\nMISA is ready." if not found else "\n" + "\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
