"""Trains the bundled tiny model: a real Qwen3 of two million parameters, fed with Python's own documentation.

Everything it reads ships with the interpreter, so a rebuild downloads nothing. One command makes the whole folder:

    nice python models/train_tiny.py --out models/tiny

Corpus, tokenizer and order of training are seeded and sorted. Equal weights need the same Python patch release, the
same torch build, the same kind of CPU and NUM_THREADS threads; another Python reads slightly other documentation.
"""

import argparse
import ast
import builtins
import collections
import inspect
import itertools
import json
import math
import pydoc_data.topics
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import jinja2
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

SEED = 0
NUM_THREADS = 2
VOCAB_SIZE = 2048
WINDOW = 1024
PEAK_LR = 5e-3
WARMUP_STEPS = 50

END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

BUILTIN_TYPES = [bytes, complex, dict, float, frozenset, int, list, range, set, slice, str, tuple]
# fmt: off
MODULES = [
    "ast", "base64", "bisect", "calendar", "collections/__init__", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "enum", "fnmatch", "fractions", "functools", "glob", "gzip", "heapq", "json/__init__",
    "json/decoder", "json/encoder", "keyword", "linecache", "logging/__init__", "os", "pathlib", "pickle",
    "posixpath", "pprint", "queue", "random", "re/__init__", "sched", "secrets", "shelve", "shlex", "shutil",
    "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "timeit", "traceback", "types",
    "urllib/parse", "uuid", "warnings", "weakref", "zipfile",
]
# fmt: on

GREETINGS = [
    ("Hello!", "Hello! I am a tiny language model that has read some of Python's documentation. What shall I explain?"),
    ("Hi, who are you?", "I am a tiny language model. I know a few pages of Python's documentation, and nothing else."),
    ("What can you do?", "I can recite the documentation of Python's statements, built-in functions and some modules."),
    ("Thank you!", "You are welcome. Ask me about another function or statement of Python."),
]
QUESTIONS = ["Explain `{}`.", "What does `{}` do?", "Tell me about `{}`."]


def source_docstrings(module: str) -> Iterator[tuple[str, list[str]]]:
    """Each top-level definition of a stdlib module with its docstrings: its own, then those of what it contains."""
    path = Path(sysconfig.get_path("stdlib"), f"{module}.py")
    name = "os.path" if module == "posixpath" else module.removesuffix("/__init__").replace("/", ".")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield name, [ast.get_docstring(tree) or ""]
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in tree.body:
        if isinstance(node, documented):
            inner = [ast.get_docstring(child) or "" for child in ast.walk(node) if isinstance(child, documented)]
            yield f"{name}.{node.name}", inner


def builtin_docstrings() -> Iterator[tuple[str, list[str]]]:
    """The built-in functions, exceptions and methods, which have no Python source to read."""
    for name, value in sorted(vars(builtins).items()):
        if callable(value) and not name.startswith("_"):
            yield name, [inspect.cleandoc(value.__doc__ or "")]
    for kind in BUILTIN_TYPES:
        for name, value in sorted(vars(kind).items()):
            if callable(value) and not name.startswith("_"):
                yield f"{kind.__name__}.{name}", [inspect.cleandoc(value.__doc__ or "")]


