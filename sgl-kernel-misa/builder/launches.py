"""The host functions that take a kernel's arguments as an array, so that one call can launch several kernels."""

from typing import List, Mapping, Tuple

NAME = "launches"

# The types of a kernel's arguments, in the C ABI: what a pointer points at makes no difference. sgl_kernel_misa.library lays them out.
TYPES = {
    "pointer": "void*",
    "int32": "int32_t",
    "int64": "int64_t",
    "uint32": "uint32_t",
    "float32": "float",
    "float64": "double",
}

RUN = """
extern "C" int {name}_call({types}, void* stream);
static_assert({count} <= MAX_ARGUMENTS);
extern "C" int {name}_run(Values values, void* stream) {{
  return {name}_call({arguments}, stream);
}}
"""


def source(arguments: Mapping[str, List[Tuple[str, str]]]) -> str:
    """C++ with `<name>_run` of every kernel, and `launch_chain`.

    Args:
        arguments: those of every kernel, as of `builder.generate.Generated`.
    """
    text = '#include "launches.h"\n'
    for name, of_kernel in arguments.items():
        types = [TYPES[kind] for _, kind in of_kernel]
        text += RUN.format(
            name=name,
            count=len(types),
            types=", ".join(types),
            arguments=", ".join(
                f"argument<{kind}>(values, {place})" for place, kind in enumerate(types)
            ),
        )
    return text
