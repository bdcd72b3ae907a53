"""From a kernel in TileLang to CUDA: the device function as TileLang generates it, in host functions of our own."""

import re
from dataclasses import dataclass
from typing import List, Tuple

import tilelang
from tilelang import tvm
from tilelang.jit.adapter.wrapper import TLCUDASourceWrapper

from builder import Architecture
from builder.launches import TYPES

# The kernels place their barriers themselves and stay inside their tensors, so neither is added to them. Buffers in shared
# memory do not overlap: TileLang would place them by the barriers that it sees, and some are in the CUDA functions.
PASS_CONFIGS = {
    "tl.disable_shared_memory_reuse": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_safe_memory_legalize": True,
}

PORTABLE_CLUSTER = 8  # blocks that a cluster may have on every device

CUTLASS_INCLUDES = (
    "#include <cutlass/arch/barrier.h>\n#include <cutlass/cuda_host_adapter.hpp>\n"
)

MSVC = "#if defined(_MSC_VER)"  # TileLang's own text begins with it
WAIT = "cudaGridDependencySynchronize()"  # T.pdl_sync

INIT = """
#define ERROR_BUF_SIZE 1024
static char error_buf[ERROR_BUF_SIZE];

extern "C" const char* {name}_get_last_error() {{
    return error_buf;
}}

extern "C" int {name}_init() {{
    error_buf[0] = '\\0';
{attributes}    return 0;
}}
"""

LAUNCH = """\
    {{
        cudaLaunchConfig_t config = {{}};
        cudaLaunchAttribute attributes[2];
        config.attrs = attributes;
        config.stream = stream;
        config.gridDim = {grid};
        config.blockDim = {block};
        config.dynamicSmemBytes = {shared};
{attributes}        cudaLaunchKernelEx(&config, {function}, {arguments});
    }}
"""

CLUSTER = """\
        attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attributes[config.numAttrs++].val.clusterDim = {{{}, {}, {}}};
"""

OVERLAP = """\
        attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
"""


@dataclass(frozen=True)
class Generated:
    """A kernel as CUDA.

    Attributes:
        source: the device function and the host functions `<name>_call`, `<name>_init` and `<name>_get_last_error`.
        arguments: those of `<name>_call`, less the stream: (name, a type of `launches.TYPES`) in order.
    """

    source: str
    arguments: List[Tuple[str, str]]


class HostFunctions(TLCUDASourceWrapper):
    """TileLang's wrapper, with the kernel's name in the exported ones and launches as the kernels need them.

    TileLang lets every kernel start before the one ahead of it in the stream has finished (programmatic dependent launch).
    That is right only for a kernel that waits for it (T.pdl_sync); without the attribute the stream's order holds.
    """

    def __init__(self, name: str, prefers_shared: bool, **modules):
        self.name = name
        self.prefers_shared = prefers_shared
        self.launches: List[str] = []
        super().__init__(**modules)  # generates the code

    @property
    def arguments(self) -> List[Tuple[str, str]]:
        """As of `Generated`: the parameters, then the dimensions that are given at run time."""
        function = self.prim_func
        arguments = []
        for parameter in function.params:
            if parameter in function.buffer_map:
                buffer = function.buffer_map[parameter]
                arguments.append((buffer.data.name, "pointer"))
            else:
                arguments.append((parameter.name, str(parameter.dtype)))
        given = [name for name, _ in arguments]
        arguments += [
            (name, str(dtype))
            for name, dtype in self.get_dynamic_symbolic_set(function)
            if name not in given
        ]
        for argument, kind in arguments:
            if kind not in TYPES:
                raise RuntimeError(
                    f"{self.name}: the type of {argument}, {kind}, is not one of {', '.join(TYPES)}"
                )
        kinds = [kind == "pointer" for _, kind in arguments]
        if kinds != sorted(kinds, reverse=True):
            raise RuntimeError(
                f"{self.name}: the tensors must come before the numbers among a kernel's parameters"
            )
        return arguments

    def get_init_func(self) -> str:
        attributes = []
        for function, size in self.dynamic_smem_buf.items():
            if size is not None:
                attributes.append(
                    (function, "MaxDynamicSharedMemorySize", str(int(size)))
                )
            if self.prefers_shared:
                attributes.append(
                    (
                        function,
                        "PreferredSharedMemoryCarveout",
                        "cudaSharedmemCarveoutMaxShared",
                    )
                )
        checked = "".join(
            f"    TILELANG_CHECK(cudaFuncSetAttribute({function}, cudaFuncAttribute{attribute}, {value}));\n"
            for function, attribute, value in attributes
        )
        return INIT.format(name=self.name, attributes=checked)

    def get_kernel_launch_code(
        self, function_name, grid_str, block_str, smem_str, call_args, cluster_dims
    ) -> str:
        attributes = ""
        if cluster_dims is not None:
            x, y, z = cluster_dims
            if x * y * z > PORTABLE_CLUSTER:
                raise RuntimeError(
                    f"{self.name}: a cluster has at most {PORTABLE_CLUSTER} blocks, not {x * y * z}"
                )
            attributes += CLUSTER.format(x, y, z)
        waits = function_name in self.pdl_sync_map
        # What TileLang says of the function and the code that it generated for it agree, or neither is what it was.
        if waits != (WAIT in self.source):
            raise RuntimeError(
                f"{self.name}: T.pdl_sync is {'' if waits else 'not '}in the kernel, {WAIT} is "
                f"{'not ' if waits else ''}in its code"
            )
        if waits:
            attributes += OVERLAP
        launch = LAUNCH.format(
            grid=grid_str,
            block=block_str,
            shared=smem_str,
            attributes=attributes,
            function=function_name,
            arguments=call_args,
        )
        self.launches.append(launch)
        return launch

    def create_dispatch_func(self, code, function_informations) -> str:
        text = super().create_dispatch_func(code, function_informations)
        # One launch, the one above, with its result checked: TileLang writes another kind for some kernels, and may come
        # to write more than one.
        launches = re.findall(r"\bcudaLaunch\w*Kernel", text)
        if len(launches) != 1 or [text.count(code) for code in self.launches] != [1]:
            raise RuntimeError(f"{self.name}: the launch is not the one expected")
        _once(self.name, "TILELANG_CHECK_LAST_ERROR(", text)
        exported = 'extern "C" TL_EXPORT int call('
        _once(self.name, exported, text)
        parameters = text[text.index(exported) + len(exported) :].partition(") {\n")[0]
        have = [
            (part.rpartition(" ")[2], "*" in part) for part in parameters.split(", ")
        ]
        want = [(name, kind == "pointer") for name, kind in self.arguments]
        if have != [*want, ("stream=cudaStreamDefault", False)]:
            raise RuntimeError(
                f"{self.name}: the parameters of TileLang's host function are not those expected: {parameters}"
            )
        return text.replace(exported, f'extern "C" int {self.name}_call(')


