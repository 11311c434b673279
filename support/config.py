"""Turn dataclasses into one flat, typed command line.

Every file owns one dataclass: its fields are the flags, the comment behind a field is the flag's help. A config may
nest other configs; their flags are flat all the same, so `--wbits=8` sets `config.quant.wbits`:

    @dataclass
    class TrainConfig:
        "The training loop."
        max_iters: int = 1000  # optimizer steps
        quant: QuantConfig = field(default_factory=QuantConfig)

Values come from the defaults, then from each preset of `--preset=a,b` from left to right, then from the flags. `-` and
`_` are equal, abbreviations are refused, a ValueError of a `__post_init__` is one line and exit code 2.
"""

import argparse
import difflib
import dis
import inspect
import re
import sys
import typing
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path


def _owners(cls: type) -> dict[str, type]:
    """Map every flag to the dataclass that declares it (perhaps a base class), cls first; a name may be used once."""
    owners = {}
    for f in sorted(fields(cls), key=lambda f: is_dataclass(f.default_factory)):
        found = _owners(f.default_factory) if is_dataclass(f.default_factory) else \
            {f.name: next(c for c in cls.__mro__ if f.name in inspect.get_annotations(c))}
        for name in found.keys() & owners:
            raise AssertionError(f"flag --{name} is defined by {found[name].__name__} and {owners[name].__name__}")
        owners |= found
    return owners


def refuse_idle(config: typing.Any, **needs: tuple[bool, str]) -> None:
    """Refuse flags that differ from their defaults but have no effect: a typo would otherwise look like a result.

    A flag needs a condition, and words for its absence: wgran=(self.wbits < 32, "without --wbits below 32").
    """
    for name, (active, reason) in needs.items():
        value = getattr(config, name)
        if not active and value != type(config).__dataclass_fields__[name].default:
            raise ValueError(f"--{name}={value} has no effect {reason}; drop it or add that")


def refuse_unfit(config: typing.Any, cause: str, why: str, **allowed: tuple) -> None:
    """Refuse values that do not go with that of `cause`: refuse_unfit(self, "wfmt", "FP8 has 8 bits", wbits=(8,))."""
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            raise ValueError(f"--{name}={value} does not fit --{cause}={getattr(config, cause)}: {why}; "
                             f"use --{name}={' or '.join(map(str, values))}, or another --{cause}")


def build(cls: type, values: dict) -> typing.Any:
    """Build the nested config `cls` from flat values; what is not named keeps its default, a wrong name is refused."""
    for name in sorted(values.keys() - _owners(cls)):
        raise ValueError(f"unknown option {name!r} for {cls.__name__}; was it written by another version?")
    parts = {f.name: own(f.default_factory, values) for f in fields(cls)
             if is_dataclass(f.default_factory)}
    for name, hint in typing.get_type_hints(cls).items():
        if name in values:
            if not _fits(hint, values[name]):
                raise ValueError(f"{name}={values[name]!r} is no value of this option of {cls.__name__}")
            parts[name] = values[name]
    return cls(**parts)


def own(cls: type, flat: dict) -> typing.Any:
    """Build `cls` from those of the flat values that are its flags, as a checkpoint's config has them."""
    return build(cls, {name: flat[name] for name in _owners(cls) if name in flat})


def _fits(hint: typing.Any, value: typing.Any) -> bool:
    """Tell whether a value, perhaps from a damaged checkpoint, is of a field's type."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if kind is tuple:
        return type(value) is tuple and all(type(v) is options[0] for v in value)
    if options:  # a union
        return any(_fits(option, value) for option in options)
    return type(value) is hint or hint is float and type(value) is int


def flatten(config: typing.Any) -> dict:
    """Return the flat {flag: value} of a nested config: plain Python values, the inverse of `build`."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value) if is_dataclass(value) else {f.name: value}
    return flat


def differences(config: typing.Any) -> dict:
    """Return the flat values of `config` that differ from the defaults of its class."""
    defaults = flatten(type(config)())
    return {k: v for k, v in flatten(config).items() if v != defaults[k]}


