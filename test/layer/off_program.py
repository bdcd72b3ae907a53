"""What a program without --enable-misa sees of ServerArgs, with and without the plugin: one line of JSON a case.

Each case is a pair: the other plugin that replaces ServerArgs ("none", or loaded "before" or "after" MISA's), and whether
MISA's plugin is installed. `test_off` compares the cases.
"""

import copy
import dataclasses
import inspect
import json
import multiprocessing
import os
import pickle
import sys

import msgspec.structs

import sglang.srt.layers.attention.dsa.dsa_indexer  # the plugin imports it: here once for all cases
import sglang.srt.server_args
from sglang.srt import plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

ServerArgs = sglang.srt.server_args.ServerArgs
# A dataclass in 0.5.17, a record of msgspec's in 0.5.23; both modules have `asdict`, `fields` and `replace`.
IS_DATACLASS = dataclasses.is_dataclass(ServerArgs)
RECORDS = dataclasses if IS_DATACLASS else msgspec.structs


class OtherArgs(ServerArgs):
    """The class of another plugin."""

    other: int = 3


if IS_DATACLASS:
    OtherArgs = dataclasses.dataclass(OtherArgs)


def register_other():
    HookRegistry.register(
        "sglang.srt.server_args.ServerArgs", OtherArgs, HookType.REPLACE
    )


def seen(args):
    return {
        "class": f"{type(args).__module__}.{type(args).__qualname__}",
        "fields": RECORDS.asdict(args),
        "repr": repr(args),
    }


def spawned(args):
    """Another process sees the same arguments before and after its plugins load."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_send_seen, args=(args, theirs))
    child.start()
    theirs.close()
    answer = ours.recv()
    child.join()
    return answer


def _send_seen(args, pipe):
    before = seen(args)
    plugins.load_plugins()
    pipe.send([before, seen(args)])


WAYS = {
    "as it is": lambda args: args,
    "pickled": lambda args: pickle.loads(pickle.dumps(args)),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "replaced": lambda args: RECORDS.replace(args, port=1),
}


def case(other, misa):
    registered = {"other": (register_other, None)} if other != "none" else {}
    if misa:
        from sglang.srt.layers.misa.plugin import register

        ours = {"misa": (register, None)}
        registered = (
            {**registered, **ours} if other == "before" else {**ours, **registered}
        )
    plugins.load_plugins_by_group = lambda *_, **__: registered

    def create(**values):
        return sglang.srt.server_args.ServerArgs(
            model_path="dummy", random_seed=1, **values
        )

    before = create()
    plugins.load_plugins()
    found = {}
    ways = dict(WAYS)
    if other == "none" and misa:
        ways["spawned"] = spawned
    for name, args in (("before", before), ("after", create(tp_size=2))):
        for way, do in ways.items():
            try:
                result = do(args)
                found[f"{name}, {way}"] = (
                    result if way == "spawned" else [seen(result)] * 2
                )
            except Exception as error:
                found[f"{name}, {way}"] = repr(error)
    try:
        create(no_such_argument=1)
    except TypeError as error:
        found["an unknown argument"] = str(error)
    cls = sglang.srt.server_args.ServerArgs
    found["signature"] = str(inspect.signature(cls))
    found["fields"] = [field.name for field in RECORDS.fields(cls)]
    from sglang.srt.entrypoints.engine import Engine

    of_engine = Engine.server_args_class(model_path="dummy", random_seed=1)
    found["of the engine"] = seen(of_engine)
    return found


if __name__ == "__main__":
    for other in ("none", "before", "after"):
        for misa in (False, True):
            sys.stdout.flush()
            if pid := os.fork():
                os.waitpid(pid, 0)
                continue
            print(json.dumps([other, misa, case(other, misa)], default=str))
            sys.stdout.flush()
            os._exit(0)