def generate(name: str, kernel, architecture: Architecture) -> Generated:
    """The CUDA of a kernel.

    Args:
        name: the name under which the kernel is exported.
        kernel: an entry of `misa_kernels.KERNELS`.
        architecture: what to generate it for.

    Raises:
        RuntimeError: what TileLang generates is not what is expected, or the kernel's parameters do not suit a launch.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": architecture.name})
    configs = {**PASS_CONFIGS, **kernel.pass_configs}
    with tvm.transform.PassContext(opt_level=3, config=configs), target:
        # The device function takes its name from the prim_func's: two kernels of one factory must not share it.
        function = kernel.build().with_attr("global_symbol", name)
        artifact = tilelang.lower(function, target=target)
    host = HostFunctions(
        name,
        kernel.prefers_shared,
        scheduled_ir_module=tvm.IRModule({name: function}),
        source=_device_source(name, artifact.kernel_source),
        target=target,
        device_mod=artifact.device_mod,
        host_mod=artifact.host_mod,
        pass_configs=configs,
    )
    return Generated(host.lib_code, host.arguments)


def _device_source(name: str, source: str) -> str:
    """What TileLang generates for the device, with other includes."""
    # Text from T.import_source comes first and may lack the newline that a preprocessor line must end with.
    _once(name, MSVC, source)
    imported = source[: source.index(MSVC)]
    if imported and not imported.endswith("\n"):
        source = source.replace(MSVC, f"\n{MSVC}")
    # This header defines functions that are not inline: two objects that include it cannot be linked.
    debug = _include("debug.h")
    _once(name, debug, source)
    if "debug_print" not in source and "device_assert" not in source:
        source = source.replace(debug, "")
    # CUTLASS's GEMM templates take most of the time that a kernel takes to compile. Without a call of them, all that is
    # needed of this header is the small ones that it includes.
    gemm = _include("gemm.h")
    _once(name, gemm, source)
    if not re.search(r"\btl::gemm_", source):
        source = source.replace(gemm, _include("intrin.h") + CUTLASS_INCLUDES)
    return source


def _include(header: str) -> str:
    return f"#include <tl_templates/cuda/{header}>\n"


def _once(name: str, text: str, source: str) -> None:
    """Raise unless the text is in what TileLang generated for the kernel `name`, once."""
    count = source.count(text)
    if count != 1:
        raise RuntimeError(
            f"{name}: TileLang generated {count} times, not once: {text.strip()}"
        )