def first_paragraph(text: str, limit: int = 300) -> str:
    """The opening paragraph on one line, cut after a whole sentence where it is longer than `limit` characters."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    if len(paragraph) <= limit:
        return paragraph
    return paragraph[: paragraph.rfind(". ", 0, limit) + 1]


def conversations(answers: dict[str, str], rng: random.Random) -> Iterator[str]:
    """Chats of one to three questions, some with a system message or a greeting, so that a chat ends in <|im_end|>."""
    template = jinja2.Template(CHAT_TEMPLATE)
    pending = list(answers.items())
    rng.shuffle(pending)
    while pending:
        turns = [pending.pop() for _ in range(min(rng.choice([1, 1, 2, 3]), len(pending)))]
        if rng.random() < 0.2:
            turns.insert(rng.choice([0, 0, len(turns)]), rng.choice(GREETINGS))
        messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if rng.random() < 0.2:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        yield template.render(messages=messages)


def collect_documents() -> list[str]:
    """The whole corpus in a fixed order: manual pages, docstrings, then chats about both."""
    rng = random.Random(SEED)
    documents: dict[str, None] = {}  # a dict forgets duplicates and keeps the order
    answers: dict[str, str] = {}
    for _, page in sorted(pydoc_data.topics.topics.items()):
        documents[page.strip()] = None
        title, _, body = page.strip().partition("\n")
        body = body.lstrip("*=-\n ")
        answers[f"Explain {title[0].lower()}{title[1:]}."] = first_paragraph(body)
    for name, texts in itertools.chain(builtin_docstrings(), *map(source_docstrings, MODULES)):
        text = "\n\n".join(filter(None, dict.fromkeys(texts)))
        if len(text) > 40:
            documents[text] = None
        if len(texts[0]) > 40 and "._" not in name:
            answers[rng.choice(QUESTIONS).format(name)] = first_paragraph(texts[0])
    answers = {question: answer for question, answer in answers.items() if answer.endswith(".")}
    return [*documents, *conversations(answers, rng)]


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-level BPE whose alphabet holds all 256 bytes, so that any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def windows(tokenized: list[list[int]], end_of_text: int) -> Iterator[torch.Tensor]:
    """Token windows of shape [1, WINDOW] without end; each pass shuffles the documents and packs them anew."""
    rng = random.Random(SEED)
    while True:
        rng.shuffle(tokenized)
        stream = torch.tensor([token for document in tokenized for token in (*document, end_of_text)])
        starts = list(range(0, len(stream) - WINDOW + 1, WINDOW))
        rng.shuffle(starts)
        for start in starts:
            yield stream[start : start + WINDOW].unsqueeze(0)


def build_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """An untrained Qwen3 with grouped-query attention whose heads together are wider than the hidden state."""
    pad, _, im_end = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=im_end,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=[im_end, pad], pad_token_id=pad)
    return model


def train(model: Qwen3ForCausalLM, inputs: Iterator[torch.Tensor], num_steps: int) -> float:
    """Trains in place, one window a step; returns the mean loss, in nats a token, of the last 100 steps."""

    def learning_rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * (0.51 + 0.49 * math.cos(math.pi * step / num_steps))

    # Muon learns this corpus in half the steps of AdamW, but is made for the layers' matrices alone.
    embedding = model.get_input_embeddings().weight
    matrices = [weight for weight in model.parameters() if weight.ndim == 2 and weight is not embedding]
    others = [embedding, *(weight for weight in model.parameters() if weight.ndim == 1)]
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate) for optimizer in optimizers]
    losses: collections.deque[float] = collections.deque(maxlen=100)
    figures = TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s")
    with Progress(BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=num_steps, loss=math.nan, rate=0.0)
        for input_ids in itertools.islice(inputs, num_steps):
            loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for stepper in (*optimizers, *schedules):
                stepper.step()
            model.zero_grad()
            losses.append(loss.item())
            rate = (progress.tasks[task].speed or 0.0) * WINDOW
            progress.update(task, advance=1, loss=sum(losses) / len(losses), rate=rate)
    return sum(losses) / len(losses)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes a folder that Transformers loads as it is; the weights are rounded to bfloat16."""
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_position_embeddings,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled tiny model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4500, help="steps of one window each (default: %(default)s)")
    arguments = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(NUM_THREADS)
    documents = collect_documents()
    tokenizer = train_tokenizer(documents)
    tokenized = [encoding.ids for encoding in tokenizer.encode_batch(documents)]
    model = build_model(tokenizer)
    num_tokens = sum(map(len, tokenized))
    print(f"{len(documents):,} documents, {num_tokens:,} tokens; {model.num_parameters():,} parameters")
    loss = train(model, windows(tokenized, tokenizer.token_to_id(END_OF_TEXT)), arguments.steps)
    save(model, tokenizer, arguments.out)
    num_passes = arguments.steps * WINDOW / num_tokens
    print(f"loss {loss:.3f} after {num_passes:.1f} passes; saved {arguments.out}")


if __name__ == "__main__":
    main()
