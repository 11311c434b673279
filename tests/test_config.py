"""Tests of config.py: what a command line means, and that a wrong one ends in one line and exit code 2."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from support.config import build, differences, flatten, one_line_errors, parse


@dataclass
class Inner:
    """How things are rounded."""
    bits: int = 32  # bits of the weights
    gran: Literal["row", "column"] = "row"  # what shares a scale
    skip_blocks: tuple[int, ...] = ()  # blocks left alone

    def __post_init__(self):
        if self.bits > 32:
            raise ValueError(f"--bits={self.bits} is too many; use at most 32")


@dataclass
class Config:
    """The loop."""
    preset: str = ""  # names of presets
    max_iters: int = 1000  # steps
    weight_decay: float = 0.1  # 100% of nothing
    compile: bool = True  # compile first
    seed: int | None = None  # seed of everything
    dtype: Literal["half", "full"] | None = None  # of everything
    inner: Inner = field(default_factory=Inner)


PRESETS = {"short": {"max_iters": 10, "bits": 8}, "long": {"max_iters": 99}, "many": {"bits": 64}}


def read(*argv, **options):
    return parse(Config, list(argv), PRESETS, **options)


def fails(capsys, *argv):
    """Return the one line that parse prints before it exits with code 2; above it there is only the usage."""
    with pytest.raises(SystemExit) as end:
        read(*argv)
    out, err = capsys.readouterr()
    usage, line = err.strip().splitlines()
    assert end.value.code == 2 and out == "" and usage.startswith("usage: python ")
    return line


def test_defaults_and_flags():
    """No flag is the defaults; nested flags are flat; `--x=1` and `--x 1` are one."""
    assert read() == Config()
    assert read("--bits=8", "--max_iters", "5") == Config(max_iters=5, inner=Inner(bits=8))


@pytest.mark.parametrize("flag, name, value", [
    ("--weight_decay=0", "weight_decay", 0.0), ("--weight_decay=-1e-3", "weight_decay", -1e-3),
    ("--compile", "compile", True), ("--compile=False", "compile", False), ("--compile=0", "compile", False),
    ("--compile=true", "compile", True), ("--compile=1", "compile", True), ("--seed=7", "seed", 7),
    ("--seed=None", "seed", None), ("--seed=auto", "seed", None), ("--skip_blocks=0,11", "skip_blocks", (0, 11)),
    ("--skip_blocks=3", "skip_blocks", (3,)), ("--skip_blocks=", "skip_blocks", ()),
    ("--gran=column", "gran", "column"), ("--dtype=half", "dtype", "half"), ("--dtype=auto", "dtype", None),
])
def test_types(flag, name, value):
    """Every type of field reads its values, and gives that very type."""
    got = flatten(read(flag))[name]
    assert got == value and type(got) is type(value)


def test_dash_equals_underscore():
    """`--weight-decay` is `--weight_decay`; the dashes of values stay."""
    assert read("--weight-decay=-0.5", "--skip-blocks=1") == read("--weight_decay=-0.5", "--skip_blocks=1")
    assert read("--weight-decay=-0.5").weight_decay == -0.5


def test_presets_compose_from_left_to_right():
    """Defaults, then each preset from the left, then flags, wherever they stand; the names are kept."""
    assert read("--preset=short,long") == Config("short,long", 99, inner=Inner(bits=8))
    assert read("--preset=long,short") == Config("long,short", 10, inner=Inner(bits=8))
    assert read("--max_iters=1", "--preset=long,short", "--bits=4") == Config("long,short", 1, inner=Inner(bits=4))


@pytest.mark.parametrize("argv, line", [
    (["--max_iter=5"], "unknown argument --max_iter=5; did you mean --max_iters?"),  # an abbreviation is no flag
    (["--max-itres=5"], "unknown argument --max_itres=5; did you mean --max_iters?"),
    (["--comp"], "unknown argument --comp; did you mean --compile?"),
    (["--zzz"], "unknown argument --zzz; see --help"),
    (["stray"], "unknown argument stray; see --help"),
    (["--preset=shrot"], "--preset=shrot: did you mean short?"),
    (["--preset=long,zzz"], "--preset=zzz: no such preset; see --help"),
    (["--bits=64"], "--bits=64 is too many; use at most 32"),
    (["--preset=many"], "--bits=64 is too many; use at most 32"),
    (["--bits=8.5"], "argument --bits: invalid int value: '8.5'"),
    (["--bits"], "argument --bits: expected one argument"),
    (["--compile=maybe"], "argument --compile: invalid value 'maybe': use True or False"),
    (["--skip_blocks=1;2"], "argument --skip_blocks: invalid value '1;2': use integers with commas, as 0,11"),
    (["--dtype=quarter"], "argument --dtype: invalid choice: 'quarter' (choose from half, full, auto)"),
    (["--seed=x"], "argument --seed: invalid int value: 'x'"),
    (["--gran=diagonal"], "argument --gran: invalid choice: 'diagonal' (choose from"),
])
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, line):
    """Whatever is wrong, a __post_init__'s ValueError included: usage, one line that says what, exit code 2."""
    assert f"error: {line}" in fails(capsys, *argv)


