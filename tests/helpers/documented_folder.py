"""A folder in which the commands of the pages run in seconds: the checkout's programs, its recipes with tiny models,
and whatever a page takes for granted, made when a command first asks for it.

Nothing in a command is changed. A recipe keeps its name, architecture, optimizer and schedule; its model and its
batches are small, and it needs no GPU. Commands that only look at a recipe look at the checkout's own.
"""

from __future__ import annotations

import argparse
import email.message
import inspect
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
import zstandard
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron.data.tokenizer import END_OF_DOCUMENT
from tests.helpers.documentation import Program, SavedFile, Step
from tests.helpers.eval_models import train_tokenizer
from tests.helpers.forkserver import ROOT
from tests.helpers.loss_curves import LARGE, SMALL, CurveWriter
from tests.helpers.neox_writer import neox_weights, write_neox
from tests.helpers.neox_yamls import write_neox_yamls
from tests.helpers.report_runs import write_results
from tests.helpers.typed_commands import run_python

OUTPUTS = r"(\bsave=|--output[-_]dir |--output[-_]prefix |--output |--write-config |eval_output=)[^ ]*"
"""What a command writes."""
LOOKS = r"(-d configs|configs/(?!inheritune/demo)).*--(check|plan|print-effective-config|list|dry-run)\b"
"""Commands that compute nothing of a recipe."""
PROGRAMS = ("deepy.py", "train.py", "eval.py", "generate.py", "megatron", "tools", "requirements")
WIDTH, LAYERS, VOCABULARY = 32, 4, 640
LENGTH, SHORTER = 128, 32
"""Tokens of a sequence; fewer where a model has as many parameter tokens as a published one."""
SMALLER: dict[str, object] = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_kv_heads": 4,
    "ffn_hidden_size": 88,
    "padded_vocab_size": VOCABULARY,
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 1,
    "eval_iters": 1,
    "num_workers": 0,
    "extra_save_iters": "[0, 1]",
    "maximum_tokens": 8,
    "precision": "fp32",
    "model_parallel_size": 1,
}
"""Values of a recipe's top level; `tiny` has those that depend on what stands there. Parameter tokens stay as many."""
MOST_STEPS, FEW_STEPS = 120, 24
"""Steps of the demo, and of recipes that have more than 1,000."""
TEXT = "\n\n".join(map(inspect.getsource, (argparse, textwrap, email.message)))


