"""Tests of config.py: what a command line means, and that a wrong one ends in one line and exit code 2."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from support.config import build, differences, flatten, own, parse


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


@dataclass
class Heir(Config):
    """A loop of its own."""
    extra: float = 0.5  # of the heir
    seed: int = 7  # seed of the heir


PRESETS = {"short": {"max_iters": 10, "bits": 8}, "long": {"max_iters": 99}, "many": {"bits": 64}}


def read(*argv, cls=Config, **options):
    return parse(cls, list(argv), PRESETS, **options)


def test_defaults_and_flags():
    """No flag is the defaults; nested flags are flat; `--x=1` and `--x 1` are one; - is _ in a flag, not in a value."""
    assert read() == Config()
    assert read("--bits=8", "--max_iters", "5") == Config(max_iters=5, inner=Inner(bits=8))
    assert read("--weight-decay=-0.5", "--skip-blocks=1") == Config(weight_decay=-0.5, inner=Inner(skip_blocks=(1,)))


@pytest.mark.parametrize("flag, value", [
    ("weight_decay=0", 0.0), ("weight_decay=-1e-3", -1e-3), ("seed=7", 7), ("seed=auto", None), ("dtype=half", "half"),
    ("compile", True), ("compile=False", False), ("compile=0", False), ("gran=column", "column"),
    ("skip_blocks=0,11", (0, 11)), ("skip_blocks=", ())])
def test_types(flag, value):
    got = flatten(read(f"--{flag}"))[flag.split("=")[0]]
    assert got == value and type(got) is type(value)


def test_presets_compose_from_left_to_right():
    assert read("--preset=short,long") == Config("short,long", 99, inner=Inner(bits=8))
    assert read("--preset=long,short") == Config("long,short", 10, inner=Inner(bits=8))
    assert read("--max_iters=1", "--preset=long,short", "--bits=4") == Config("long,short", 1, inner=Inner(bits=4))
    assert read("--preset=many", "--bits=8").inner.bits == 8


@pytest.mark.parametrize("flag, line", [
    ("--max_iter=5", "unknown argument --max_iter=5; did you mean --max_iters?"),  # an abbreviation is no flag
    ("--max-itres=5", "unknown argument --max_itres=5; did you mean --max_iters?"),
    ("--zzz", "unknown argument --zzz; see --help"), ("stray", "unknown argument stray; see --help"),
    ("--preset=shrot", "--preset=shrot: did you mean short?"),
    ("--preset=long,zzz", "--preset=zzz: no such preset;"),
    ("--bits=64", "--bits=64 is too many; use at most 32"),
    ("--preset=many", "--bits=64 is too many; use at most 32"),
    ("--bits=8.5", "argument --bits: invalid int value: '8.5'"),
    ("--compile=maybe", "argument --compile: invalid value 'maybe': use True or False"),
    ("--skip_blocks=1;2", "argument --skip_blocks: invalid value '1;2': use integers with commas, as 0,11"),
    ("--dtype=quarter", "argument --dtype: invalid choice: 'quarter' (choose from half, full, auto)")])
def test_bad_input_is_one_line_and_exit_code_2(capsys, flag, line):
    with pytest.raises(SystemExit) as end:
        read(flag)
    out, err = capsys.readouterr()
    usage, last = err.strip().splitlines()
    assert end.value.code == 2 and out == "" and usage.startswith("usage: python ") and f"error: {line}" in last


def test_build_flatten_differences():
    """flatten gives plain flat values, differences those changed; build takes both back; an unknown name is refused."""
    config = read("--bits=4", "--gran=column", "--seed=3", "--skip_blocks=1,2", "--preset=long")
    assert build(Config, flatten(config)) == build(Config, differences(config)) == config
    assert own(Inner, flatten(config)) == config.inner
    assert differences(read("--bits=4", "--max_iters=1000", "--compile=False")) == {"bits": 4, "compile": False}
    with pytest.raises(ValueError, match="unknown option 'bitz' for Config"):
        build(Config, {"bitz": 4})


@pytest.mark.parametrize("cls, seed", [(Config, "--seed INT seed of everything ["), (
    Heir, "test_config.py: A loop of its own: --seed INT seed of the heir [7] --extra FLOAT of the heir [0.5]")])
def test_help_lists_every_flag_with_its_comment(capsys, cls, seed):
    """--help shows the doc, and each flag once: under the last class that declares it, with comment and default."""
    with pytest.raises(SystemExit) as end:
        read("--help", cls=cls, doc="What this program does.")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "What this program does." in text and "--inner" not in text
    for flag in (seed, "--max_iters INT steps [1000]", "--weight_decay FLOAT 100% of nothing [0.1]",
                 "test_config.py: The loop: --preset STR names of presets []; one or several of: short, long, many",
                 "test_config.py: How things are rounded: --bits INT bits of the weights [32]", " --seed INT ",
                 "--gran {row|column} what shares a scale [row]", "--skip_blocks I,J blocks left alone [()]",
                 "--compile [BOOL] compile first [True]"):
        assert text.count(flag) == 1
    assert read("--bits=4", "--max_iters=1", cls=cls) == cls(max_iters=1, inner=Inner(bits=4))
