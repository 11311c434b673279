"""Refuse a bad command line, and print --help, before the seconds that importing torch takes.

A program imports this first. If it is the one being run, its main is called in a world where torch and the other
libraries are stand-ins, and only as far as its call of support.config.parse. Then all of that is forgotten, and the
program begins in earnest.
"""

import builtins
import contextlib
import importlib
import io
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARIES = ("torch", "numpy", "tiktoken", "tqdm")


class _StandIn(type):
    """The type of what stands for a library and anything in it: a base class, a function, a decorator, a constant."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn("StandIn", (), {})

    def __call__(cls, *_, **__):
        return cls

    __or__ = __ror__ = __getitem__ = __call__


class _IsFine(BaseException):
    """What `parse` raises here instead of returning."""


def check() -> None:
    """Exit as the program would for a bad command line or --help; else leave no trace."""
    def parse(cls, argv=None, presets=None, doc="", base=None):
        if base and any(arg.startswith(("--resume", "--init")) or arg == "--preset" for arg in sys.argv):
            raise _IsFine  # what the flags add to lies in a file
        theirs = [arg.partition("=")[2] for arg in sys.argv if arg.startswith("--preset=")]
        sizes = ("gpt2", "tiny") if base else ()  # is there a GPU? which data?
        for more in [[f"--preset={size},{''.join(theirs[-1:])}"] for size in sizes] or [[]]:
            try:
                with contextlib.redirect_stderr(io.StringIO()) as errors:
                    real(cls, [*sys.argv[1:], *more], presets, doc)
                raise _IsFine
            except SystemExit as leave:
                if not leave.code:  # --help
                    raise
        print(errors.getvalue(), end="", file=sys.stderr)
        sys.exit(2)

    main = sys.modules["__main__"]
    name = main.__spec__.name if main.__spec__ else os.path.basename(main.__file__).removesuffix(".py")
    known, imports, library = set(sys.modules), builtins.__import__, _StandIn("Library", (), {})
    builtins.__import__ = lambda name, *args, **options: \
        library if name.split(".")[0] in LIBRARIES else imports(name, *args, **options)
    try:
        config = importlib.import_module("support.config")
        real, config.parse = config.parse, parse
        importlib.import_module(name).main()
    except (_IsFine, Exception):  # or it cannot live among stand-ins: heard in earnest
        pass
    finally:
        builtins.__import__ = imports
        for module in set(sys.modules) - known:  # ours; the standard library's may stay
            if str(getattr(sys.modules[module], "__file__", "")).startswith(ROOT + os.sep):
                del sys.modules[module]


if "torch" not in sys.modules:
    check()
