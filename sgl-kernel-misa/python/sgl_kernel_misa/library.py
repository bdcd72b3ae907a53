"""Loads the compiled kernels and launches them.

The library has a C ABI, and `manifest.json` beside it says what is in it. Nothing is loaded before the first launch or
`check_device`.
"""

import ctypes
import functools
import json
import struct
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch

LIB = Path(__file__).parent / "lib"

# Shapes of which an operation keeps its launches. A step calls it with the same ones in every layer.
SHAPES = 64

# How an argument is passed, and how its range is checked: ctypes cuts integers down without a word, struct does not.
_TYPES = {
    "pointer": (ctypes.c_void_p, ""),
    "int32": (ctypes.c_int32, "i"),
    "int64": (ctypes.c_int64, "q"),
    "uint32": (ctypes.c_uint32, "I"),
    "float32": (ctypes.c_float, "f"),
    "float64": (ctypes.c_double, "d"),
}


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
        self._tensors = [argument for argument, kind in arguments if kind == "pointer"]
        self._numbers = {
            argument: _TYPES[kind][1]
            for argument, kind in arguments
            if kind != "pointer"
        }
        # With one name an itemgetter returns no tuple. Every kernel has several tensors and several numbers.
        self._get_tensors = itemgetter(*self._tensors)
        self._get_numbers = itemgetter(*self._numbers)
        self._check = struct.Struct("".join(self._numbers.values())).pack
        self._call = getattr(library, f"{name}_call")
        self._call.argtypes = [_TYPES[kind][0] for _, kind in arguments] + [
            ctypes.c_void_p
        ]
        self._init = getattr(library, f"{name}_init")
        self._last_error = getattr(library, f"{name}_get_last_error")
        self._last_error.restype = ctypes.c_char_p
        self._ready = False

    def launch(self, arguments: Dict[str, Any]) -> None:
        try:
            tensors = self._get_tensors(arguments)
            numbers = self._get_numbers(arguments)
            self._check(*numbers)
            launched = len(tensors) + len(numbers) == len(arguments)
            launched = launched and self.run(tensors, numbers)
        except (KeyError, TypeError, struct.error) as error:
            raise self._mismatch(arguments) from error
        if not launched:
            raise self._mismatch(arguments)

    def places(self, names: Tuple[str, ...]) -> Callable[[Tuple], Tuple]:
        """What puts tensors that are given in the order of `names` into the kernel's own."""
        return itemgetter(*map(names.index, self._tensors))

    def values(self, numbers: Dict[str, Any]) -> Tuple:
        """The numbers in the kernel's own order."""
        return self._get_numbers(numbers)

    def run(self, tensors: Tuple[torch.Tensor, ...], numbers: Tuple) -> bool:
        """Launch with arguments in the kernel's own order; False if a tensor is on another device."""
        device = self.device
        if set(map(torch.Tensor.get_device, tensors)) != {device}:
            return False
        if torch.cuda.current_device() == device:
            self._run(tensors, numbers)
        else:
            with torch.cuda.device(device):
                self._run(tensors, numbers)
        return True

    def _run(self, tensors: Tuple[torch.Tensor, ...], numbers: Tuple) -> None:
        if not self._ready:
            if self._init():
                raise self._failure()
            self._ready = True
        pointers = map(torch.Tensor.data_ptr, tensors)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if self._call(*pointers, *numbers, stream):
            raise self._failure()

    def _failure(self) -> RuntimeError:
        return RuntimeError(
            f"{self.name} on cuda:{self.device}: {self._last_error().decode()}"
        )

    def _mismatch(self, arguments: Dict[str, Any]) -> TypeError:
        """What is wrong with a launch's arguments, one by one."""
        names = [*self._tensors, *self._numbers]
        wrong = [f"{name} is missing" for name in names if name not in arguments]
        wrong += [f"{name} is unknown" for name in arguments if name not in names]
        tensors = [name for name in self._tensors if name in arguments]
        numbers = [name for name in self._numbers if name in arguments]
        for name in tensors:
            value = arguments[name]
            if not isinstance(value, torch.Tensor) or value.get_device() != self.device:
                wrong.append(
                    f"{name} is {_what(value)}, not a tensor on cuda:{self.device}"
                )
        for name in numbers:
            try:
                struct.pack(self._numbers[name], arguments[name])
            except (struct.error, TypeError) as error:
                wrong.append(f"{name} is {_what(arguments[name])}: {error}")
        return TypeError(f"{self.name}: {'; '.join(wrong)}")


# The kernels of the devices that have been used: by the device's index, then by name.
_kernels: Dict[int, Dict[str, _Kernel]] = {}


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
    for value in arguments.values():
        if isinstance(value, torch.Tensor):
            device = value.get_device()
            break
    else:
        raise TypeError(f"{name}: there is no tensor among the arguments")
    kernels = _kernels.get(device)
    if kernels is None:
        if device < 0:
            raise TypeError(
                f"{name}: the kernels take CUDA tensors, not {_what(value)}"
            )
        kernels = _load(device)
    kernel = kernels.get(name)
    if kernel is None:
        raise RuntimeError(
            f"there is no kernel {name} in the library; it has {', '.join(kernels)}"
        )
    kernel.launch(arguments)


class Launch:
    """A launch of a kernel with numbers that are given beforehand, for an operation that is called again with the same ones.

    The first call on a device checks everything, as `launch` does. Later ones check what device the tensors are on.
    """

    def __init__(self, name: str, tensors: Tuple[str, ...], /, **numbers: float):
        """
        Args:
            name: a kernel of the library.
            tensors: the names of its tensors, in the order in which a call gives them.
            numbers: the kernel's other arguments.
        """
        self.name, self.tensors, self.numbers = name, tensors, numbers
        self._bound: Dict[int, Tuple[_Kernel, Callable, Tuple]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Launch on the current stream of the tensors' device.

        Raises:
            TypeError, RuntimeError: as `launch`.
        """
        device = tensors[0].get_device()
        if bound := self._bound.get(device):
            kernel, places, values = bound
            if kernel.run(places(tensors), values):
                return
        given = dict(zip(self.tensors, tensors, strict=True))
        launch(self.name, **given, **self.numbers)
        kernel = _kernels[device][self.name]
        values = kernel.values(self.numbers)
        self._bound[device] = kernel, kernel.places(self.tensors), values


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
    if index not in _kernels:
        _load(index)


def _load(device: int) -> Dict[str, _Kernel]:
    """The kernels for a device, from the library of its architecture."""
    capability = torch.cuda.get_device_capability(device)
    manifest = _manifest()
    for entry in manifest.values():
        if tuple(entry["capability"]) == capability:
            library = _library(entry["library"])
            _kernels[device] = {
                name: _Kernel(library, name, arguments, device)
                for name, arguments in entry["kernels"].items()
            }
            return _kernels[device]
    supported = ", ".join(
        "{}.{}".format(*entry["capability"]) for entry in manifest.values()
    )
    raise RuntimeError(
        f"sgl-kernel-misa does not support cuda:{device}, {torch.cuda.get_device_name(device)}: its compute capability "
        f"is {capability[0]}.{capability[1]}, and there are kernels for {supported}."
    )


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