def test_base_stands_in_for_the_defaults():
    """What base returns comes before presets and flags, which still win; base sees the flags given, and may add one."""
    def base(given):
        assert given == {"preset": "long", "seed": 2}
        given["preset"] = "short," + given["preset"]
        return {"max_iters": 7, "bits": 4, "seed": 1}
    assert read("--preset=long", "--seed=2", base=base) == read("--preset=short,long", "--seed=2")
    assert read("--seed=2", base=lambda given: {"bits": 4, "seed": 1}) == Config(seed=2, inner=Inner(bits=4))


def test_a_bad_value_overridden_by_a_flag_is_no_error():
    """Only the final values are checked: a flag repairs what a preset would break."""
    assert read("--preset=many", "--bits=8").inner.bits == 8


def test_build_and_flatten_are_inverse():
    """flatten gives plain flat values, build takes them back; an unknown name is a ValueError that names it."""
    config = read("--bits=4", "--gran=column", "--seed=3", "--skip_blocks=1,2", "--preset=long")
    assert flatten(config) == {"preset": "long", "max_iters": 99, "weight_decay": 0.1, "compile": True, "seed": 3,
                               "dtype": None, "bits": 4, "gran": "column", "skip_blocks": (1, 2)}
    assert build(Config, flatten(config)) == config
    assert build(Config, {"bits": 4}) == Config(inner=Inner(bits=4))
    with pytest.raises(ValueError, match="unknown option 'bitz' for Config"):
        build(Config, {"bitz": 4})


def test_differences():
    """differences is what a flag or preset changed, and building from it gives the config again."""
    config = read("--bits=4", "--max_iters=1000", "--compile=False")
    assert differences(config) == {"bits": 4, "compile": False} and differences(Config()) == {}
    assert build(Config, differences(config)) == config


def test_a_flag_has_one_owner():
    """Two dataclasses with one field name are our own bug, and said so."""
    @dataclass
    class Twice:
        bits: int = 1  # again
        inner: Inner = field(default_factory=Inner)
    with pytest.raises(AssertionError, match="--bits is defined by"):
        parse(Twice, [])


def test_help_lists_every_flag_with_its_comment(capsys):
    """--help exits with 0 and shows the doc, the files, every flag, its comment and default, and the presets."""
    with pytest.raises(SystemExit) as end:
        read("--help", doc="What this program does.")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "What this program does." in text
    assert "test_config.py: The loop" in text and "test_config.py: How things are rounded" in text
    for flag in ("--preset STR names of presets []; one or several of: short, long, many",
                 "--max_iters INT steps [1000]", "--weight_decay FLOAT 100% of nothing [0.1]",
                 "--compile [BOOL] compile first [True]", "--seed INT seed of everything [",
                 "--bits INT bits of the weights [32]", "--gran {row|column} what shares a scale [row]",
                 "--skip_blocks I,J blocks left alone [()]"):
        assert flag in text
    assert "--inner" not in text


@pytest.mark.parametrize("error", [ValueError("bad value"), FileNotFoundError(2, "no such file", "x")])
def test_one_line_errors(capsys, error):
    """What the user caused is one line and exit code 2; quiet says nothing; our own bugs keep their traceback."""
    for quiet in (False, True):
        with pytest.raises(SystemExit) as end, one_line_errors(quiet):
            raise error
        assert end.value.code == 2 and capsys.readouterr().err == ("" if quiet else f"error: {error}\n")
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("ours")
