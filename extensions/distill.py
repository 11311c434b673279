"""A small student, perhaps of few-bit weights, learns from a large teacher (Polino et al. 2018, arXiv 1802.05668).

    L = soft T^2 KL(teacher || student) + (1 - soft) cross-entropy       model.linear_cross_entropy

    --method=none      train.py's student, recipes and all, with this loss; at the end it is rounded, as a control
    --method=uniform   Algorithm 1: forward and backward at Q(w), the step moves the fp32 w; points 0, 1/(s-1), ..., 1
    --method=points    Algorithm 2: w stays as --init_from has it; each matrix has s points of its own, which train

Q(w) is extensions/points.py's. Weights only, and the arithmetic is simulated: fp32 or bf16, on the values of Q(w). The
files are real. ckpt.pt has w and the points, to go on from. A finished run adds quantized.pt, Q(w) in fp32, which
eval.py reads; packed.pt, ceil(log2 s) bits a weight and 64 a bucket; huffman.pt, the same in a Huffman code.

    python train.py --out_dir=out          # any checkpoint, or a Hugging Face folder, is a teacher
    python -m extensions.distill --teacher=out --n_layer=2 --n_embd=64 --out_dir=out-kd
    python -m extensions.distill --teacher=out --init_from=out-kd --method=uniform --levels=16 --out_dir=out-4bit
    python -m extensions.distill --teacher=out --init_from=out-kd --method=points --levels=4 --out_dir=out-points
    python eval.py --ckpt=out-4bit/quantized.pt

All flags of train.py are flags here. Algorithm 1, too, had better start from a trained student (--init_from).
"""

import math
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

import extensions
import train
from eval import evaluate, open_hf, val_windows
from extensions.points import MOST, Student, matrices, pack, share_out
from model import GPT, Teacher
from quant import QuantLinear, Recipe
from support.checkpoint import load_checkpoint, model_from, save_checkpoint
from support.config import refuse_idle
from support.log import Log


@dataclass
class Config(train.TrainConfig):
    """Distillation, into few-bit weights if asked for."""
    teacher: str = ""  # a checkpoint, the out_dir of a run, or a Hugging Face folder
    temperature: float = 2.0  # of the teacher's and the student's softmax
    soft: float = 0.7  # share of the teacher in the loss; 0: no teacher
    method: Literal["none", "uniform", "points"] = "none"  # what becomes of the weights
    levels: int = 16  # points of a matrix, 2 to 256
    bucket: int = 256  # weights that share alpha and beta; 0: the whole matrix
    allocate: bool = False  # more points to matrices with larger gradients, as many in all

    def __post_init__(self):
        super().__post_init__()
        theirs, out = Path(self.teacher).resolve(), Path(self.out_dir).resolve()
        for name, fits, allowed in (
                ("soft", 0 <= self.soft <= 1, "lie in [0, 1]"),
                ("temperature", 0 < self.temperature < math.inf, "be above 0, and finite"),
                ("levels", 2 <= self.levels <= MOST, f"be 2 to {MOST}"),
                ("bucket", self.bucket >= 2 or self.bucket == 0, "be at least 2, or 0: all of a matrix"),
                ("init_from", (self.method, self.init_from) != ("points", "scratch"),
                 "name a trained student: --method=points trains no weights"),
                ("teacher", not self.teacher or out not in (theirs, theirs.parent),
                 f"not lie in --out_dir={self.out_dir}, which is the student's; choose another")):
            if not fits:
                raise ValueError(f"--{name}={getattr(self, name)} must {allowed}")
        taught = (self.soft > 0, "without --soft above 0")
        rounds = (self.method != "none", "without --method=uniform or points")
        refuse_idle(self, teacher=taught, temperature=taught, levels=rounds, bucket=rounds,
                    allocate=(self.method == "points" and self.levels > 2, "without --method=points, --levels above 2"))
        weights = (self.method != "points", "with --method=points, which trains vectors")
        refuse_idle(self.optim, m1bits=weights, m2bits=weights, membed32=weights, weight_decay=weights)


