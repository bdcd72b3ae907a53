"""Loads the compiled kernels and launches them.

The library has a C ABI, and `manifest.json` beside it says what is in it. Nothing is loaded before the first launch or
`check_device`.
"""

import ctypes
import functools
import itertools
import json
import struct
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import torch

LIB = Path(__file__).parent / "lib"

# Shapes of which an operation keeps its chain. A step calls it with the same ones in every layer.
SHAPES = 64

# How an argument is laid out, in 8 bytes: struct checks its range.
_TYPES = {
    "pointer": "Q",
    "int32": "i4x",
    "int64": "q",
    "uint32": "I4x",
    "float32": "f4x",
    "float64": "d",
}


class _Launch(ctypes.Structure):
    """As in include/launches.h; `values` and `places` are arrays."""

    _fields_ = [
        ("run", ctypes.c_void_p),
        ("values", ctypes.c_char_p),
        ("places", ctypes.c_char_p),
        ("pointers", ctypes.c_int32),
        ("arguments", ctypes.c_int32),
    ]


class _Kernel:
    """One kernel on one device.

    cudaFuncSetAttribute holds for a device, so every device needs its own `init`, and so its own object.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        name: str,
        arguments: List[Tuple[str, str]],
        device: int,
    ):
        self.name = name
        self.device = device
        # The tensors come before the numbers: the builder sees to that.
        self.tensors = [argument for argument, kind in arguments if kind == "pointer"]
        self.pointers = set(self.tensors)
        self.numbers = {
            argument: _TYPES[kind] for argument, kind in arguments if kind != "pointer"
        }
        layout = "".join(_TYPES[kind] for _, kind in arguments)
        self._pack = struct.Struct("<" + layout).pack
        run = getattr(library, f"{name}_run")
        self.address = ctypes.cast(run, ctypes.c_void_p).value
        self._init = getattr(library, f"{name}_init")
        self._last_error = getattr(library, f"{name}_get_last_error")
        self._last_error.restype = ctypes.c_char_p
        self.ready = False

    def prepare(self) -> None:
        """Set the kernel's attributes, once; its device is the current one."""
        if not self.ready:
            if self._init():
                raise self.failure()
            self.ready = True

    def values(self, numbers: Mapping[str, float]) -> bytes:
        """The arguments as `<name>_run` takes them, with room for the pointers.

        Raises:
            struct.error: a number is of the wrong type or out of its type's range.
        """
        return self._pack(*[0] * len(self.tensors), *(numbers[x] for x in self.numbers))

    def failure(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} on cuda:{self.device}: {self._last_error().decode()}"
        )


class _Loaded(NamedTuple):
    """What a device launches with: its kernels by name, and `launch_chain` of include/launches.h."""

    kernels: Dict[str, _Kernel]
    launch_chain: Callable[..., int]


# The devices that have been used, by their indices.
_devices: Dict[int, _Loaded] = {}


def launch(name: str, /, **arguments: Union[torch.Tensor, int, float]) -> None:
    """Launch a kernel on the current stream of its tensors' device.

    Shapes and dtypes are not checked here: that is the caller's part.

    Args:
        name: a kernel of the library.
        arguments: all of the kernel's arguments as the manifest names them: tensors, all on one CUDA device, and numbers.

    Raises:
        TypeError: an argument is missing, unknown, of the wrong type or out of its type's range, or a tensor is on another
            device than the first.
        RuntimeError: the kernel is not in the library, the device is not supported (see `check_device`) or the launch
            failed.
    """
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    if not tensors:
        raise TypeError(f"{name}: there is no tensor among the arguments")
    numbers = tuple(item for item in arguments.items() if item[0] not in tensors)
    _single(name, tuple(tensors), numbers)(*tensors.values())


@functools.lru_cache(maxsize=1024)
def _single(
    name: str, tensors: Tuple[str, ...], numbers: Tuple[Tuple[str, float], ...]
) -> "Chain":
    return Chain(tensors, Step(name, dict(numbers)))


