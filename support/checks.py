"""What the configs refuse: numbers out of range, values that exclude each other, flags that would be ignored.

A flag that cannot take effect is an error, never ignored: a typo would look like a result. Each function takes the
config of the file it is named after, or what quant.py builds of it, and raises a ValueError that says what is wrong
and what to do.
"""

from math import inf
from typing import Any

from support.config import refuse_idle, refuse_unfit


def check_bits(name: str, bits: int) -> None:
    """Refuse bit widths that no quantizer here has."""
    if bits != 32 and not 2 <= bits <= 8:
        raise ValueError(f"{name}={bits} is not supported: use 2 to 8, or 32 for none")


def check_quantizer(quantizer: Any) -> None:
    """Refuse quantizers that cannot be."""
    check_bits("bits", quantizer.bits)
    for name, fits in (("rounding", ("nearest", "stochastic")), ("fmt", ("int", "e4m3", "e5m2"))):
        if getattr(quantizer, name) not in fits:
            raise ValueError(f"{name}={getattr(quantizer, name)!r}: use one of {', '.join(fits)}")
    rest = quantizer.bits, quantizer.asym, quantizer.rounding
    if quantizer.fmt != "int" and rest != (8, False, "nearest"):
        raise ValueError(f"fmt={quantizer.fmt!r} is symmetric, 8 bits, rounded to nearest; "
                         "drop the rest")


def check_recipe(recipe: Any) -> None:
    """Refuse recipes of slots that cannot be."""
    if recipe.backward not in ("ste", "fp", "early"):
        raise ValueError(f"backward={recipe.backward!r}: use 'ste', 'fp' or 'early'")
    if recipe.backward == "ste" and (recipe.grad_input_weight or recipe.grad_weight_input):
        raise ValueError("backward='ste' reuses forward's; use 'fp' or 'early' with its own slots")


def check_quant(config: Any) -> None:
    """Refuse flags of a recipe that cannot be."""
    # (1) numbers out of range, and what would be ignored where an operand is left untouched
    for bits, names in (("wbits", ("wfmt", "wgran")), ("abits", ("afmt", "agran", "asym", "asym_gelu")),
                        ("gbits", ("gfmt", "ggran", "ggemm", "rounding"))):
        check_bits(f"--{bits}", getattr(config, bits))
        active = getattr(config, bits) < 32
        refuse_idle(config, **dict.fromkeys(names, (active, f"without --{bits} below 32")))
    if config.wblock < 1:
        raise ValueError(f"--wblock={config.wblock} must be at least 1")
    # (2) what would be ignored under the other flags: a typo would look like a result
    w, a, g = config.wbits < 32, config.abits < 32, config.gbits < 32
    blocks = "per_block" in (config.wgran, config.agran, config.ggran)
    thirds = w and config.wgran == "per_tensor" or g and config.ggran in ("per_tensor", "per_token")
    words = "without weights quantized per_tensor, or gradients per_tensor or per_token"
    refuse_idle(config, wblock=(blocks, "without a granularity of per_block"),
                gemm=(w and a, "without --wbits and --abits below 32"), split_qkv=(thirds, words),
                backward=(w or a, "without --wbits or --abits below 32"),
                quant_head=(w or a or g, "without --wbits, --abits or --gbits below 32"))
    # (3) values that exclude each other: FP8 has one width, and some scales have to be moved
    for fmt, fits in (("wfmt", dict(wbits=(8,))), ("afmt", dict(abits=(8,), asym=(False,), asym_gelu=(False,))),
                      ("gfmt", dict(gbits=(8,), rounding=("nearest",)))):
        if getattr(config, fmt) != "int":
            refuse_unfit(config, fmt, "FP8 is symmetric, 8 bits, rounded to nearest", **fits)
    # asym covers all inputs, asym_gelu those behind GELU
    if config.asym_gelu:
        refuse_unfit(config, "asym_gelu", "all inputs have a zero point already", asym=(False,))
    # granularities whose scales are constant along forward's contraction, and so come out of the GEMM
    w_rows, a_rows = ("per_channel", "per_tensor"), ("per_token", "per_tensor")
    if config.gemm == "int8":
        integers = "its scales must factor out of every GEMM"
        refuse_unfit(config, "gemm", integers, wfmt=("int",), afmt=("int",), gfmt=("int",),
                     asym=(False,), asym_gelu=(False,), wgran=w_rows, agran=a_rows)
        if g:
            refuse_unfit(config, "gemm", integers, ggran=("per_row",), backward=("ste",))
    # quant.fold: the gradient takes up the scales of forward's own w and x, which zero points or blocks forbid
    if g and config.ggran == "per_row" and config.backward == "ste":
        refuse_unfit(config, "ggran", "it takes up the scales of w and x", asym=(False,),
                     asym_gelu=(False,), wgran=w_rows, agran=(*a_rows, "per_channel"))