class DocumentedFolder:
    """A folder beside nobody's own files, in which a reader follows a page."""

    def __init__(self, folder: Path, shared: DocumentedFolder | None = None) -> None:
        """Copies what is taken for granted from `shared`, which makes it once for all pages, where one is given."""
        self.folder = folder
        self.shared = shared
        folder.mkdir(parents=True, exist_ok=True)
        for name in PROGRAMS:
            (folder / name).symlink_to(ROOT / name)
        write_neox_yamls(folder / "neox_yamls")
        for configs in (folder / "configs", folder / "as_shipped" / "configs"):
            shutil.copytree(ROOT / "configs", configs)
            for path in (folder / "neox_yamls").glob("*.yml"):
                shutil.copy(path, configs)
        (folder / "as_shipped" / "deepy.py").symlink_to(ROOT / "deepy.py")
        (folder / "as_shipped" / "tools").symlink_to(ROOT / "tools")
        for path in (folder / "configs").rglob("*.yml"):
            text = path.read_text(encoding="utf-8")
            if re.search("^hidden_size:", text, re.MULTILINE):
                path.write_text(tiny(text), encoding="utf-8")

    def follow(self, step: Step) -> str:
        """Does what a page says, after what it takes for granted; returns the output. Fails where a program does."""
        if isinstance(step, SavedFile):
            for folder in (self.folder, self.folder / "as_shipped"):
                (folder / step.name).parent.mkdir(parents=True, exist_ok=True)
                (folder / step.name).write_text(step.text, encoding="utf-8")
            self.provide(step.text)
            return ""
        if isinstance(step, Program):
            self.provide(step.text)
            return self.run("python -c " + shlex.quote(step.text))
        line = shlex.join(step.words)
        self.provide(line)
        return self.run(line)

    def run(self, line: str) -> str:
        """Runs a command; returns what it printed."""
        program, *words = shlex.split(line, comments=True)
        if words[:1] != ["-c"]:
            words = [name for word in words for name in self._files(word)]
        if program != "python":
            words = ["-m", program, *words]
        ended = run_python(words, self.folder / "as_shipped" if re.search(LOOKS, line) else self.folder)
        assert ended.code == 0, f"{line}\nended with {ended.code}\n{ended.output}"
        return ended.output

    def _files(self, word: str) -> list[str]:
        """Returns what a shell makes of a word."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob(word)) if "*" in word else [word]

    def provide(self, text: str) -> None:
        """Makes what a command or a program reads, unless it is there."""
        inputs = re.sub(OUTPUTS, "", text)
        for given in GIVENS:
            if given.is_read_by(inputs) and not (self.folder / given.name).exists():
                self._provide(given)

    def _provide(self, given: Given) -> None:
        path = self.folder / given.name
        if self.shared is not None:
            self.shared.provide(given.name)
            source = self.shared.folder / given.name
            path.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, path)
            return
        self.provide(" ".join(given.needs))
        if isinstance(given.make, str):
            self.provide(given.make)
            self.run(given.make)
        else:
            given.make(self.folder)
        assert path.exists(), given


def tiny(text: str) -> str:
    """Returns a recipe with a tiny model."""
    text = re.sub(r"^(fp16|bf16):\n(  .*\n)+", "", text, flags=re.MULTILINE)
    text = re.sub(
        r"^attention_config: \[\[\[\"(\w+)\"\], \d+\]\]",
        rf'attention_config: [[["\1"], {LAYERS}]]',
        text,
        flags=re.MULTILINE,
    )
    length = SHORTER if "padded_vocab_size" in text and "qkv_slot_num" in text else LENGTH
    for key, value in (SMALLER | {"seq_length": length, "max_position_embeddings": length}).items():
        text = re.sub(rf"^{key}: .*$", f"{key}: {value}", text, flags=re.MULTILINE)

    def capped(match: re.Match[str]) -> str:
        key, value = match[1], int(match[2])
        if key == "num_layers":
            return f"{key}: {min(value, LAYERS)}"
        return f"{key}: {FEW_STEPS if value > 1000 else min(value, MOST_STEPS)}"

    return re.sub(r"^(num_layers|train_iters|lr_decay_iters): (\d+)", capped, text, flags=re.MULTILINE)


def _write_texts(folder: Path) -> None:
    documents = [json.dumps({"text": part}) + "\n" for part in TEXT.split("\n\n") if part.strip()]
    (folder / "my.jsonl").write_text("".join(documents[:-4]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("".join(documents[-4:]), encoding="utf-8")
    (folder / "corpus.jsonl.zst").write_bytes(zstandard.compress((folder / "my.jsonl").read_bytes()))
    (folder / "my.txt").write_text(TEXT, encoding="utf-8")
    (folder / "book.txt").write_text(TEXT, encoding="utf-8")
    (folder / "prompts.txt").write_text("The list of\nA parser\n", encoding="utf-8")


def _write_tokenizers(folder: Path) -> None:
    train_tokenizer(folder / "tokenizer.json")
    (folder / "data").mkdir(exist_ok=True)
    for name in ("20B", "gpt2", "open_llama"):
        shutil.copy(folder / "tokenizer.json", folder / "data" / f"{name}_tokenizer.json")


def _settings(folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    """Returns the keys of one of the folder's recipes, with its data."""
    files = (folder / "configs" / name, folder / "configs" / "data" / "pile.yml")
    recipe, data = (yaml.safe_load(path.read_text(encoding="utf-8")) for path in files)
    return recipe | data | keys


def _write_published(folder: Path) -> None:
    """Writes weights with the names and shapes that the TokenFormer release gives the folder's 150M."""
    settings = _settings(folder, "tokenformer/150M.yml", architecture="tokenformer")
    source = write_neox(folder / "release", neox_weights(settings, VOCABULARY), settings, "bin")
    shutil.move(source, folder / "pytorch_model.bin")
    (folder / "published").mkdir()
    shutil.copy(folder / "pytorch_model.bin", folder / "published")
    shutil.copy(folder / "tokenizer.json", folder / "published")


def _write_neox(folder: Path) -> None:
    settings = _settings(folder, "pythia/160M.yml", architecture="gpt_neox")
    step = write_neox(folder / "neox", neox_weights(settings, VOCABULARY), settings, "layers", tensor=2)
    step.rename(folder / "neox" / "global_step143000")
    (folder / "neox" / "latest").write_text("global_step143000")


def _write_llama(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=88, num_hidden_layers=LAYERS + 2,
        num_attention_heads=4, max_position_embeddings=LENGTH,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "open_llama_3b")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=END_OF_DOCUMENT)
    tokenizer.save_pretrained(folder / "open_llama_3b")


