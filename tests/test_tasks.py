"""Downstream tasks: every log-likelihood is the plain forward's, every task lm_eval's own, every bad file one line."""

import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from eval import generate
from extensions import tasks
from extensions.tasks import Scorer, find_file, hub_columns, pages, read_documents, windows
from model import GPT, GPTConfig, quant_linears
from quant import QuantConfig

SIZE = 16  # the models' context
RECIPES = {"fp32": {}, "w8a8": {"wbits": 8, "abits": 8, "quant_head": True},
           "per_tensor": {"wbits": 4, "abits": 4, "agran": "per_tensor", "quant_head": True}}
# context and continuation: blanks between, no ASCII, a tie, no context, only blanks, one too long, both too long
PAIRS = [("The cat sat ", "on a mat"), ("The cat sat", " on a mat"), ("a \n", "b"), ("Stra\u00dfe", " \u4f60\u597d"),
         ("tie", " yes"), ("tie", " yes"), ("tie", " no"), ("", "begins"), ("", "<|endoftext|>begins"), ("  ", "x"),
         ("x", ""), ("much too long a context " * 3, "ends"), ("ab", "a continuation that is much longer than that"),
         ("much too long a context " * 3, "before a continuation that is too long as well"), ("b", "c" * SIZE)]


def gpt(name="fp32", dtype=torch.float32, vocab_size=257, size=SIZE):
    """A small GPT of bytes, whose padding columns tower above all others."""
    torch.manual_seed(0)
    linear = quant_linears(QuantConfig(**RECIPES[name]), 2)
    model = GPT(GPTConfig(2, 2, 32, size, dropout=0.5), vocab_size, linear, dtype)
    for p in model.parameters():
        p.data.mul_(5)
    model.wte.weight.data[vocab_size:] = 3
    return model.to(dtype)


def asked(*args):
    """Make requests as lm_eval does."""
    return [SimpleNamespace(args=a) for a in args]