def check_model(config: Any) -> None:
    """Refuse shapes that cannot be."""
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)} must be at least 1")
    if config.n_embd % config.n_head:
        raise ValueError(f"--n_head={config.n_head} must divide --n_embd={config.n_embd}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"--dropout={config.dropout} must lie in [0, 1)")
    if config.dropout and config.keep8 in ("attn", "both"):
        raise ValueError(f"--keep8={config.keep8} runs attention again in backward, where "
                         "dropout draws other numbers; use --dropout=0 or --keep8=gelu")
    # a pruned shape: a number for each block, never more than the full width
    for name, most in (("heads", config.n_head), ("hidden", 4 * config.n_embd)):
        n = getattr(config, name)
        if n and (len(n) != config.n_layer or not 1 <= min(n) <= max(n) <= most):
            raise ValueError(f"--{name}={','.join(map(str, n))} must be {config.n_layer} numbers "
                             f"(n_layer) from 1 to {most}, or empty")


def check_optim(config: Any) -> None:
    """Refuse moments that cannot be stored so."""
    for name, end in (("weight_decay", inf), ("beta1", 1), ("beta2", 1)):
        if not 0 <= getattr(config, name) < end:
            raise ValueError(f"--{name}={getattr(config, name)} must lie in [0, {end})")
    # each moment for itself
    stored = [i for i in ("m1", "m2") if getattr(config, f"{i}bits") != 32]
    for i in ("m1", "m2"):
        if getattr(config, f"{i}bits") not in (4, 8, 32):
            raise ValueError(f"--{i}bits={getattr(config, f'{i}bits')}: use 8, 4 or 32")
        low = (i in stored, f"without --{i}bits=8 or 4")
        refuse_idle(config, **{i + field: low for field in ("fmt", "gran", "round")})
        if getattr(config, f"{i}fmt") == "dynamic" and getattr(config, f"{i}round") == "stochastic":
            raise ValueError(f"--{i}round=stochastic: use power or linear, not dynamic")
    # both together: they share the rows and blocks of one layout (optim.layout)
    fmts, grans = ({getattr(config, i + field) for i in stored} for field in ("fmt", "gran"))
    if len(grans) > 1:
        raise ValueError(f"--m1gran={config.m1gran}, --m2gran={config.m2gran}: give both the same")
    if config.mblock < 2 or config.mblock % 2:
        raise ValueError(f"--mblock={config.mblock} must be even and at least 2")
    refuse_idle(config, membed32=(bool(fmts), "without a moment in 8 or 4 bits, as --m1bits=8"),
                mfloor=("linear" in fmts, "without a linear format, as --m1fmt=linear"),
                mblock=("per_block" in grans, "without a per_block moment in 8 or 4 bits"))


def check_train(config: Any) -> None:
    """Refuse runs that cannot be."""
    for low, names in ((1, "max_iters batch_size gradient_accumulation_steps eval_interval log_interval"),
                       (0, "warmup_iters learning_rate min_lr grad_clip eval_tokens sample_tokens seed")):
        for name in names.split():  # floats may not be nan or infinite, integers have 53 bits
            value = getattr(config, name)
            if not low <= value < (inf if isinstance(value, float) else 2**53):
                raise ValueError(f"--{name}={value} must be at least {low}, and finite")
    if not config.out_dir:
        raise ValueError("--out_dir= is empty; name a folder")
    if config.min_lr > config.learning_rate:
        raise ValueError(f"--min_lr={config.min_lr} exceeds --learning_rate={config.learning_rate}; "
                         "give a smaller --min_lr too")
    if config.lr_decay_iters is not None and config.lr_decay_iters < config.warmup_iters:
        raise ValueError(f"--lr_decay_iters={config.lr_decay_iters} is below --warmup_iters={config.warmup_iters}")
    end = config.lr_decay_iters
    if not config.min_lr and end is not None and end < config.max_iters:
        raise ValueError(f"--max_iters={config.max_iters}: from step {end} (--lr_decay_iters) the "
                         "learning rate would be --min_lr=0, and nothing would train; give a smaller "
                         "--max_iters, or begin another run, perhaps with --init_from this one")
    refuse_idle(config, wsd_decay=(config.schedule == "wsd", "without --schedule=wsd"))
    if not 0 < config.wsd_decay <= 1:
        raise ValueError(f"--wsd_decay={config.wsd_decay} must lie in (0, 1]")
