"""Refuse a bad command line, and print --help, before the seconds that importing torch takes.

A program imports this first. If it is the one being run, its main is called in a world where torch and the other
libraries are stand-ins, and only as far as its call of support.config.parse. Then all of that is forgotten, and the
program begins in earnest.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import io
import os
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIBRARIES = ("torch", "numpy", "tiktoken", "tqdm")


class _Anything(type):
    """The type of a stand-in: a class to derive from, a function, a decorator, a constant, a module's attribute."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_, **__):
        return cls

    __or__ = __ror__ = __getitem__ = __call__


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import the libraries, and any part of them, as modules in which every name is a stand-in."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in LIBRARIES else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: _Anything("Anything", (), {})
        return module

    def exec_module(self, module):
        pass


class _IsFine(BaseException):
    """What `parse` raises here instead of returning."""


def check() -> None:
    """Exit as the program would for a bad command line or --help; else leave no trace."""
    def parse(cls, argv=None, presets=None, doc="", base=None):
        theirs = [arg.partition("=")[2] for arg in sys.argv if arg.startswith("--preset=")][-1:]
        if base and any(arg.startswith(("--resume", "--init", "--preset ")) for arg in sys.argv):
            raise _IsFine  # what the flags add to lies in a file
        for size in ("gpt2,", "tiny,") if base else ("",):  # without torch nobody knows whether there is a GPU
            more = [f"--preset={size}{theirs[0] if theirs else ''}"] if base else []
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
    name = main.__spec__.name if main.__spec__ else main.__file__.rpartition("/")[2].removesuffix(".py")
    known, finder = set(sys.modules), _StandIns()
    sys.meta_path.insert(0, finder)
    from support import config
    real, config.parse = config.parse, parse
    try:
        importlib.import_module(name).main()
    except (_IsFine, Exception):  # or a program that cannot live among stand-ins: it is heard in earnest
        pass
    finally:
        sys.meta_path.remove(finder)
        for module in set(sys.modules) - known:  # ours and the stand-ins; the standard library's may stay
            if module.split(".")[0] in LIBRARIES or str(getattr(sys.modules[module], "__file__", "")).startswith(ROOT):
                del sys.modules[module]


if "torch" not in sys.modules and os.path.abspath(getattr(sys.modules["__main__"], "__file__", "/")).startswith(ROOT):
    check()