def by_hand(model, context, continuation):
    """Score tokens one by one in float64: each sees what fits of its window, which begins every SIZE tokens anew."""
    tokens, ll, greedy = context + continuation, 0.0, True
    for i in range(len(context), len(tokens)):
        stop = min(len(context) + (i - len(context)) // SIZE * SIZE + SIZE, len(tokens))
        logits = model.eval()(torch.tensor([tokens[max(0, stop - SIZE - 1):i]]))[0, -1, :model.vocab_size]
        ll += logits.double().log_softmax(-1)[tokens[i]].item()
        greedy &= logits.argmax().item() == tokens[i]
    return ll, greedy


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_log_likelihoods_are_the_plain_forwards(name, monkeypatch):
    """At any batch size, order and chunk of logits: the unbatched forward, token by token; equal requests tie."""
    scorer = Scorer(gpt(name), 3)
    pairs = [scorer.pair(*p) for p in PAIRS]
    if name == "per_tensor":  # tokens of a forward share scales, so that each is whole
        reference = [sum(scorer.model(torch.tensor([piece[:-1]]))[0, :, :257].double().log_softmax(-1)[
            range(-n, 0), piece[-n:]].sum().item() for piece, n in windows(*pair, SIZE)) for pair in pairs]
    else:
        reference = [by_hand(gpt(name, torch.float64), *pair)[0] for pair in pairs]
    for batch_size, rows in ((1, 1000), (3, 2), (100, 7)):
        monkeypatch.setattr(tasks, "CHUNK", rows * 320)
        scorer = Scorer(gpt(name), batch_size, alone=name == "per_tensor")
        found = [ll for ll, _ in scorer.loglikelihood(asked(*PAIRS))]
        assert found == pytest.approx(reference, abs=2e-4, rel=1e-6)
        assert found[4] == found[5] and found[10] == 0.0
        assert [ll for ll, _ in scorer.loglikelihood(asked(*PAIRS[::-1]))][::-1] == found
    assert scorer.answered == 2 * len(PAIRS) and scorer.cut == 2 * sum(
        len(b) <= SIZE < len(a) + len(b) - 1 for a, b in pairs) > 0


@torch.no_grad()
def test_greedy_and_rolling():
    """What the model writes by itself is greedy, its last byte changed is not; a text is scored behind end-of-text."""
    model = gpt()
    scorer = Scorer(model, 4)
    text = generate(model, torch.tensor([[256]]), 5 * SIZE, temperature=0)[0].tolist()
    other = text[2:SIZE - 1] + [text[SIZE - 1] ^ 1]
    assert [greedy for _, greedy in scorer.score([(text[:2], text[2:SIZE]), (text[:2], other)])] == [True, False]
    long = "rolling through windows, each byte once \u00e9"
    found = scorer.loglikelihood_rolling(asked(("",), ("ab",), (long,)))
    assert found[0] == 0.0 and found[1:] == pytest.approx(
        [by_hand(gpt(dtype=torch.float64), [256], list(t.encode()))[0] for t in ("ab", long)], abs=1e-4)


@pytest.mark.parametrize("name", ["fp32", "w8a8"])
def test_the_cache_changes_nothing(name):
    """In float64, the same logits with and without the keys and values of the past, into the window that slides."""
    model, idx = gpt(name, torch.float64).eval(), torch.randint(257, (3, 5), generator=torch.Generator().manual_seed(1))
    plain = generate(model, idx, 2 * SIZE, seed=3)
    assert torch.equal(plain, generate(model, idx, 2 * SIZE, seed=3, cached=True))
    cache = [[] for _ in model.h]
    with torch.no_grad():
        for t in range(5, SIZE + 3):
            torch.testing.assert_close(model.next_logits(plain[:, :t], cache), model.next_logits(plain[:, :t]))
    assert cache[0][0].shape[2] == SIZE


def test_generate_until():
    """Greedy text up to a stop sequence, end-of-text or the longest allowed; contexts leave room for it."""
    scorer, alone = Scorer(gpt(), 1), Scorer(gpt(), 1, alone=True)

    def plain(context, n):
        ids = generate(scorer.model, torch.tensor([context]), n, temperature=0)[0, len(context):].tolist()
        ids = ids[:ids.index(256)] if 256 in ids else ids
        return scorer.tokenizer.decode(ids)
    whole = plain(list(b"abc"), 12)
    requests = [("abc", {"max_gen_toks": 12}), ("abc", {"until": [whole[4:6], ""], "max_gen_toks": 12}),
                ("abc", {"until": whole[2], "max_gen_toks": 12}), ("", {"max_gen_toks": 3}),
                ("long " * 9, {"max_gen_toks": 6}), ("long " * 9, {"max_gen_toks": 2 * SIZE})]
    expected = [whole, whole.split(whole[4:6])[0], whole.split(whole[2])[0], plain([256], 3),
                plain(list(b"long " * 2), 6), plain(list(b"ng long "), 2 * SIZE)]
    assert scorer.generate_until(asked(*requests)) == alone.generate_until(asked(*requests)) == expected
    assert scorer.cut == 2
    with pytest.raises(ValueError, match="do_sample"):
        scorer.generate("a", {"do_sample": True})


# -----------------------------------------------------------------------------
# files of documents

DOCUMENTS = {  # the hub's columns
    "lambada_openai": [{"text": f"In the end he saw the {word}"} for word in ("sea", "sun", "caf\u00e9", "sea")],
    "hellaswag": [{"ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Roof", "label": str(i),
                   "endings": ["[step] sings.", "sleeps.", "sings.", "is a roof."]} for i in range(3)],
    "arc_easy": [{"question": "Why?", "choices": {"text": ["so", "so", "no"], "label": ["1", "2", "3"]},
                  "answerKey": key} for key in "123"],
    "wikitext": [{"page": " = A title = \n\n Some text , with 1 @,@ 000 words . \n"}, {"page": "short"}],
    "sst2": [{"sentence": f"a film {i}", "label": i % 2} for i in range(5)],
    "mnli": [{"premise": "It rains.", "hypothesis": "It pours", "label": i} for i in range(3)]}


def write(folder, name, documents):
    """Write a file of documents."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(d) + "\n" for d in documents))


def test_other_layouts(tmp_path):
    """HellaSwag with joined contexts, ARC as queries, and raw WikiText become the hub's columns; files are found."""
    joined = {"ctx": "A man. he", "activity_label": "Roof", "endings": ["a", "b"], "label": 1}
    assert hub_columns(joined, "hellaswag") == joined | {"ctx_a": "A man. he", "ctx_b": ""}
    assert hub_columns({"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}, "arc_easy") == {
        "question": "Why?", "answerKey": "B", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    text = " \n = A = \n \n one \n = = B = = \n two \n = C = \n three \n"
    assert pages(text) == [" = A = \n \n one \n = = B = = \n two ", " = C = \n three \n"]
    for name, task in (("a/lambada_test.jsonl", "lambada_openai"), ("b/sst2.jsonl", "sst2"),
                       ("c/wiki.test.raw", "wikitext"), ("sst2_train.jsonl", "rte")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        assert find_file(tmp_path, task) == (None if task == "rte" else tmp_path / name)
    assert find_file(tmp_path, "sst2", "train") == tmp_path / "sst2_train.jsonl"
    assert read_documents(tmp_path / "c/wiki.test.raw", "wikitext")[-1] == {"page": " = C = \n three \n"}


@pytest.mark.parametrize("text, message", [
    ("", "line 1 .*empty"), ('{"text": "a b"}\n{"text": \n', "line 2 .*JSON"), ("[1]\n", "line 1 "),
    ('{"text": "a b"}\n\n{"txt": "a b"}\n', "line 3 .*txt"), (b"\xff\xfe", ".*utf-8"),
    ('{"text": "a b"}\n{"text": null}\n', "line 2 .*NoneType")])
def test_malformed_files(text, message, tmp_path):
    """A file that holds something else is refused with its line."""
    (tmp_path / "f.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"\A.*f.jsonl, {message}.*hub\Z"):
        read_documents(tmp_path / "f.jsonl", "lambada_openai")
    for task, document in (("hellaswag", {"label": 1}), ("arc_easy", {"query": "?", "choices": ["a"], "gold": -1})):
        with pytest.raises(KeyError):
            hub_columns(document, task)


# -----------------------------------------------------------------------------
# the command line

def test_flags_that_fit(call, run, monkeypatch, tmp_path):
    """What would have no effect, or cannot be, is one line; so is a missing lm_eval."""
    for flags, message in ((["--limit=5"], "--limit=5 has no effect without --tasks"), (["--limit=-1"], "at least 0"),
                           (["--tasks=a", "--seeds=2"], "--seeds=2 has no effect without --shots"),
                           (["--tasks=a", "--samples"], "--samples=True has no effect without --json"),
                           (["--tasks=a", "--export=b"], "--export=b has no effect with --tasks"),
                           (["--hf=a"], "--hf=a needs --dataset"), (["--hf=a", "--tasks=b"], "--hf=a: there is no"),
                           (["--hf=a", "--tasks=b", "--ckpt=c"], "--ckpt=c has no effect with --hf")):
        code, _, err = call(evaluation.main, *flags)
        assert code == 2 and message in err.splitlines()[-1], err
    assert run(tmp_path / "out", "--max_iters=1", "--sample_tokens=0")[0] == 0
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = call(evaluation.main, f"--ckpt={tmp_path}/out", "--tasks=lambada", "--device=cpu")
    assert code == 2 and "pip install lm_eval" in err and len(err.splitlines()) == 1
    with pytest.raises(ValueError, match="the model has 100"):
        Scorer(gpt(vocab_size=100), 1)


def test_tasks_through_lm_eval(call, run, tmp_path):
    """Its definitions on local files: counts, metrics, samples that are the scorer's; shots and seeds; bad files."""
    pytest.importorskip("lm_eval")
    for name, documents in DOCUMENTS.items():
        write(tmp_path / "data", f"{name}.jsonl", documents)
    assert run(tmp_path / "out", "--abits=8", "--agran=per_tensor", "--max_iters=1", "--sample_tokens=0")[0] == 0
    flags = [f"--ckpt={tmp_path}/out", "--device=cpu", f"--task_dir={tmp_path}/data", f"--json={tmp_path}/r.json"]
    code, out, err = call(evaluation.main, *flags, "--samples", "--tasks=lambada,hellaswag,arc_easy,wikitext,mnli")
    assert code == 0 and "one at a time" in out and "tokens are bytes" in out, err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["meta"]["recipe"] == {"abits": 8, "agran": "per_tensor"} and found["meta"]["requests"] == 36
    results, samples = found["results"], found["samples"]
    assert [(name, r["n"]) for name, r in results.items()] == [
        (name, len(documents)) for name, documents in DOCUMENTS.items() if name != "sst2"]
    lls = [s["ll"][0] for s in samples["lambada_openai"]]  # the last document is the first again
    assert results["lambada_openai"]["perplexity"] == pytest.approx(math.exp(-sum(lls) / 4)) and lls[0] == lls[3]
    assert samples["arc_easy"][0]["ll"][0] == samples["arc_easy"][0]["ll"][1] and len(samples["mnli"][0]["ll"]) == 3
    assert [s["gold"] for s in samples["hellaswag"]] == [0, 1, 2] and results["arc_easy"]["acc_norm"] in (0, 1/3, 2/3)
    nats, size = -sum(s["ll"][0] for s in samples["wikitext"]), sum(len(d["page"]) for d in DOCUMENTS["wikitext"])
    assert results["wikitext"]["bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    code, _, err = call(evaluation.main, *flags, "--tasks=sst2", "--shots=2", "--seeds=3", "--limit=4", "--samples")
    found = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 and found["results"]["sst2"].keys() == {"n", "acc", "acc_std"}, err
    assert [s["seed"] for s in found["samples"]["sst2"]] == [1234] * 4 + [1235] * 4 + [1236] * 4
    for name, documents in (("qnli", [{"question": "a", "sentence": "b"}]), ("mrpc", [{"sentence1": "a", "label": 0}]),
                            ("rte", [{"sentence1": "a", "sentence2": "b", "label": i} for i in (0, 2)])):
        write(tmp_path / "data", f"{name}.jsonl", documents)
    for more, message in ((["--tasks=qnli"], "qnli.jsonl"), (["--tasks=rte"], "document 1: 2 is none of its 2 choices"),
                          (["--tasks=mrpc"], "sentence2"), (["--tasks=wnli"], "has no wnli.jsonl"),
                          (["--tasks=sst2", "--shots=5"], "below the 5 examples"),
                          (["--tasks=wikitext", "--shots=1"], "no effect on wikitext"),
                          (["--tasks=sst2", f"--json={tmp_path}/no/r.json"], "no such folder")):
        code, _, err = call(evaluation.main, *flags, *more)
        assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err, err


@pytest.mark.parametrize("size", [64, 256])
def test_equals_lm_evals_hugging_face_model(size, tmp_path):
    """On the exported folder of a model with GPT-2's tokens: every request, whole texts, and greedy text."""
    pytest.importorskip("accelerate")
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    from support.huggingface import export_hf
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("needs GPT-2's vocabulary, and no network: set TIKTOKEN_CACHE_DIR")
    model = gpt(vocab_size=50257, size=size)
    export_hf(model, tmp_path)
    # logits_cache mixes up windows with the same input that score different numbers of tokens
    theirs = HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=4, logits_cache=False)
    ours = Scorer(model, 3)
    pairs = [p for p in PAIRS if "x" not in p] + [("word " * 400, " end"), ("x", " w" * size), ("ab", "ab")]
    texts = [("short",), ("a text of many words \u00e9 " * 80,)]
    found = [ll for ll, _ in ours.loglikelihood(asked(*pairs))] + ours.loglikelihood_rolling(asked(*texts))
    expected = [ll for ll, _ in theirs.loglikelihood(asked(*pairs))] + theirs.loglikelihood_rolling(asked(*texts))
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)
    texts = asked(*((text, {"until": ["e"], "max_gen_toks": 20, "do_sample": False}) for text in ("A", "word " * 400)))
    assert ours.generate_until(texts) == theirs.generate_until(texts)
