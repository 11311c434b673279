"""Turn dataclasses into one flat, typed command line.

Every file owns one dataclass: its fields are the flags, the comment behind a field is the flag's help.
A config may nest other configs; their flags are flat all the same, so `--wbits=8` sets `config.quant.wbits`:

    @dataclass
    class QuantConfig:
        "How each operand is rounded."
        wbits: int = 32  # bits of the weights

    @dataclass
    class TrainConfig:
        "The training loop."
        max_iters: int = 1000  # optimizer steps
        quant: QuantConfig = field(default_factory=QuantConfig)

    config = parse(TrainConfig, presets={"w8a8": {"wbits": 8, "abits": 8}})

Values come from the defaults, then from each preset of `--preset=a,b` from left to right, then from the flags.
`-` and `_` are equal, abbreviations are refused, and a ValueError raised by a `__post_init__` becomes one line
and exit code 2. Standard library only.
"""

import argparse
import difflib
import inspect
import linecache
import re
import sys
import traceback
import types
import typing
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path


def _nested(cls: type) -> dict[str, type]:
    """Return the fields of cls that are configs themselves, by name."""
    return {f.name: f.default_factory for f in fields(cls) if is_dataclass(f.default_factory)}


def _owners(cls: type) -> dict[str, type]:
    """Map every flat flag name to the dataclass that declares it (perhaps a base class); a name may be used once."""
    owners = {f.name: next(c for c in cls.__mro__ if f.name in c.__dict__.get("__annotations__", ()))
              for f in fields(cls) if f.name not in _nested(cls)}
    for sub in _nested(cls).values():
        for name, owner in _owners(sub).items():
            assert name not in owners, f"flag --{name} is defined by {owner.__name__} and {owners[name].__name__}"
            owners[name] = owner
    return owners


def refuse_idle(config: typing.Any, **needs: tuple[bool, str]) -> None:
    """Refuse flags that differ from their defaults but cannot take effect: a typo would otherwise look like a result.

    Args: needs: for each flag, whether it takes effect, and the words that say when it does not:
        refuse_idle(self, wgran=(self.wbits < 32, "without --wbits below 32"))
    Raises: ValueError that names the first such flag.
    """
    for name, (active, reason) in needs.items():
        value = getattr(config, name)
        if not active and value != type(config).__dataclass_fields__[name].default:
            raise ValueError(f"--{name}={value} has no effect {reason}; drop it or add that")


def refuse_unfit(config: typing.Any, cause: str, why: str, **allowed: tuple) -> None:
    """Refuse flags whose values do not go together with that of `cause`.

    Args: allowed: for each flag, the values that do: refuse_unfit(self, "wfmt", "FP8 has 8 bits", wbits=(8,))
    Raises: ValueError that names the first such flag.
    """
    for name, values in allowed.items():
        if getattr(config, name) not in values:
            raise ValueError(f"--{name}={getattr(config, name)} does not fit --{cause}={getattr(config, cause)}: "
                             f"{why}; use --{name}={' or '.join(map(str, values))}, or another --{cause}")


def build(cls: type, values: dict) -> typing.Any:
    """Build the nested config `cls` from flat values; what is not named keeps its default.

    Raises: ValueError for a name that no dataclass owns, or from a `__post_init__`.
    """
    unknown = sorted(set(values) - set(_owners(cls)))
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r} for {cls.__name__}; was it written by another version?")
    subs = {name: build(sub, {k: v for k, v in values.items() if k in _owners(sub)})
            for name, sub in _nested(cls).items()}
    own, hints = {f.name for f in fields(cls)} - set(subs), typing.get_type_hints(cls)
    for name in own & set(values):
        if not _fits(hints[name], values[name]):
            raise ValueError(f"{name}={values[name]!r} is no value of this option of {cls.__name__}")
    return cls(**{k: v for k, v in values.items() if k in own}, **subs)


def _fits(hint: typing.Any, value: typing.Any) -> bool:
    """Tell whether a value, perhaps from a damaged checkpoint, is of a field's type."""
    kind, options = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in options)
    if kind is typing.Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if kind is tuple:
        return type(value) is tuple and all(type(v) is options[0] for v in value)
    return type(value) is hint or hint is float and type(value) is int


def own(cls: type, flat: dict) -> typing.Any:
    """Build `cls` from those of the flat values that are its flags, as a checkpoint's config has them."""
    return build(cls, {name: flat[name] for name in _owners(cls) if name in flat})


def flatten(config: typing.Any) -> dict:
    """Return the flat {flag: value} of a nested config: plain Python values, the inverse of `build`."""
    flat = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat.update(flatten(value) if is_dataclass(value) else {f.name: value})
    return flat


def differences(config: typing.Any) -> dict:
    """Return the flat values of `config` that differ from the defaults of its class."""
    defaults = flatten(type(config)())
    return {k: v for k, v in flatten(config).items() if v != defaults[k]}