def _write_curves(folder: Path) -> None:
    """Writes runs whose losses are known: a small one that grew, and one from scratch with either seed."""
    (folder / "runs" / "wsd").mkdir(parents=True, exist_ok=True)
    writer = CurveWriter(folder / "runs")
    writer.write("wsd/small", SMALL, lambda step: 4.0 - 0.001 * step, range(10, 201, 10))
    writer.write("wsd/large", LARGE, lambda step: 3.9 - 0.001 * step, range(210, 301, 10))
    for seed in (1, 2):
        writer.write(f"scratch-{seed}", LARGE, lambda step: 4.1 - 0.001 * step, range(10, 301, 10), seed=seed)


def _write_results(folder: Path) -> None:
    (folder / "eval_results").mkdir()
    for step in (200, 400):
        write_results(folder / "eval_results" / f"{step}.json", step, step / 1000)


def _train(name: str, recipe: str) -> str:
    return f"python deepy.py train.py configs/{recipe}.yml configs/data/pile.yml save={name}"


def _tokenize(prefix: str) -> str:
    words = "--tokenizer-type HFTokenizer --vocab-file tokenizer.json --append-eod"
    return f"python tools/datasets/preprocess_data.py --input my.jsonl --output-prefix {prefix} {words}"


def _export(run: str, folder: str) -> str:
    return f"python tools/ckpts/convert_neox_to_hf.py {run} --output_dir {folder}"


@dataclass(frozen=True)
class Given:
    """A file or a folder that a page takes for granted."""

    name: str
    make: str | Callable[[Path], None]
    """Command that makes it, or a function of the folder."""
    pattern: str = ""
    """Pattern of commands that read it, beside those that name it."""
    needs: tuple[str, ...] = ()
    """Names of what is read to make it, where no command says so."""

    def is_read_by(self, text: str) -> bool:
        """Tells whether a command or a program reads this."""
        pattern = rf"(?<![\w/.]){re.escape(self.name)}(?![\w.])"
        return bool(re.search(f"{pattern}|{self.pattern}" if self.pattern else pattern, text))


DEMO = "python tools/datasets/prepare_data.py --text my.txt --output-dir demo/data --vocab-size 512"
THE_PILE = r"data/pile\b(?!_)|configs/(tokenformer|pythia)|150M|160M|410M|1-5B|local_setup|pythia-1b\.yml"
REDPAJAMA = r"data/redpajama|open_llama_3b"
GIVENS = (
    *(
        Given(name, _write_texts)
        for name in ("my.jsonl", "my.txt", "held_out.jsonl", "corpus.jsonl.zst", "book.txt", "prompts.txt")
    ),
    Given("tokenizer.json", _write_tokenizers),
    *(
        Given(f"data/{name}_tokenizer.json", _write_tokenizers, pattern)
        for name, pattern in (("20B", THE_PILE), ("open_llama", REDPAJAMA))
    ),
    Given("data/pile", _tokenize("data/pile/pile"), THE_PILE),
    Given("data/redpajama", _tokenize("data/redpajama/redpajama"), REDPAJAMA),
    Given("data/pile_shards", _tokenize("data/pile_shards/part")),
    Given("demo/data", DEMO, r"configs/(inheritune/)?demo\.yml|demo/run|runs/(a|b|elastic)\b"),
    Given("demo/run", "python deepy.py train.py configs/demo.yml", r"configs/inheritune/demo\.yml"),
    *(Given(f"runs/{name}", f"python deepy.py train.py configs/demo.yml save=runs/{name}") for name in ("a", "b")),
    Given(
        "runs/elastic",
        "python deepy.py train.py configs/demo.yml save=runs/elastic 'elastic.shares=[0.5, 1]' train_iters=40",
    ),
    Given("runs/150M", _train("runs/150M", "tokenformer/150M")),
    Given("runs/160M", _train("runs/160M", "pythia/160M")),
    Given("runs/410M", _train("runs/410M", "pythia/410M")),
    Given("pythia-70m", _export("runs/160M", "pythia-70m"), needs=("runs/160M",)),
    Given("gpt2-medium", _export("runs/160M", "gpt2-medium"), needs=("runs/160M",)),
    Given("open_llama_3b", _write_llama, needs=("tokenizer.json",)),
    Given("pytorch_model.bin", _write_published, needs=("tokenizer.json",)),
    Given("published", _write_published, "published/", needs=("tokenizer.json",)),
    Given("neox/global_step143000", _write_neox),
    Given("runs/scratch-1", _write_curves),
    Given("runs/scratch-2", _write_curves),
    Given("runs/wsd", _write_curves, r"runs/wsd/\w+"),
    Given("eval_results", _write_results, r"eval_results/\*"),
)
