"""The build of the kernels, which needs no GPU: where it runs, what it tries first, and what it expects of TileLang."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

tilelang = pytest.importorskip("tilelang", reason="the kernels are built with TileLang")

from tilelang.jit.adapter import wrapper

from builder import ARCHITECTURES, FUNCTIONS, LAUNCH_CHAIN, ROOT
from builder.compile import find_nvcc
from builder.generate import HostFunctions, generate
from misa_kernels import KERNELS

PARTS = shutil.ignore_patterns("build", "lib", "*.egg-info", "__pycache__")
SMALL = "update_pooled_keys_int32"
# For the kernel ahead, with T.pdl_sync.
WAITS, DOES_NOT_WAIT = "threshold_128", "sample"


def build(sources: Path, *options: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "build_kernels.py", *options],
        cwd=sources,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_in_a_folder_with_a_space_and_quotes(tmp_path):
    """The sources, the headers of TileLang and nvcc all lie in such a folder, as where .venv is in the checkout."""
    folder = tmp_path / 'it\'s a "folder"'
    sources = folder / "sgl-kernel-misa"
    shutil.copytree(ROOT, sources, ignore=PARTS)
    packages = folder / "packages"
    packages.mkdir()
    for package in Path(tilelang.__file__).parent.parent.glob("tilelang*"):
        (packages / package.name).symlink_to(package)
    (folder / "cuda").symlink_to(find_nvcc().parent.parent)
    nvcc = folder / "cuda" / "bin" / "nvcc"

    done = build(sources, "--only", SMALL, NVCC=str(nvcc), PYTHONPATH=str(packages))
    assert done.returncode == 0, done.stdout

    lib = sources / "python" / "sgl_kernel_misa" / "lib"
    assert sorted(path.name for path in lib.iterdir()) == ["manifest.json", "sm90a.so"]
    assert list(
        json.loads((lib / "manifest.json").read_text())["sm90a"]["kernels"]
    ) == [SMALL]
    library = ctypes.CDLL(str(lib / "sm90a.so"))
    for function in (f"{SMALL}_{name}" for name in FUNCTIONS):
        assert getattr(library, function)
    assert getattr(library, LAUNCH_CHAIN)
    with pytest.raises(AttributeError):
        getattr(library, f"{SMALL}_call")


def test_the_linker_is_tried_before_the_kernels_are_compiled(tmp_path):
    sources = tmp_path / "sgl-kernel-misa"
    shutil.copytree(ROOT, sources, ignore=PARTS)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    log = tmp_path / "log"
    nvcc.write_text(f"""#!/bin/sh
echo "$@" >> '{log}'
case "$*" in *-shared*) echo "cannot link"; exit 1;; esac
exec '{find_nvcc()}' "$@"
""")
    nvcc.chmod(0o755)

    done = build(sources, NVCC=str(nvcc))
    assert done.returncode != 0 and "cannot link" in done.stdout, done.stdout
    compiled = [line for line in log.read_text().splitlines() if "-c " in line]
    assert ["probe.cu" in line or "launches.cu" in line for line in compiled] == [
        True
    ] * 2


def test_the_same_tilelang_is_named_everywhere():
    named = [
        re.findall(r"tilelang==([\d.]+)", (ROOT / name).read_text())
        for name in ("pyproject.toml", "build-requirements.txt")
    ]
    assert named == [[tilelang.__version__]] * 2


def generated(name):
    return generate(name, KERNELS[name], ARCHITECTURES["sm90a"])


def host_code(name):
    source = generated(name).source
    return source[source.index("#define ERROR_BUF_SIZE") :]


OVERLAPS = "programmaticStreamSerializationAllowed = 1"


def test_only_kernels_that_wait_overlap_the_one_ahead():
    assert OVERLAPS in host_code(WAITS)
    assert OVERLAPS not in host_code(DOES_NOT_WAIT)


def test_the_arguments_are_those_of_the_host_function():
    arguments = generated(SMALL).arguments
    assert arguments == [
        ("keys", "pointer"),
        ("scales", "pointer"),
        ("slots", "pointer"),
        ("pooled_keys", "pointer"),
        ("pages", "int32"),
        ("tokens", "int32"),
    ]


@pytest.mark.parametrize("name", [WAITS, DOES_NOT_WAIT])
@pytest.mark.parametrize(
    "template",
    ["KERNEL_LAUNCH_FUNC_CODE", "KERNEL_CLUSTER_LAUNCH_FUNC_CODE", "PREDEF_INIT_FUNC"],
)
def test_how_tilelang_writes_a_launch_does_not_matter(monkeypatch, name, template):
    expected = host_code(name)
    monkeypatch.setattr(wrapper, template, "another spelling")
    assert host_code(name) == expected


def in_host_function(old, new):
    """TileLang's host function is spelled in another way."""

    def mutate(monkeypatch):
        assert wrapper.PREDEF_HOST_FUNC.count(old) == 1
        text = wrapper.PREDEF_HOST_FUNC.replace(old, new)
        monkeypatch.setattr(wrapper, "PREDEF_HOST_FUNC", text)

    return mutate