# -----------------------------------------------------------------------------
# from one field to one flag

def _helps(cls: type) -> dict[str, str]:
    """Read the comment behind each field from the source of the dataclass."""
    pattern = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(cls)))


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
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = _argument(next(t for t in typing.get_args(hint) if t is not type(None)))
        read, options = inner["type"], inner.pop("choices", None)

        def optional(text: str) -> typing.Any:
            value = None if text.lower() in ("none", "auto") else read(text)
            if value is not None and options and value not in options:
                raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(options)}, auto)")
            return value
        optional.__name__ = read.__name__  # argparse's messages say "invalid int value"
        metavar = inner["metavar"][:-1] + "|auto}" if options else inner["metavar"]
        return {**inner, "type": optional, "metavar": metavar}
    if typing.get_origin(hint) is typing.Literal:
        options = typing.get_args(hint)
        return {"type": type(options[0]), "choices": options, "metavar": "{" + "|".join(map(str, options)) + "}"}
    if typing.get_origin(hint) is tuple:
        return {"type": _ints, "metavar": "I,J"}
    if hint is bool:
        return {"type": _bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _parser(cls: type, presets: dict[str, dict], doc: str) -> argparse.ArgumentParser:
    """Build the argparse parser: one group of flags per dataclass, in the order of the files."""
    prog = sys.argv[0].rsplit("/", 1)[-1]
    parser = argparse.ArgumentParser(
        usage=f"python {prog} [--flag=value ...]  (--help lists every flag)", description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for owner in dict.fromkeys(_owners(cls).values()):
        file = sys.modules[owner.__module__].__file__.rsplit("/", 1)[-1]
        group = parser.add_argument_group(f"{file}: {inspect.getdoc(owner).rstrip('.')}")
        hints, helps = typing.get_type_hints(owner), _helps(owner)
        for f in fields(owner):
            if _owners(cls).get(f.name) is not owner:  # a nested config, or a flag of a base class
                continue
            default = "auto" if f.default is None else f.default
            text = f"{helps.get(f.name, '')} [{default}]".replace("%", "%%")
            if f.name == "preset" and presets:
                text += "; one or several of: " + ", ".join(presets)
            group.add_argument(f"--{f.name}", help=text, **_argument(hints[f.name]))
    return parser


def _one_spelling(arg: str) -> str:
    """Turn `--weight-decay=0` into `--weight_decay=0`; values are left as they are."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def parse(cls: type, argv: list[str] | None = None, presets: dict[str, dict] | None = None, doc: str = "",
          base: typing.Callable[[dict], dict] | None = None) -> typing.Any:
    """Read the command line into an instance of `cls`.

    Args:
        cls: a dataclass; its fields are str, int, float, bool, Literal, tuple[int, ...], X | None or dataclasses again.
        argv: arguments without the program name; sys.argv[1:] if None.
        presets: {name: flat differences}, composed from left to right by `--preset=a,b`.
        doc: text above the flags of --help.
        base: takes the flags that were given, {name: value}, and returns flat values that stand in for the defaults
            (train.py: those of a run to resume). It may change what was given (train.py: a preset for the device).

    Bad input prints a usage line and one line that says what is wrong, and exits with code 2.
    """
    presets = presets or {}
    parser = _parser(cls, presets, doc)
    given, unknown = parser.parse_known_args([_one_spelling(a) for a in (sys.argv[1:] if argv is None else argv)])
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], _owners(cls), n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else "; see --help"))
    given = vars(given)
    values = base(given) if base else {}
    for name in filter(None, given.get("preset", "").split(",")):
        if name not in presets:
            near = difflib.get_close_matches(name, presets, n=1)
            parser.error(f"--preset={name}: " + (f"did you mean {near[0]}?" if near else "no such preset; see --help"))
        values.update(presets[name])
    try:
        return build(cls, {**values, **given})
    except ValueError as error:
        parser.error(str(error))


def _for_the_user(error: ValueError) -> bool:
    """Tell whether one of our own files raised this on purpose: its last frame stands at a `raise`."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1]
    file, line = frame[0].f_code.co_filename, frame[1]
    return Path(file).is_relative_to(Path(__file__).parent.parent) and "raise" in linecache.getline(file, line)


@contextmanager
def one_line_errors(quiet: bool = False):
    """Show what the user can cause (a ValueError that we raise, a missing file, a full disk) as one line, exit code 2.

    Everything else keeps its traceback: it is our bug. `quiet` keeps all but one process of a group silent.
    """
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        if isinstance(error, ValueError) and not _for_the_user(error):
            raise
        if not quiet:
            text = "not enough memory; use a smaller model or batch" if isinstance(error, MemoryError) else error
            print(f"error: {text}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports a command that Ctrl-C ended