def _bool(text: str) -> bool:
    """Read True or False (argparse's own `bool` takes every non-empty string for True)."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: use True or False")
    return text.lower() in ("true", "1")


def _ints(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of integers: "0,11" -> (0, 11), "" -> ()."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: use integers with commas, as 0,11") from None


def _argument(hint: typing.Any) -> dict:
    """Return argparse's keywords for a type hint: str, int, float, bool, tuple of ints, Literal, or X | None."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        names = "|".join(map(str, options))
        return {"type": type(options[0]), "choices": options, "metavar": f"{{{names}}}"}
    if kind is tuple:
        return {"type": _ints, "metavar": "I,J"}
    if hint is bool:
        return {"type": _bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    if not options:
        return {"type": hint, "metavar": hint.__name__.upper()}
    inner = _argument(options[0])
    read, choices = inner["type"], inner.pop("choices", ())

    def optional(text: str) -> typing.Any:
        value = None if text.lower() in ("none", "auto") else read(text)
        if choices and value not in (None, *choices):
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(choices)}, auto)")
        return value
    optional.__name__ = read.__name__  # argparse's messages say "invalid int value"
    return inner | {"type": optional, "metavar": inner["metavar"].replace("}", "|auto}")}


def _parser(cls: type, presets: dict[str, dict], doc: str) -> argparse.ArgumentParser:
    """Build the argparse parser: one group of flags per dataclass, in the order of the files."""
    parser = argparse.ArgumentParser(
        usage=f"python {Path(sys.argv[0]).name} [--flag=value ...]  (--help lists every flag)",
        formatter_class=argparse.RawDescriptionHelpFormatter, description=doc, allow_abbrev=False,
        argument_default=argparse.SUPPRESS)
    owners = _owners(cls)
    for owner in dict.fromkeys(owners.values()):
        file = Path(sys.modules[owner.__module__].__file__).name
        group = parser.add_argument_group(f"{file}: {inspect.getdoc(owner).rstrip('.')}")
        hints = typing.get_type_hints(owner)
        helps = dict(re.findall(r"(?m)^    (\w+): .*?  # (.*)$", inspect.getsource(owner)))
        for f in fields(owner):
            if owners.get(f.name) is not owner:  # a nested config, or a flag of a base class
                continue
            default = "auto" if f.default is None else f.default
            text = f"{helps.get(f.name, '')} [{default}]".replace("%", "%%")
            if f.name == "preset" and presets:
                text += "; one or several of: " + ", ".join(presets)
            group.add_argument(f"--{f.name}", help=text, **_argument(hints[f.name]))
    return parser


def parse(cls: type, argv: list[str] | None = None, presets: dict[str, dict] | None = None,
          doc: str = "", base: typing.Callable[[dict], dict] | None = None) -> typing.Any:
    """Read the command line, or `argv`, into an instance of `cls`; presets: {name: flat}, doc: text above the flags.

    `base` takes the flags that were given, {name: value}, and returns flat values that stand in for the defaults
    (train.py: those of a run to resume). It may change what was given (train.py: a preset for device and data).
    """
    presets = presets or {}
    parser = _parser(cls, presets, doc)
    argv = [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg)
            for arg in (sys.argv[1:] if argv is None else argv)]
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").split("=")[0], _owners(cls), n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        parser.error(f"unknown argument {unknown[0]}; {hint}")
    given = vars(given)
    values = base(given) if base else {}
    for name in filter(None, given.get("preset", "").split(",")):
        if name not in presets:
            near = difflib.get_close_matches(name, presets, n=1)
            hint = f"did you mean {near[0]}?" if near else "no such preset; see --help"
            parser.error(f"--preset={name}: {hint}")
        values.update(presets[name])
    try:
        return build(cls, {**values, **given})
    except ValueError as error:
        parser.error(str(error))


@contextmanager
def one_line_errors(quiet: bool = False):
    """Show what the user can cause (a ValueError that we raise, a missing file, a full disk) as one line, exit code 2.

    All else keeps its traceback: it is our bug. `quiet` silences all but one process of a group.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        end = error.__traceback__
        while end.tb_next:
            end = end.tb_next
        code, root = end.tb_frame.f_code, Path(__file__).parent.parent
        file = code.co_filename
        ours = Path(file).is_relative_to(root) and "site-packages" not in file  # which may lie in root/.venv
        ours = ours and code.co_code[end.tb_lasti] == dis.opmap["RAISE_VARARGS"]  # a raise, not a call
        if isinstance(error, ValueError) and not ours:
            raise
        if not quiet:
            if isinstance(error, MemoryError):
                error = "not enough memory; use a smaller model or batch"
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a command that Ctrl-C ended
