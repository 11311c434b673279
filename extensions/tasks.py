"""Downstream tasks: LAMBADA, HellaSwag, ARC, WikiText, GLUE, as EleutherAI's lm-evaluation-harness (lm_eval) has them.

Templates, targets and metrics are lm_eval's, so that a number compares with everybody's. What it asks of a model is
scored here:

    loglikelihood          of a continuation: sum of log p(token | all before), and whether each token is the likeliest
    loglikelihood_rolling  the same of a whole text, behind end-of-text
    generate_until         the likeliest text, up to a stop sequence

A context that is too long for the model is cut on its left, a continuation never: one that is longer than the model's
context goes through it in windows, each token predicted once, with as much before it as fits (lm_eval's own rule for
whole texts). Padding columns of the vocabulary get no probability, log_softmax is fp32, sums are float64. The result
depends neither on the batch size nor on the order of requests, to rounding; equal requests tie to the last bit.

    python eval.py --ckpt=out --tasks=lambada_openai,hellaswag,arc_easy,arc_challenge,wikitext --json=out/tasks.json
    python eval.py --ckpt=out --tasks=sst2,rte,mrpc,qnli,mnli,wnli --shots=5 --seeds=3      # mean and deviation
    python eval.py --hf=DIR --tasks=lambada --task_dir=DATA --limit=50                      # without a network

Documents come from the hub, or with --task_dir from files: TASK.jsonl has one a line, a JSON object with the columns of
the hub, TASK_train.jsonl the examples for --shots. Without the latter they are other documents of TASK.jsonl.
"""

import importlib
import json
import logging
import math
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import GPT
from prepare_data import get_tokenizer
from support.config import refuse_idle

# folders of lm_eval that are read in a second; all of its 13,000 tasks take 20
FOLDERS = ("lambada", "hellaswag", "arc", "wikitext", "glue")
TOKENIZERS = {50257: "gpt2", 257: "bytes"}  # by the size of the vocabulary
CHUNK = 2**24  # elements of fp32 logits alive at once (64 MiB)
Piece = tuple[tuple[int, ...], int]  # tokens, of which the last n are scored