def in_device_code(old, new):
    """TileLang's device code is spelled in another way."""

    def mutate(monkeypatch):
        lower = tilelang.lower

        def lower_to_another(*args, **kwargs):
            artifact = lower(*args, **kwargs)
            assert old in artifact.kernel_source
            artifact.kernel_source = artifact.kernel_source.replace(old, new)
            return artifact

        monkeypatch.setattr(tilelang, "lower", lower_to_another)

    return mutate


def in_dispatch(mutate_text):
    """TileLang writes another body of the host function."""

    def mutate(monkeypatch):
        dispatch = wrapper.TLCUDASourceWrapper.create_dispatch_func
        monkeypatch.setattr(
            wrapper.TLCUDASourceWrapper,
            "create_dispatch_func",
            lambda self, *args: mutate_text(dispatch(self, *args)),
        )

    return mutate


def without_the_attribute_of_pdl(monkeypatch):
    """TileLang marks a kernel with T.pdl_sync in another way."""
    parse = HostFunctions.parse_source_information

    def parse_without(self):
        parse(self)
        self.pdl_sync_map.clear()

    monkeypatch.setattr(HostFunctions, "parse_source_information", parse_without)


def with_launches_of_its_own(monkeypatch):
    """TileLang asks another method for the launch."""
    method = wrapper.TLCUDASourceWrapper.get_kernel_launch_code
    monkeypatch.setattr(HostFunctions, "get_kernel_launch_code", method)


def cooperative(monkeypatch):
    """A kernel that TileLang launches without asking for the launch's code."""
    parse = HostFunctions.parse_source_information

    def parse_cooperative(self):
        parse(self)
        self.use_cooperative_groups = dict.fromkeys(self.use_cooperative_groups, True)

    monkeypatch.setattr(HostFunctions, "parse_source_information", parse_cooperative)


MUTATIONS = {
    "another name of call": in_host_function("int call(", "int run("),
    "another spelling of call": in_host_function("int call(", "int call ("),
    "another kind of export": in_host_function("TL_EXPORT ", ""),
    "a parameter more": in_host_function("call({}", "call({}, int more"),
    "a parameter first": in_host_function("call({}", "call(int first, {}"),
    "two calls": in_dispatch(lambda text: text + text),
    "two launches": in_dispatch(
        lambda text: text.replace(
            "\tTILELANG_CHECK", "cudaLaunchKernelExC();\n\tTILELANG_CHECK"
        )
    ),
    "another check of the launch": in_dispatch(
        lambda text: text.replace("TILELANG_CHECK_LAST_ERROR", "CHECK")
    ),
    "a launch that is edited": in_dispatch(
        lambda text: text.replace(
            "SerializationAllowed = 1", "SerializationAllowed = 2"
        )
    ),
    "its own launch": with_launches_of_its_own,
    "a cooperative launch": cooperative,
    "no attribute of T.pdl_sync": without_the_attribute_of_pdl,
    "another wait": in_device_code("cudaGridDependencySynchronize()", "wait()"),
    "another first line": in_device_code("#if defined(_MSC_VER)", "#ifdef _MSC_VER"),
    "another debug header": in_device_code("tl_templates/cuda/debug.h", "debug.h"),
    "another GEMM header": in_device_code("tl_templates/cuda/gemm.h", "gemm.h"),
    "a header twice": in_device_code(
        "#include <tl_templates/cuda/gemm.h>\n",
        "#include <tl_templates/cuda/gemm.h>\n" * 2,
    ),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
def test_other_code_of_tilelang_is_refused(monkeypatch, mutate):
    generated(WAITS)
    mutate(monkeypatch)
    with pytest.raises(RuntimeError, match=f"{WAITS}: "):
        generated(WAITS)


def test_a_kernel_that_waits_by_another_name_is_refused(monkeypatch):
    """The other direction: code that waits, in a kernel that is not known to."""
    in_device_code('extern "C"', '// cudaGridDependencySynchronize()\nextern "C"')(
        monkeypatch
    )
    with pytest.raises(RuntimeError, match=f"{DOES_NOT_WAIT}: T.pdl_sync"):
        generated(DOES_NOT_WAIT)
