"""sglang-misa is installed beside any SGLang, works under its name there, and leaves nothing behind."""

import runpy
import shutil
import zipfile

import pytest
from environments import ROOT, VERSION, build

# One worker builds what is installed.
pytestmark = pytest.mark.xdist_group("packaging")

LAYER = ROOT / "python" / "sglang" / "srt" / "layers" / "misa"
SERVERS = ROOT / "python" / "sglang_misa"

SGLANG_WORKS = """
import sglang, sglang.srt.server_args, sglang.srt.layers.dense
assert sglang.__version__ == "0.5.17"
"""

# What SGLang does: a scheduler unpickles what is defined in the layer, then the plugin is found by its entry point.
MISA_WORKS = """
import pickle
plugin = pickle.loads(b"csglang.srt.layers.misa.plugin\\nregister\\n.")
from importlib.metadata import entry_points
(entry,) = entry_points(group="sglang.srt.plugins")
assert entry.load() is plugin and plugin.__module__ == entry.module
"""

NO_SGLANG = """
import importlib.util
assert importlib.util.find_spec("sglang") is None
"""


def check_both(environment):
    environment.python("-c", SGLANG_WORKS)
    environment.python("-c", MISA_WORKS)
    # As `python -m sglang.srt.layers.misa.doctor`, which takes torch.
    environment.python("-m", "sglang.srt.layers.misa.plugin")


@pytest.mark.parametrize("misa_form", ["wheel", "editable"])
@pytest.mark.parametrize("sglang_form", ["wheel", "path", "finder"])
def test_installed_after_sglang(environment, sglang, misa, sglang_form, misa_form):
    environment.install(sglang[sglang_form])
    environment.python("-c", SGLANG_WORKS)
    alone = environment.files()
    environment.install(misa[misa_form])
    check_both(environment)
    environment.uninstall("sglang-misa")
    assert environment.files() == alone
    environment.python("-c", SGLANG_WORKS)


@pytest.mark.parametrize("misa_form", ["wheel", "editable"])
@pytest.mark.parametrize("sglang_form", ["wheel", "path", "finder"])
def test_installed_before_sglang(environment, sglang, misa, sglang_form, misa_form):
    environment.install(misa[misa_form])
    assert environment.python("-c", NO_SGLANG) == ""
    alone = environment.files()
    environment.install(sglang[sglang_form])
    check_both(environment)
    environment.uninstall("sglang")
    assert environment.files() == alone
    assert environment.python("-c", NO_SGLANG) == ""


def test_an_empty_folder_of_the_same_name_is_not_the_layer(environment, sglang, misa):
    """Installations that put the layer into SGLang's own folder left one behind when they were removed."""
    environment.install(sglang["wheel"])
    (environment.site / "sglang/srt/layers/misa/__pycache__").mkdir(parents=True)
    environment.install(misa["wheel"])
    check_both(environment)


def test_starting_python_imports_one_small_module(environment, misa):
    modules = "import sys; print(*sys.modules)"
    before = environment.python("-c", modules).split()
    environment.install(misa["wheel"])
    after = environment.python("-c", modules).split()
    assert set(after) - set(before) == {"sglang_misa"}


def test_a_checkout_that_is_gone_disturbs_nobody(environment, sglang, checkout):
    """Python prints what a .pth file raises, at every start."""
    moved = shutil.copytree(checkout, environment.folder / "checkout")
    environment.install(sglang["wheel"])
    environment.install(build(moved, environment.folder / "out", "build_editable"))
    check_both(environment)
    shutil.rmtree(moved)
    assert environment.python("-c", SGLANG_WORKS) == ""
    gone = (
        "import importlib.util as u; assert not u.find_spec('sglang.srt.layers.misa')"
    )
    assert environment.python("-c", gone) == ""


def test_the_wheel_holds_the_layer_and_nothing_else(checkout, misa, tmp_path):
    """From a source archive too, and where an older build has left its files."""
    archive = build(checkout, tmp_path / "sdist", "build_sdist")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (source,) = tmp_path.glob("sglang_misa-*")
    old = source / "build" / "lib" / "sglang" / "srt" / "layers" / "misa"
    old.mkdir(parents=True)
    (old / "removed.py").touch()
    rebuilt = build(source, tmp_path / "wheel", "build_wheel")
    for wheel in (misa["wheel"], rebuilt):
        names = set(zipfile.ZipFile(wheel).namelist())
        layer = {
            f"sglang_misa/layer/{f.relative_to(LAYER)}" for f in LAYER.rglob("*.py")
        }
        own = {f"sglang_misa/{f.name}" for f in SERVERS.glob("*.py")}
        own.add("sglang_misa.pth")
        assert {name for name in names if ".dist-info/" not in name} == layer | own
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_kernels_that_it_asks_for_have_its_version(misa):
    version = runpy.run_path(str(ROOT / VERSION))["__version__"]
    with zipfile.ZipFile(misa["wheel"]) as wheel:
        metadata = wheel.read(f"sglang_misa-{version}.dist-info/METADATA").decode()
    assert f"\nVersion: {version}\n" in metadata
    assert f'\nRequires-Dist: sgl-kernel-misa=={version}; extra == "cuda"\n' in metadata


def test_the_kernels_have_that_version_and_the_same_licence(tmp_path):
    ignore = shutil.ignore_patterns("build", "lib", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "sgl-kernel-misa", tmp_path / "source", ignore=ignore)
    # Metadata alone: building the wheel would compile the kernels.
    made = build(
        tmp_path / "source", tmp_path / "out", "prepare_metadata_for_build_wheel"
    )
    version = runpy.run_path(str(ROOT / VERSION))["__version__"]
    assert made.name == f"sgl_kernel_misa-{version}.dist-info"
    licence = (made / "licenses" / "LICENSE").read_bytes()
    assert licence == (ROOT / "LICENSE").read_bytes()