@dataclass
class EvalConfig:
    """Downstream tasks in place of the validation loss (pip install lm_eval)."""
    tasks: str = ""  # names of lm_eval's tasks, with commas: lambada_openai,hellaswag
    task_dir: str = ""  # take their documents from TASK.jsonl in this folder; empty: from the hub
    limit: int = 0  # documents of each task; 0: all
    shots: int = 0  # solved examples in front of each question
    seeds: int = 1  # draw these so many times, for mean and standard deviation
    json: str = ""  # write the results to this file
    samples: bool = False  # ... with every document's log-likelihoods

    def __post_init__(self):
        for name, low in (("limit", 0), ("shots", 0), ("seeds", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {low}")
        refuse_idle(self, seeds=(self.shots > 0, "without --shots above 0"),
                    samples=(self.json, "without --json"))
        refuse_idle(self, **{name: (self.tasks, "without --tasks")
                             for name in ("task_dir", "limit", "shots", "json")})


def _optional(name: str) -> Any:
    """Import what only this file needs, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"--tasks needs lm_eval: pip install lm_eval==0.4.13 ({error})") from None


# -----------------------------------------------------------------------------
# scoring: nothing here needs lm_eval

def windows(context: list[int], continuation: list[int], size: int) -> list[Piece]:
    """Cut tokens into what a model of `size` tokens takes: pieces of at most size + 1 tokens.

    With size 3, context abcd and continuation e give (bcde, 1), context a and bcdefg give (abcd, 3) and (defg, 3).
    """
    tokens, start, pieces = (*context, *continuation), len(context), []
    while start < len(tokens):
        stop = min(start + size, len(tokens))
        pieces.append((tokens[max(0, stop - size - 1):stop], stop - start))
        start = stop
    return pieces


class Scorer:
    """Answers lm_eval's three kinds of requests, objects with a tuple `args`, with a GPT.

    Args:
        batch_size: sequences at a time.
        alone: tokens share scales: each sequence is scored by itself, text is generated without a cache.
    """

    def __init__(self, model: GPT, batch_size: int, alone: bool = False):
        super().__init__()  # lm_eval's, in `harness_model`
        if model.vocab_size not in TOKENIZERS:
            known = " or ".join(map(str, TOKENIZERS))
            raise ValueError(f"--tasks needs a tokenizer: there is one for {known} tokens, "
                             f"and the model has {model.vocab_size}")
        self.model, self.size, self.alone = model.eval(), model.config.block_size, alone
        self.tokenizer = get_tokenizer(TOKENIZERS[model.vocab_size])
        self.batch_size = 1 if alone else batch_size
        self.answered, self.cut = 0, 0  # requests, and how many contexts were too long

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; <|endoftext|> in it is one token, as in Hugging Face's tokenizers."""
        return self.tokenizer.encode(text, allowed_special="all")

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokenize as lm_eval does: the context, and of both together what is behind that many tokens.

        Blanks that end the context begin the continuation.
        """
        end, stripped = self.tokenizer.eot_token, context.rstrip()
        tokens = self.encode(context + continuation)
        if stripped:
            before = self.encode(stripped)
            return before, tokens[len(before):]
        # a document begins
        return (tokens[:1], tokens[1:]) if tokens[:1] == [end] else ([end], tokens)

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Score (context, continuation): the log-likelihood, in nats, and whether greedy decoding would write it."""
        return self.score([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """Score whole texts: their log-likelihoods, in nats."""
        end = self.tokenizer.eot_token
        pairs = [([end], self.encode(*request.args)) for request in requests]
        return [ll for ll, _ in self.score(pairs)]

    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score tokenized pairs, the longest first: batches need little padding, and the time left is no promise."""
        pieces = [windows(*pair, self.size) for pair in pairs]
        self.answered += len(pairs)
        self.cut += sum(len(b) <= self.size < len(a) + len(b) - 1 for a, b in pairs)
        # equal pieces once: a choice that stands there twice ties, whatever the rounding
        todo = {piece for several in pieces for piece in several}
        todo, found = sorted(todo, key=lambda p: (-len(p[0]), p)), {}
        with tqdm(total=len(todo), unit="request", dynamic_ncols=True, disable=None) as bar:
            for i in range(0, len(todo), self.batch_size):
                batch = todo[i:i + self.batch_size]
                found.update(zip(batch, self.forward(batch), strict=True))
                bar.update(len(batch))
        return [(math.fsum(found[p][0] for p in several), all(found[p][1] for p in several))
                for several in pieces]

    @torch.no_grad()
    def forward(self, batch: list[Piece]) -> list[tuple[float, bool]]:
        """Score pieces: the log-likelihood of each one's last n tokens, and whether all are the likeliest."""
        # (1) inputs (b, T), padded right, where no token sees it; targets, one further; which of these to score
        T, device = max(len(tokens) for tokens, _ in batch) - 1, self.model.wte.weight.device
        idx, targets = torch.zeros(2, len(batch), T, dtype=torch.long)
        scored = torch.zeros(len(batch), T, dtype=torch.bool)
        for row, (tokens, n) in enumerate(batch):
            end = len(tokens) - 1
            idx[row, :end], targets[row, :end] = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
            scored[row, end - n:end] = True
        # (2) the head, for what is scored only; one whose inputs share a scale must see them all
        kept = torch.ones_like(scored) if self.alone else scored
        x = self.model.hidden(idx.to(device))[kept.to(device)]  # (M, C)
        t = targets[kept].to(device)  # (M,)
        rows = len(x) if self.alone else max(1, CHUNK // len(self.model.wte.weight))
        ll, hit = [], []
        for part, goal in zip(x.split(rows), t.split(rows), strict=True):
            logits = self.model.lm_head(part).float()  # (m, V)
            logits[:, self.model.vocab_size:] = -math.inf  # padding would take probability
            ll.append(-F.cross_entropy(logits, goal, reduction="none"))
            hit.append(logits.argmax(-1) == goal)
        # (3) back to pieces
        ll, hit = (torch.cat(parts).cpu()[scored[kept]].split([n for _, n in batch])
                   for parts in (ll, hit))
        return [(a.double().sum().item(), bool(b.all())) for a, b in zip(ll, hit, strict=True)]

    def generate_until(self, requests: list) -> list[str]:
        """Continue contexts, (text, options): see `generate`."""
        self.answered += len(requests)
        bar = tqdm(requests, unit="text", dynamic_ncols=True, disable=None)
        return [self.generate(*request.args) for request in bar]

    @torch.no_grad()
    def generate(self, context: str, options: dict) -> str:
        """Continue a text by its likeliest tokens: options["max_gen_toks"] of them, up to end-of-text or an "until"."""
        if options.get("do_sample"):
            raise ValueError("a task samples its answers (do_sample); here all are greedy, drop it")
        stops, most = options.get("until") or [], options.get("max_gen_toks", 256)
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        tokens = self.encode(context) or [self.tokenizer.eot_token]
        # leave room for the answer; where there is none, the oldest tokens leave on the way
        room = self.size - most if most < self.size else max(1, self.size // 2)
        self.cut += len(tokens) > room
        idx = torch.tensor([tokens[-room:]], device=self.model.wte.weight.device)  # (1, T)
        start, text, cache = idx.shape[1], "", None if self.alone else [[] for _ in self.model.h]
        while idx.shape[1] < start + most and not any(stop in text for stop in stops):
            new = self.model.next_logits(idx, cache).argmax(-1, keepdim=True)  # (1, 1)
            if new.item() == self.tokenizer.eot_token:
                break
            idx = torch.cat((idx, new), 1)
            text = self.tokenizer.decode(idx[0, start:].tolist())
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def harness_model(model: GPT, batch_size: int, alone: bool) -> Scorer:
    """Return a Scorer that is a model of lm_eval, too."""
    class Model(Scorer, _optional("lm_eval.api.model").LM):
        pass
    return Model(model, batch_size, alone)


# -----------------------------------------------------------------------------
# tasks: lm_eval's definitions, with documents from the hub or from files

def find_file(folder: Path, task: str, split: str = "") -> Path | None:
    """Find TASK.jsonl, or TASK_test, _val or _dev, in a folder or one below; with a split only TASK_split.jsonl."""
    stems = [f"{task}_{split}"] if split else [
        task, *(task.removesuffix("_openai") + which for which in ("", "_test", "_val", "_dev"))]
    names = [f"{stem}.jsonl" for stem in stems]
    names += ["wiki.test.raw"] if task == "wikitext" and not split else []
    places = (f"{where}{name}" for name in names for where in ("", "*/"))
    return next((path for place in places for path in sorted(folder.glob(place))), None)


def read_documents(path: Path, task: str) -> list[dict]:
    """Read documents in the hub's columns. ValueError, with the line: no JSON object, other columns than line 1."""
    documents, number = [], 0
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".raw":
            return [{"page": page} for page in pages(text)]
        for line in text.split("\n"):
            number += 1
            if line.strip():
                documents.append(hub_columns(json.loads(line), task))
                kinds, first = ({name: type(value).__name__ for name, value in document.items()}
                                for document in (documents[-1], documents[0]))
                if kinds != first:
                    raise TypeError(f"its columns are {kinds}, the first document's {first}")
        if not documents:
            raise ValueError("it is empty")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}, line {number} is no document of {task} ({reason}); each line must "
                         "be a JSON object with the columns of the hub") from None
    return documents


def hub_columns(document: dict, task: str) -> dict:
    """Return a document in the hub's columns; two common layouts have others, with a little less in them."""
    if task == "hellaswag" and "ctx_a" not in document:
        return document | {"ctx_a": document["ctx"], "ctx_b": ""}  # joined: no ctx_b to capitalise
    if task in ("arc_easy", "arc_challenge") and "query" in document:
        labels = dict(enumerate("ABCDE"[:len(document["choices"])]))
        return {"question": document["query"].removeprefix("Question: "),
                "choices": {"text": document["choices"], "label": list(labels.values())},
                "answerKey": labels[document["gold"]]}
    return dict(document.items())


def pages(text: str) -> list[str]:
    """Cut WikiText's file into articles, which begin with a line = Title =, as the hub's wikitext_document_level."""
    articles, lines = [], []
    for line in text.split("\n"):
        title = line.replace("= = =", "===").replace("= =", "==").strip()
        if title.startswith("= ") and title.endswith(" ="):
            articles.append("\n".join(lines))
            lines = []
        lines.append(line)
    return [article for article in (*articles, "\n".join(lines)) if article.strip()]


def local_source(path: Path, examples: Path | None, task: str) -> dict:
    """Return what files of documents, and of examples for --shots, replace in lm_eval's definition of a task."""
    files = {"test": path} | ({"train": examples} if examples else {})
    splits = {split: _optional("datasets").Dataset.from_list(read_documents(file, task))
              for split, file in files.items()}
    # where both come from the test split, lm_eval leaves the document in question out of its examples
    return {"custom_dataset": lambda **_: splits, "test_split": "test", "validation_split": None,
            "training_split": "train" if examples else None,
            "fewshot_split": "train" if examples else "test"}


def load_tasks(names: list[str], task_dir: str) -> dict[str, Any]:
    """Return lm_eval's tasks by name. ValueError: a name that it does not know, documents that do not fit."""
    lm_eval, folder, tasks = _optional("lm_eval.tasks"), Path(task_dir), {}
    _optional("datasets").disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of its own defaults
    folders = [Path(lm_eval.__file__).parent / name for name in FOLDERS]
    manager = lm_eval.TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        manager = lm_eval.TaskManager()
    for name in names:
        if name not in manager.all_subtasks:
            near = get_close_matches(name, manager.all_subtasks) or ["see `lm-eval ls tasks`"]
            raise ValueError(f"--tasks={name} is no task of lm_eval; near it: {', '.join(near)}")
        path = find_file(folder, name) if task_dir else "the hub"
        if path is None:
            raise FileNotFoundError(f"--task_dir={task_dir} has no {name}.jsonl; make it: the documents "
                                    "of the hub, one JSON object a line")
        try:
            source = local_source(path, find_file(folder, name, "train"), name) if task_dir else {}
            tasks |= manager.load({"group": "ours", "task": [{"task": name, **source}]})["tasks"]
            for number, document in enumerate(tasks[name].eval_docs if task_dir else ()):
                check_document(tasks[name], document, number)
        except Exception as error:  # templates raise whatever they come upon
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "give it the hub's columns" if task_dir else "without a network use --task_dir"
            raise ValueError(f"no documents of {name} from {path} ({reason}); {hint}") from None
    return tasks


def check_document(task: Any, document: dict, number: int) -> None:
    """Refuse a document that a template fails on, or whose answer is no choice: lm_eval would count it as wrong."""
    task.doc_to_text(document)
    target = task.doc_to_target(document)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(document)
        if target not in (range(len(choices)) if isinstance(target, int) else choices):
            raise ValueError(f"document {number}: {target!r} is none of its {len(choices)} choices")


# -----------------------------------------------------------------------------
# a run

def run(lm: Scorer, tasks: dict[str, Any], config: EvalConfig, seed: int) -> tuple[dict, dict]:
    """Evaluate tasks once: {task: {n, metric: value}}, and {task: [{id, ll or text, greedy, gold}]}."""
    for name, task in tasks.items():
        fixed = task.get_config("num_fewshot")
        if config.shots and (fixed == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling"):
            raise ValueError(f"--shots={config.shots} has no effect on {name}; evaluate it without")
        if config.shots and config.shots >= (most := len(task.sampler.df)):
            raise ValueError(f"--shots={config.shots} must be below the {most} examples of {name}")
        task.set_config("num_fewshot", config.shots or fixed or 0)
        task.set_fewshot_seed(seed)
    found = _optional("lm_eval.evaluator").evaluate(
        lm, {"tasks": tasks}, limit=config.limit or None, bootstrap_iters=0)
    results, samples = {}, {}
    for name, task in tasks.items():
        results[name] = {"n": found["n-samples"][name]["effective"]} | {
            key.split(",")[0]: value for key, value in found["results"][name].items()
            if "," in key and "_stderr" not in key}  # "acc,none": a metric and its filter
        logged = sorted(found["samples"][name], key=lambda document: document["doc_id"])
        samples[name] = [sample(document, task.OUTPUT_TYPE) for document in logged]
        if config.shots:
            samples[name] = [s | {"seed": seed} for s in samples[name]]
    return results, samples


def sample(document: dict, kind: str) -> dict:
    """Shorten what lm_eval logs of a document. Args: kind: of its requests."""
    answers = [several[0] for several in document["resps"]]
    if kind == "generate_until":
        return {"id": document["doc_id"], "text": answers, "gold": document["target"]}
    if kind == "loglikelihood_rolling":  # its target is the whole text
        return {"id": document["doc_id"], "ll": answers, "greedy": [], "gold": None}
    ll, greedy = zip(*answers, strict=True)
    return {"id": document["doc_id"], "ll": ll, "greedy": greedy, "gold": document["target"]}


def evaluate(config: EvalConfig, model: GPT, batch_size: int, alone: bool, meta: dict) -> None:
    """Print what the model makes of --tasks, and write it to --json. Args: alone: see Scorer.  meta: for that file."""
    names = [name for name in config.tasks.replace(" ", "").split(",") if name]
    names = list(dict.fromkeys("lambada_openai" if name == "lambada" else name for name in names))
    if not names:
        raise ValueError(f"--tasks={config.tasks} names no task; as lambada_openai,hellaswag")
    if config.json and not Path(config.json).absolute().parent.is_dir():
        raise FileNotFoundError(f"--json={config.json}: there is no such folder; make it first")
    lm, tasks = harness_model(model, batch_size, alone), load_tasks(names, config.task_dir)
    if alone:
        print("tokens share scales under this recipe: requests are scored one at a time")
    if lm.tokenizer.name == "bytes":
        print(f"tokens are bytes: contexts end {lm.size} bytes back, lambada's acc wants every byte; "
              "of these numbers only bits_per_byte compares with models of other tokens")
    # (1) once, or once for each drawing of examples; the first seed is lm_eval's own
    start, seeds, results = time.perf_counter(), [1234 + i for i in range(config.seeds)], {}
    runs = [run(lm, tasks, config, seed) for seed in seeds]
    seconds = time.perf_counter() - start
    # (2) mean and standard deviation over the drawings
    for name in tasks:
        values = {key: [once[name][key] for once, _ in runs] for key in runs[0][0][name]}
        results[name] = {"n": values.pop("n")[0]}
        for key, v in values.items():
            results[name] |= {key: statistics.fmean(v)}
            if config.seeds > 1:
                results[name] |= {f"{key}_std": statistics.stdev(v)}
        print(f"{name}: " + ", ".join(f"{key} {v:,.4f}" if key != "n" else f"n {v:,}"
                                      for key, v in results[name].items()))
    print(f"{lm.answered:,} requests in {seconds:.1f} s, {lm.answered / seconds:,.0f} a second; "
          f"{lm.cut:,} contexts were cut to {lm.size} tokens")
    # (3) the same for machines
    if config.json:
        commit = shutil.which("git") and subprocess.run(
            ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"],
            capture_output=True, text=True).stdout.strip()
        about = {"commit": commit or "", "torch": torch.__version__,
                 "lm_eval": _optional("lm_eval").__version__, "tokenizer": lm.tokenizer.name,
                 "block_size": lm.size, "batch_size": lm.batch_size, "task_dir": config.task_dir,
                 "limit": config.limit, "shots": config.shots, "seeds": seeds,
                 "requests": lm.answered, "cut": lm.cut, "seconds": round(seconds, 1)}
        written = {"meta": meta | about, "results": results}
        if config.samples:
            written["samples"] = {name: [s for _, samples in runs for s in samples[name]]
                                  for name in tasks}
        Path(config.json).write_text(json.dumps(written, indent=1) + "\n")
