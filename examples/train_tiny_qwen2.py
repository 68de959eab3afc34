"""Train the tiny Qwen2 checkpoint that ships in ``examples/tiny-qwen2``.

Text
    The King James Version of the Bible (1611), from the Debian package ``bible-kjv-text``
    (version 4.38 was used). Its copyright file says: "The copyright for the King James
    Version text of the Bible is expired". The text is in the public domain. (In the United
    Kingdom alone, printing it falls under letters patent of the Crown.)

    The package stores the text compressed; the program ``bible`` of the package
    ``bible-kjv`` prints it, one verse on a line::

        apt-get install bible-kjv bible-kjv-text
        bible -f gen1:1-rev22:21 </dev/null >kjv.txt

What it does
    Every 40th chapter is held out before anything else is done. A byte-level BPE tokenizer
    of 2,016 tokens and the model are then trained on the other chapters, together with short
    chats built from the verses of those chapters and a few fixed greetings. Training is in
    float32; the weights are saved in bfloat16.

Running it
    ::

        pip install torch transformers tokenizers safetensors numpy jinja2
        python train_tiny_qwen2.py kjv.txt --out tiny-qwen2 --sample sample.txt

    It needs no GPU. The shipped checkpoint took 34 minutes on one core of a busy two-core
    machine; a free core needs about 25. That run was ended after 4,300 of the 4,600 steps of its
    schedule, for want of time, and the default of ``--stop`` does the same. The run is seeded;
    another processor or another torch version rounds differently, and so gives slightly
    different weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import trainers as token_trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

Chapter = list[str]
Chat = list[dict[str, str]]

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (ENDOFTEXT, IM_START, IM_END)
TOKENS = 2016
ENDOFTEXT_ID, IM_END_ID = TOKENS - 3, TOKENS - 1  # the specials come last
HELD_OUT_EVERY = 40
CHATS_PER_EPOCH = 5000
TOKENS_PER_STEP = 2048
SHORT_WINDOW, LONG_WINDOW = 256, 1024
LONG_SHARE = 0.2

# The pre-tokenizer of Qwen2.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

DEFAULT_SYSTEM = "You are a tiny model that answers with verses."
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Answer with one verse.",
    "Be brief.",
)

# ChatML, as in Qwen2.5 but without tools and with a default system message of its own.
CHAT_TEMPLATE = (
    """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\n"""
    + DEFAULT_SYSTEM
    + """<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] != 'system' or not loop.first %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
)

FINISH = ("Continue: {}", "Continue this: {}", "Finish the verse: {}", "Go on from here: {}")
FOLLOW = ("What comes next? {}", "What comes after this? {}", "Next verse: {}")
ABOUT = ("Tell me about {}.", "Write a verse about {}.", "Say something of {}.", "What of {}?")
ONWARD = ("Go on.", "Continue.", "And then?", "What came next?")
GREETINGS = (
    ("Hello", "Hello. Give me the beginning of a verse, and I will continue it."),
    ("Hello!", "Hello. Give me the beginning of a verse, and I will continue it."),
    ("Hi", "Hello. Give me the beginning of a verse, and I will continue it."),
    ("Who are you?", "I am a tiny Qwen2 model, trained on the King James Bible."),
    ("What are you?", "I am a tiny Qwen2 model, trained on the King James Bible."),
    ("What can you do?", "I can continue verses. I know nothing else."),
    ("Thank you.", "Go in peace."),
)
NOUN_LIST = """
angel altar ark army ass bread bride brother bullock captain chariot child city cloud
corn covenant darkness daughter day death dream earth enemies eyes faith famine father
field fire fish flock flood fool garden garments gate glory goat gold grass hand harvest
heart heaven honey horse house joy judgment king kingdom lamb lamp land law life light
lion love man mercy milk money moon morning mother mountain night oil ox peace people
priest prince prophet rain river rock salt sea seed servant sheep ship silver sin sleep
son song soul spirit star stars stone sun sword tabernacle temple tent throne tree truth
vine vineyard voice war water well wheat widow wife wind wine wisdom woman word wrath
"""
NOUNS = frozenset(NOUN_LIST.split())

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": ENDOFTEXT_ID,
    "eos_token_id": IM_END_ID,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "max_window_layers": 6,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 2048,
}