class Step(NamedTuple):
    """One launch of a chain.

    Attributes:
        kernel: its name in the library.
        numbers: the arguments that are no tensors.
        renamed: the tensors that the chain has under another name than the kernel, and that name.
    """

    kernel: str
    numbers: Mapping[str, float]
    renamed: Mapping[str, str] = {}


class Chain:
    """Launches, one after the other, for an operation that is called again with the same numbers: one call of the library.

    The first call on a device checks everything. Later ones check what device the tensors are on.
    """

    def __init__(
        self,
        tensors: Tuple[str, ...],
        *steps: Step,
        inside: Mapping[str, Tuple[str, int]] = {},
    ):
        """
        Args:
            tensors: their names, in the order in which a call gives them.
            inside: other names for the steps' tensors: a tensor, and the bytes from its start.
        """
        self.tensors, self.steps, self.inside = tensors, steps, inside
        self._pointers = ctypes.c_uint64 * len(tensors)
        self._bound: Dict[int, Callable[[Any, int], int]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the tensors' device.

        Raises:
            TypeError, RuntimeError: as `launch`.
        """
        device = tensors[0].get_device()
        run = self._bound.get(device)
        if run is None or set(map(torch.Tensor.get_device, tensors)) != {device}:
            run = self._bound[device] = self._bind(tensors)
        pointers = self._pointers(*map(torch.Tensor.data_ptr, tensors))
        if torch.cuda.current_device() == device:
            failed = run(pointers, torch._C._cuda_getCurrentRawStream(device))
        else:
            with torch.cuda.device(device):
                failed = run(pointers, torch._C._cuda_getCurrentRawStream(device))
        if failed:
            kernel = self.steps[failed - 1].kernel
            raise _devices[device].kernels[kernel].failure()

    def _bind(self, tensors: Tuple[torch.Tensor, ...]) -> Callable[[Any, int], int]:
        """Check everything; returns what launches the chain, given the tensors' addresses and a stream.

        Every step of a server with a new shape comes here: what is wrong with a chain is found out where something is.
        """
        device = tensors[0].get_device()
        loaded = _devices.get(device)
        if loaded is None:
            if device < 0:
                kernels = ", ".join(step.kernel for step in self.steps)
                raise TypeError(
                    f"{kernels}: the kernels take CUDA tensors, not {_what(tensors[0])}"
                )
            loaded = _load(device)
        places = {name: (i, 0) for i, name in enumerate(self.tensors)}
        for name, (tensor, offset) in self.inside.items():
            places[name] = (self.tensors.index(tensor), offset)
        launches = (_Launch * len(self.steps))()
        used = {tensor for tensor, _ in self.inside.values()}
        try:
            fits = len(tensors) == len(self.tensors)
            fits = fits and {tensor.get_device() for tensor in tensors} == {device}
            for step, launch in zip(self.steps, launches):
                kernel = loaded.kernels[step.kernel]
                names = [step.renamed.get(name, name) for name in kernel.tensors]
                used.update(names)
                fits = fits and len(step.numbers) == len(kernel.numbers)
                fits = fits and step.renamed.keys() <= kernel.pointers
                launch.values = kernel.values(step.numbers)
                flat = itertools.chain.from_iterable(places[name] for name in names)
                launch.places = struct.pack(f"<{2 * len(names)}q", *flat)
                launch.pointers = len(names)
                launch.arguments = len(names) + len(kernel.numbers)
                launch.run = kernel.address
        except (AttributeError, KeyError, struct.error):
            fits = False
        if not fits or used != places.keys():
            given = dict(zip(self.tensors, tensors, strict=True))
            raise self._mismatch(loaded, given, device)
        if not all(loaded.kernels[step.kernel].ready for step in self.steps):
            with torch.cuda.device(device):
                for step in self.steps:
                    loaded.kernels[step.kernel].prepare()
        return functools.partial(loaded.launch_chain, launches, len(launches))

    def _mismatch(
        self, loaded: _Loaded, given: Dict[str, torch.Tensor], device: int
    ) -> Exception:
        """What the kernels ask for and the chain has not, what it has and they do not use, and what is of the wrong kind."""
        wrong = []
        used = {tensor for tensor, _ in self.inside.values()}
        for step in self.steps:
            kernel = loaded.kernels.get(step.kernel)
            if kernel is None:
                known = ", ".join(loaded.kernels)
                return RuntimeError(
                    f"there is no kernel {step.kernel} in the library; it has {known}"
                )
            names = {step.renamed.get(name, name) for name in kernel.tensors}
            used |= names
            missing = names - given.keys() - self.inside.keys()
            missing |= kernel.numbers.keys() - step.numbers.keys()
            unknown = step.numbers.keys() - kernel.numbers.keys()
            unknown |= step.renamed.keys() - kernel.pointers
            wrong += [f"{name} is missing" for name in sorted(missing)]
            wrong += [f"{name} is unknown" for name in sorted(unknown)]
            for name, layout in kernel.numbers.items():
                try:
                    struct.pack(layout, step.numbers.get(name, 0))
                except struct.error as error:
                    wrong.append(f"{name} is {_what(step.numbers[name])}: {error}")
        for name, value in given.items():
            if name not in used:
                wrong.append(f"{name} is unknown")
            if not isinstance(value, torch.Tensor) or value.get_device() != device:
                wrong.append(f"{name} is {_what(value)}, not a tensor on cuda:{device}")
        wrong += [f"{name} is unknown" for name in self.inside.keys() - used]
        kernels = ", ".join(step.kernel for step in self.steps)
        return TypeError(f"{kernels}: {'; '.join(wrong)}")


def check_device(device: Optional[Union[torch.device, str, int]] = None) -> None:
    """Raise unless the kernels can run on a device; loads the library.

    Args:
        device: a CUDA device; the current one by default.

    Raises:
        RuntimeError: there is no CUDA device, its architecture is not supported, or the library is missing.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("sgl-kernel-misa needs a CUDA device, and torch finds none.")
    asked = torch.device("cuda" if device is None else device)
    if asked.type != "cuda":
        raise RuntimeError(f"sgl-kernel-misa runs on CUDA devices, not on {asked}.")
    index = torch.cuda.current_device() if asked.index is None else asked.index
    if index not in _devices:
        _load(index)


def _load(device: int) -> _Loaded:
    """The kernels for a device, from the library of its architecture."""
    capability = torch.cuda.get_device_capability(device)
    manifest = _manifest()
    for entry in manifest.values():
        if tuple(entry["capability"]) == capability:
            library = _library(entry["library"])
            _devices[device] = _loaded(library, entry["kernels"], device)
            return _devices[device]
    supported = ", ".join(
        "{}.{}".format(*entry["capability"]) for entry in manifest.values()
    )
    raise RuntimeError(
        f"sgl-kernel-misa does not support cuda:{device}, {torch.cuda.get_device_name(device)}: its compute capability "
        f"is {capability[0]}.{capability[1]}, and there are kernels for {supported}."
    )


def _loaded(
    library: ctypes.CDLL, kernels: Dict[str, List[Tuple[str, str]]], device: int
) -> _Loaded:
    launch_chain = library.launch_chain
    launch_chain.argtypes = [
        ctypes.POINTER(_Launch),
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.c_void_p,
    ]
    of_device = {
        name: _Kernel(library, name, arguments, device)
        for name, arguments in kernels.items()
    }
    return _Loaded(of_device, launch_chain)


@functools.lru_cache(maxsize=None)
def _manifest() -> Dict[str, Dict[str, Any]]:
    return json.loads(_file("manifest.json").read_text())


@functools.lru_cache(maxsize=None)
def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_file(name)))


def _file(name: str) -> Path:
    path = LIB / name
    if not path.exists():
        raise RuntimeError(
            f"sgl-kernel-misa has no compiled kernels: {path} does not exist. "
            "Build them in the repository: pip install --no-build-isolation --no-deps ./sgl-kernel-misa"
        )
    return path


def _what(value: Any) -> str:
    return (
        f"a tensor on {value.device}"
        if isinstance(value, torch.Tensor)
        else repr(value)
    )