# -----------------------------------------------------------------------------
# the program

class Run(train.Run):
    """A run of train.py with a teacher, a student that computes at Q(w), and small files at its end."""
    teacher, student, crc = None, None, None

    def make_objective(self) -> nn.Module:
        """Load the teacher; return the GPT, or the Student around it."""
        config, gpt = self.config, self.raw
        if config.soft:
            self.load_teacher()
        layers = {name: layer for name, layer in gpt.named_modules() if isinstance(layer, QuantLinear)}
        self.rounds = [name for name, layer in layers.items()
                       if layer.reparam or layer.recipe and layer.recipe.output_weight]
        if config.method == "none":
            return gpt
        if self.rounds:
            raise ValueError(f"--method={config.method} rounds the weights, and --wbits or an extension "
                             f"those of {self.rounds[0]}; drop one")
        levels, trained = [config.levels] * len(matrices(gpt)), config.method == "points"
        if trained and config.resume:
            levels = self.source["extra"].get("levels", levels)
        elif config.allocate:
            levels = share_out(self.gradient_norms(levels), config.levels)
            self.processes.print(f"points: {dict(zip(matrices(gpt), levels, strict=True))}")
        gpt.requires_grad_(not trained)
        self.student, self.needs = Student(gpt, levels, config.bucket, trained), ["distill"]
        return self.student

    def load_teacher(self) -> None:
        """Rebuild the teacher, with its own quantizers if it has any; refuse one that cannot teach this student."""
        config, path, size = self.config, Path(self.config.teacher), self.meta["vocab_size"]
        if not config.teacher:
            raise ValueError("--teacher= is empty; name a checkpoint, or do without: --soft=0")
        hf = path.is_dir() and not (path / "ckpt.pt").exists()
        source = open_hf(path, "--teacher") if hf else load_checkpoint(path)
        flat, theirs = source["config"], source["vocab_size"]
        for name in set(source["extensions"]) - set(extensions.EXTENSIONS):
            raise ValueError(f"--teacher={path} was trained with extensions/{name}.py, which is no part "
                             "of this; name the file that it wrote for use (quantized.pt)")
        if theirs not in (size, -(-size // 64) * 64):  # or padded, as wte
            raise ValueError(f"--teacher={path} has a vocabulary of {theirs}, the data one of {size}; "
                             "choose a teacher that was trained on such tokens")
        if flat["block_size"] < config.model.block_size:
            raise ValueError(f"--teacher={path} has a context of {flat['block_size']} tokens; "
                             f"--block_size={config.model.block_size} must not be more")
        self.teacher = model_from(source, extensions.linears(flat), getattr(torch, config.dtype))
        extensions.at_step(flat, self.teacher, source["step"])
        self.teacher.eval().requires_grad_(False)
        self.crc = 0  # tells one teacher from another
        for p in self.teacher.parameters():
            self.crc = zlib.crc32(p.numpy(), self.crc)
        self.teacher.to(self.processes.device)
        self.hidden = torch.compile(self.teacher.hidden, dynamic=False, disable=not config.compile)
        count = sum(p.numel() for p in self.teacher.parameters())
        self.processes.print(f"teacher {path}: {count:,} parameters")

    @torch.no_grad()
    def teach(self, idx: Tensor) -> Teacher | None:
        """Return what the teacher makes of the tokens idx (B, T): the operands of its logits, rounded as it does."""
        if self.teacher is None:
            return None
        head = self.teacher.lm_head
        recipe, x, w = head.recipe or Recipe(), self.hidden(idx).flatten(0, 1), head.used_weight()
        x, w = (q(t) if q else t for q, t in ((recipe.output_input, x), (recipe.output_weight, w)))
        return Teacher(x, w, self.config.temperature, self.config.soft)  # x (M, C'), w (V, C')

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, the teacher's part in it, and the extensions' terms."""
        return self.model(x, y, self.teach(x)), extensions.losses(self.flat, self.raw)

    def gradient_norms(self, levels: list[int]) -> list[float]:
        """Return the norm of each matrix's gradient over five micro-batches, the same on every process."""
        config, T = self.config, self.config.model.block_size
        student = Student(self.raw, levels, config.bucket, trained=True)
        windows = torch.from_numpy(val_windows(self.train_tokens, T, 5 * config.batch_size * T))
        for batch in windows.to(self.processes.device).split(config.batch_size):  # (B, T+1)
            student(batch[:, :-1], batch[:, 1:], self.teach(batch[:, :-1])).backward()
        norms = [w.grad.norm().item() for w in matrices(self.raw).values()]
        self.raw.zero_grad()
        return self.processes.sum(norms)

    def evaluated_model(self) -> GPT:
        """Return the GPT at Q(w): that is what will be used."""
        return self.student.rounded() if self.student else self.raw

    def extra_state(self) -> dict:
        """Return the points, how many each matrix has, and which teacher it is: what of these there is."""
        state = {"teacher": self.crc} if self.teacher else {}
        if self.student:
            state |= {"points": self.student.points.data, "levels": self.student.levels}
        return state

    def load_extra_state(self, state: dict) -> None:
        """Take up the points. Raises: ValueError if the run began otherwise, or its teacher has changed."""
        mine = self.extra_state()
        if mine.keys() != state.keys() or any(mine[key] != state[key] for key in mine if key != "points"):
            raise ValueError(f"the run in {self.config.out_dir} began with another --teacher={self.config.teacher}"
                             f" or --method than {self.config.method}; go on with what it had")
        if self.student:
            self.student.points.data.copy_(state["points"])

    def before_checkpoint(self, log: Log) -> None:
        """When the run is over, write the files; log and print val_loss, bits a weight of the matrices, and bytes.

        Where nothing rounds the weights, they are rounded here, to see what that alone would cost.
        """
        if self.step < self.config.max_iters:
            return
        gpt, student, out = self.raw, self.student, Path(self.config.out_dir)
        number = len(matrices(gpt))
        tried = {"w": lambda: gpt}  # name: model
        if student:
            tried["Q(w)"] = student.rounded
        elif not self.rounds:
            tried |= {f"levels={s},bucket={k}": Student(gpt, [s] * number, k).rounded
                      for k in (256, 0) for s in (256, 16, 4)}
        result = {"val_loss": {name: evaluate(model(), self.windows, self.config.batch_size)
                               for name, model in tried.items()}}
        if student:
            parts, count = pack(student), sum(w.numel() for w in matrices(gpt).values())
            result["bits"] = {name: 8 * part.nbytes / count for name, part in parts.items()
                              if name != "vectors"}
            facts = {"config": self.flat, "vocab_size": gpt.vocab_size, "step": self.step,
                     "extensions": extensions.active(self.flat)}
            few = facts | {"levels": student.levels, "bucket": student.bucket}

            def write():
                whole = facts | {"model": student.rounded().state_dict()}
                save_checkpoint(out / "quantized.pt", whole)
                for name, other in (("packed", "huffman"), ("huffman", "codes")):
                    tensors = {key: t for key, t in parts.items() if key != other}
                    save_checkpoint(out / f"{name}.pt", few | {"model": tensors})
            self.processes.after_main(write)
        result["bytes"] = {"fp32": sum(p.nbytes for p in gpt.parameters()),
                           **{path.name: path.stat().st_size for path in sorted(out.glob("*.pt"))
                              if not path.name.startswith("ckpt")}}
        log.write(step=self.step, result=result)
        for name, values in result.items():
            shown = [f"{key} {value:,.4f}".removesuffix(".0000") for key, value in values.items()]
            log.say(f"{name}: {'; '.join(shown)}")


def main() -> None:
    """Distill, from the command line to the exit code."""
    train.main(Config, Run, __doc__)


if __name__ == "__main__":
    sys.argv[0] = "-m extensions.distill"  # as messages are to call it
    main()