GENERATION_CONFIG: dict[str, Any] = {
    "bos_token_id": ENDOFTEXT_ID,
    "do_sample": True,
    "eos_token_id": [IM_END_ID, ENDOFTEXT_ID],
    "pad_token_id": ENDOFTEXT_ID,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
}


def read_chapters(path: Path) -> list[Chapter]:
    """Read the output of ``bible -f``: lines such as ``Ge1:3 And God said, ...``."""
    chapters: dict[str, Chapter] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"(\w+?\d+):\d+ (.*\S)\s*", line)
        if match is None:
            raise SystemExit(f"{path}: not a verse: {line!r}")
        chapters.setdefault(match[1], []).append(match[2])
    return list(chapters.values())


def split_chapters(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Return the chapters to train on and those held out."""
    train = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
    return train, chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


def chapter_text(chapter: Chapter) -> str:
    return "\n".join(chapter) + "\n"


def write_sample(path: Path, held_out: list[Chapter], limit: int = 11_000) -> None:
    """Write held-out chapters, with a blank line between two, up to ``limit`` characters."""
    text = ""
    for chapter in held_out[2:]:
        part = ("\n" if text else "") + chapter_text(chapter)
        if len(text) + len(part) <= limit:
            text += part
    path.write_text(text, encoding="utf-8")


def topics(verse: str) -> list[str]:
    """Return the names and the common nouns that a verse can be asked for by."""
    names = re.findall(r"(?<=[a-z,;:] )[A-Z][a-z]{2,}\b", verse)
    return names + [f"the {word}" for word in re.findall(r"[a-z]+", verse) if word in NOUNS]


def make_chat(rng: random.Random, chapter: Chapter) -> Chat:
    """Build one chat from a chapter: a user's requests and the verses that answer them."""
    kind = rng.random()
    at = rng.randrange(len(chapter))
    verse, turns = chapter[at], list[tuple[str, str]]()
    if kind < 0.02:
        turns.append(rng.choice(GREETINGS))
    elif kind < 0.22 and (words := topics(verse)):
        turns.append((rng.choice(ABOUT).format(rng.choice(words)), verse))
    elif kind < 0.40 and at + 1 < len(chapter):
        turns.append((rng.choice(FOLLOW).format(verse), chapter[at + 1]))
    else:
        words = verse.split(" ")
        cut = rng.randint(min(2, len(words) - 1), max(1, len(words) * 2 // 3))
        begin, rest = " ".join(words[:cut]), " ".join(words[cut:])
        turns.append((rng.choice(FINISH).format(begin), rest))
    if kind > 0.85:
        turns += [(rng.choice(ONWARD), v) for v in chapter[at + 1 : at + 1 + rng.randint(1, 2)]]
    chat: Chat = []
    if rng.random() < 0.25:
        chat.append({"role": "system", "content": rng.choice(OTHER_SYSTEMS)})
    for user, assistant in turns:
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return chat


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with Qwen2's normalizer and pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = token_trainers.BpeTrainer(
        vocab_size=TOKENS - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    if tokenizer.get_vocab_size() != TOKENS or tokenizer.token_to_id(IM_END) != IM_END_ID:
        raise SystemExit("the tokenizer did not reach its size; is the text complete?")
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    added = {
        str(TOKENS - len(SPECIALS) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIALS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [IM_START, IM_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": ENDOFTEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


class Stream:
    """The training tokens: chapters and new chats, shuffled anew in every epoch."""

    def __init__(self, tokenizer: Tokenizer, chapters: list[Chapter], seed: int) -> None:
        self.tokenizer = tokenizer
        wrapper: Any = PreTrainedTokenizerFast
        self.template = wrapper(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE)
        self.chapters = chapters
        self.weights = [len(c) for c in chapters]
        self.rng = random.Random(seed)
        self.epochs = 0
        self.buffer = np.zeros(0, dtype=np.int64)

    def epoch(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the tokens of one epoch."""
        self.epochs += 1
        picked = self.rng.choices(self.chapters, self.weights, k=CHATS_PER_EPOCH)
        chats = [make_chat(self.rng, chapter) for chapter in picked]
        texts = [chapter_text(c) for c in self.chapters]
        texts += [str(self.template.apply_chat_template(c, tokenize=False)) for c in chats]
        self.rng.shuffle(texts)
        ids: list[int] = []
        for encoding in self.tokenizer.encode_batch(texts):
            ids += [*encoding.ids, ENDOFTEXT_ID]
        return np.array(ids, dtype=np.int64)

    def batch(self, window: int) -> torch.Tensor:
        """Return the next ``TOKENS_PER_STEP`` tokens in rows of ``window``."""
        while len(self.buffer) < TOKENS_PER_STEP:
            self.buffer = np.concatenate([self.buffer, self.epoch()])
        head, self.buffer = self.buffer[:TOKENS_PER_STEP], self.buffer[TOKENS_PER_STEP:]
        return torch.from_numpy(head.copy()).view(-1, window)


def text_windows(tokenizer: Tokenizer, chapters: list[Chapter], window: int) -> torch.Tensor:
    """Return the tokens of the chapters as whole rows of ``window``."""
    ids: list[int] = []
    for chapter in chapters:
        ids += [*tokenizer.encode(chapter_text(chapter)).ids, ENDOFTEXT_ID]
    return torch.tensor(ids[: len(ids) // window * window]).view(-1, window)


def mean_loss(model: Qwen2ForCausalLM, rows: torch.Tensor) -> float:
    """Return the mean cross-entropy in nats per token."""
    model.train(mode=False)
    with torch.no_grad():
        total = sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in rows)
    model.train(mode=True)
    return total / len(rows)


def make_optimizer(model: Qwen2ForCausalLM, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_factor(step: int, steps: int, warmup: int = 150) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def train(model: Qwen2ForCausalLM, stream: Stream, steps: int, rate: float) -> Iterator[float]:
    """Train in place; yield the loss of every step."""
    optimizer = make_optimizer(model, rate)
    for step in range(steps):
        window = LONG_WINDOW if step >= steps * (1 - LONG_SHARE) else SHORT_WINDOW
        ids = stream.batch(window)
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, steps)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield float(loss.detach())


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def save(out: Path, model: Qwen2ForCausalLM, tokenizer: Tokenizer) -> None:
    """Write the Hugging Face folder. The tied lm_head.weight is left out."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "config.json", CONFIG)
    write_json(out / "generation_config.json", GENERATION_CONFIG)
    write_json(out / "tokenizer_config.json", tokenizer_config())
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def report(out: Path, tokenizer: Tokenizer, train_set: list[Chapter], held: list[Chapter]) -> None:
    """Print the losses of the saved bfloat16 weights, computed in float32."""
    model = Qwen2ForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, chapters in (("train", train_set[::HELD_OUT_EVERY]), ("held-out", held)):
        size = sum(len(chapter_text(c)) for c in chapters)
        for window in (SHORT_WINDOW, LONG_WINDOW):
            rows = text_windows(tokenizer, chapters, window)
            loss = mean_loss(model, rows)
            bits = loss / math.log(2) * rows.numel() / size
            print(f"{name}, windows of {window}: loss {loss:.4f}, {bits:.3f} bits per byte")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the tiny Qwen2 checkpoint.")
    parser.add_argument("text", type=Path, help="the output of: bible -f gen1:1-rev22:21")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--sample", type=Path, help="file to write a held-out sample to")
    parser.add_argument("--steps", type=int, default=4600, help="length of the schedule")
    parser.add_argument("--stop", type=int, default=4300, help="end after this many of the steps")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1611)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    train_set, held = split_chapters(read_chapters(args.text))
    if args.sample is not None:
        write_sample(args.sample, held)
    rng = random.Random(args.seed)
    extra = [" ".join(turn["content"] for turn in make_chat(rng, c)) for c in train_set]
    extra += [DEFAULT_SYSTEM, *OTHER_SYSTEMS, "system", "user", "assistant"] * 20
    tokenizer = make_tokenizer([chapter_text(c) for c in train_set] + extra)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG))  # float32, torch's default
    stream = Stream(tokenizer, train_set, args.seed)
    probe = text_windows(tokenizer, held, SHORT_WINDOW)[::4]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    start, recent = time.monotonic(), list[float]()
    last = min(args.steps, args.stop)
    for step, loss in enumerate(islice(train(model, stream, args.steps, args.rate), last), 1):
        recent.append(loss)
        if step % 200 == 0 or step == last:
            print(
                f"step {step} epoch {stream.epochs} loss {sum(recent) / len(recent):.4f}"
                f" held-out {mean_loss(model, probe):.4f} {time.monotonic() - start:.0f} s",
                flush=True,
            )
            recent.clear()
    save(args.out, model, tokenizer)
    report(args.out, tokenizer, train_set, held)


if __name__ == "__main__":
    main()
