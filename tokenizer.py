"""Raw text -> token ids: SentencePiece BPE (LLaMA 1, 2), byte-level BPE (Llama 3), token shards.
The files: SentencePiece's .model, Meta's ranks, tokenizer.json, llama2.c's .bin, a GGUF's fields.

    python tokenizer.py train --vocab-size 4096 --out tokenizer.model      # on Python's own library
    python tokenizer.py encode --tokenizer tokenizer.model --bos "In 2023, 1 llama"
    python tokenizer.py decode --tokenizer tokenizer.model 1 512 300
    python tokenizer.py info tokenizer.json

"Notably, we split all numbers into individual digits, and fallback to bytes to decompose unknown
UTF-8 characters." (LLaMA, section 2.1)
"""

import argparse
import base64
import codecs
import contextlib
import functools
import hashlib
import heapq
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

CACHED_PIECES, CACHED_LENGTH = 1 << 16, 64  # pretokens a BytePair remembers, and their length
WHOLE, PIECE = 1 << 16, 1 << 14  # bytes: a longer document is cut, and into pieces of about this
LARGEST, PER_WORKER = 1 << 26, 1 << 24  # bytes of a tokenizer or .jsonl line; worth a process
LINES = re.compile(rb"\n(?:\r?\n)+"), re.compile(rb"\n")  # where to cut: blank lines, then ends
LEFT_OUT = re.compile(r"(site|dist)-packages|tests?|idlelib|lib2to3|tkinter|turtledemo|ensurepip|"
                      r"topics\.py|config-.*|_sysconfigdata.*|\..*")
Reader = Callable[[list[str]], Iterator[Iterable[str]]]  # documents, each in pieces; notes skips
SPECIAL = {  # after the ranks, up to 256; each - is a reserved one
    "3.0": "begin_of_text end_of_text - - - - start_header_id end_header_id - eot_id",
    "3.1": "begin_of_text end_of_text - - finetune_right_pad_id step_id start_header_id "
           "end_header_id eom_id eot_id python_tag image",
}
BEGINS = "<|begin_of_text|>", "<s>", "<|endoftext|>", "<|im_start|>"  # of texts in the family,
ENDS = "<|end_of_text|>", "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"
CONFIG = "bos_token", "eos_token", "eot_token", "add_bos_token", "chat_template"

# How a text is cut into pretokens, as Llama 3's, GPT-2's and SmolLM2's files say it.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone first, then GPT-2's: before a digit, its parts end.
SMOLLM = GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\S", r"[^\s\p{N}]")
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
WORDS, BYTES = ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": split}
                for split in (True, False))
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
KINDS = [  # by pattern, or by where "▁" is put: a tokenizer.json's normalizer and pre_tokenizer
    (LLAMA3, [], [SPLIT | {"pattern": {"Regex": LLAMA3}}, BYTES]), (GPT2, [], [WORDS]),
    (SMOLLM, [], [{"type": "Digits", "individual_digits": True}, WORDS]),
    ("in front", [{"type": "Prepend", "prepend": "▁"}, SPACES], []), ("never", [SPACES], []),
    *((put, [], [SPACE | {"prepend_scheme": put}]) for put in ("first", "always", "never"))]
FUSED = [  # its decoder of these
    SPACES | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
GGUF = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "smollm": SMOLLM, "gpt-2": GPT2,
        "default": GPT2}
# GPT-2's alphabet: a printable byte is its own character, the others are U+0100 and on, in order.
OTHERS = [*range(33), *range(127, 161), 173]
CHARACTERS = {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTE_OF = dict.fromkeys(OTHERS, 256) | {256 + i: byte for i, byte in enumerate(OTHERS)}


# ---------------------------------------------------------------------------------------------
# Helpers for files and command lines, which all modules use


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (a ValueError) instead of a usage dump."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise ValueError(f"{message}; try --help")


def positive(kind: type):
    """A type for argparse: an int or a float, above zero and finite."""
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if 0 < kind(text) < math.inf:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive {kind.__name__}")
    return parse


def utf8_text(argument: str) -> str:
    """A type for argparse: text, decoded as UTF-8 even where the locale is not (LC_ALL=C)."""
    return os.fsencode(argument).decode("utf-8", "replace")


def command(main: Callable[[list[str]], int | None]):
    """Run main(arguments) and exit with its status; a user's mistake is one line and status 2."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # Windows' console has another default
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        # The reader has gone (`| head`): the interpreter's last flush would complain as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except (ValueError, OSError) as error:
        text, advice = str(error), "; try --help"
        if isinstance(error, OSError):
            advice = "; try another path or disk"
            if error.filename:
                text = f"{error.strerror}: {error.filename}"
        if "; try" not in text:
            text += advice
        print("error:", " ".join(text.split()), file=sys.stderr)
        status = 2
    sys.exit(status)


@contextlib.contextmanager
def one_line_errors(source: str | Path):
    """Any exception while a damaged file is parsed becomes one ValueError of one line that names
    `source`. A message keeps its own advice ("; try ..."). OSError passes through."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            struct.error) as error:
        text = str(error)
        if not isinstance(error, ValueError):
            text = f"cut short or damaged ({type(error).__name__}: {text[:200]})"
        reason, mark, advice = " ".join(text.split()).rpartition("; try")
        if not mark:
            reason, advice = advice, " to fetch it again"
        raise ValueError(f"{source}: {reason[:300]}; try{advice[:94]}") from None


def write_aside(path: str | Path, write: Callable) -> None:
    """Call write(file) on a new file beside `path`, and rename it when all of it is on the disk:
    until then the old one stays as it is."""
    aside = Path(f"{path}.tmp")
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise OSError(f"{path} could not be written ({str(error)[:100]}) and is as it was before; "
                      "try to free space on the disk, or another place") from None
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: str | Path, values: dict) -> None:
    write_aside(path, lambda file: file.write(json.dumps(values, indent=1).encode()))


def unique_keys(pairs: list[tuple]) -> dict:
    """A JSON object's pairs as a dict; readers would differ on which of two equal keys counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice in one JSON object")
    return values


def read_json(data: bytes) -> dict:
    """The object in JSON; ValueError for any other value, and for a key that stands twice."""
    values = json.loads(data, object_pairs_hook=unique_keys)
    if not isinstance(values, dict):
        raise ValueError("holds no JSON object")
    return values


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Tokenizer:
    """All kinds have encode, decode(ids) -> text, token_bytes (what an id adds to a text), save,
    data (the file), vocab_size, special (name -> id), bos_id, eos_id, stop_ids (any of them ends a
    text), adds_bos and chat_template (Jinja's source or None; never run here). A wrong id or half a
    surrogate pair is a ValueError."""

    # every_part: a part behind a special token gets a space in front as the first one does.
    adds_bos, every_part, config, special = True, True, {}, {}

    def configure(self, config: dict) -> None:
        """Takes what a tokenizer_config.json says: bos_token, eos_token (names, or objects with
        one), add_bos_token, chat_template. What none says, the family's names do."""
        said = {key: config[key] for key in CONFIG if config.get(key) is not None}
        self.config = self.config | said

        def name(key):
            value = self.config.get(key)
            return value["content"] if isinstance(value, dict) else value

        def number(key, usual):
            found = name(key) or next((n for n in usual if n in self.special), None)
            if found not in self.special:
                raise ValueError(f"{key} {found} is no special token; try a tokenizer_config.json")
            return self.special[found]

        self.bos_id, self.eos_id = number("bos_token", BEGINS), number("eos_token", ENDS)
        ends = {self.special.get(end) for end in (*ENDS, name("eot_token"))}
        self.stop_ids = frozenset(ends - {None} | {self.eos_id})
        self.adds_bos = self.config.get("add_bos_token", self.adds_bos)
        template = self.config.get("chat_template")
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str | None) or not isinstance(self.adds_bos, bool):
            raise ValueError("add_bos_token or chat_template is of a wrong type; try another copy")
        self.chat_template = template

    def encode(self, text: str, bos=False, eos=False, continues=False, allowed_special=()
               ) -> list[int]:
        """What looks like a special token is ordinary text, unless allowed_special has its name. A
        text that `continues` an earlier piece gets no space in front, where the kind has one."""
        self.check(text)
        if unknown := set(allowed_special) - self.special.keys():
            raise ValueError(f"no special token is {min(unknown)}; try {min(self.special)}")
        names = sorted(allowed_special, key=len, reverse=True)  # at one place the longest counts
        ids = [self.bos_id] * bos
        for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, names)) or '(?!)'})", text)):
            if i % 2:  # re.split puts the separators at odd places
                ids.append(self.special[part])
            else:
                ids += self.ordinary(part, self.every_part if i else not continues)
        return ids + [self.eos_id] * eos

    def save(self, path: str | Path) -> None:
        """Written aside and renamed: what was there stays until all of it is on the disk."""
        write_aside(path, lambda file: file.write(self.data))

    def check(self, text="", ids=()):
        if re.search("[\ud800-\udfff]", text):
            raise ValueError("text holds half a surrogate pair; try valid Unicode")
        ids = list(ids)
        for wrong in (i for i in ids if not 0 <= i < self.vocab_size):
            raise ValueError(f"no token has id {wrong}; try ids from 0 to {self.vocab_size - 1}")
        return ids


class SentencePiece(Tokenizer):
    """BPE over characters that falls back to bytes, from a `.model` file's bytes. A damaged model,
    or one that loses text (LLaMA's loses none), is a ValueError. Control pieces are special; what a
    model calls user-defined (LLaMA's has none) the library finds in every text."""

    def __init__(self, data):
        self.data = data
        # Protobuf lets a later field override: normalizer_spec (3) { add_dummy_prefix (3): 0 }.
        no_prefix = data + b"\x1a\x02\x18\x00"
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=data)
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=no_prefix)
        except RuntimeError as error:
            raise ValueError(f"damaged SentencePiece model ({error}); try another copy") from None
        self.vocab_size = self.processor.vocab_size()
        names = [self.processor.id_to_piece(i) for i in range(self.vocab_size)]
        self.special = {n: i for i, n in enumerate(names) if self.processor.is_control(i)}
        marks = self.processor.bos_id(), self.processor.eos_id()
        # A file cut off between two pieces is still valid protobuf, but has lost its settings.
        probe = "  a \0 1\n\U0010fffd "
        if self.decode(self.ordinary(probe, True)) != probe or min(marks) < 0:
            raise ValueError("this SentencePiece model is cut off, or loses text; try LLaMA's kind")
        self.configure({"bos_token": names[marks[0]], "eos_token": names[marks[1]]})

    def as_json(self) -> "HuggingFace":
        """The same as a tokenizer.json; of pieces that merge in different ways it takes one."""
        ask, ids = self.processor, range(self.vocab_size)
        kinds = (2, ask.is_unknown), (3, ask.is_control), (6, ask.is_byte), (5, ask.is_unused)
        return tokenizer_from_gguf({
            "model": "llama", "tokens": [ask.id_to_piece(i) for i in ids],
            "scores": [ask.get_score(i) for i in ids], "bos_token_id": self.bos_id,
            "token_type": [next((n for n, is_one in kinds if is_one(i)), 1) for i in ids],
            "eos_token_id": self.eos_id, "tokenizer.chat_template": self.chat_template})

    def ordinary(self, text, begins):
        """A text gets a space in front, so that its first word is the word found elsewhere."""
        return (self.processor if begins else self.inner).encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Control tokens have no text, and the space in front is gone again."""
        return self.processor.decode(self.check(ids=ids))

    def token_bytes(self, token: int) -> bytes:
        self.check(ids=[token])
        if self.processor.is_byte(token):
            return bytes([int(self.processor.id_to_piece(token)[3:5], 16)])
        # Behind another token, where no space in front is dropped.
        return self.decode([*self.inner.encode("a"), token])[1:].encode()


def even_sample(texts: Iterable[str], bound: int) -> list[str]:
    """Every n-th text, where n doubles whenever the kept ones exceed `bound` characters."""
    kept, size, stride = [], 0, 1
    for i, text in enumerate(texts):
        if i % stride == 0:
            kept.append(text)
            size += len(text)
        if size > bound:
            kept, stride = kept[::2], 2 * stride
            size = sum(map(len, kept))
    return kept


def train_sentencepiece(texts: Iterable[str], vocab_size: int, sample: int = 1 << 24
                        ) -> SentencePiece:
    """LLaMA's tokenizer, with the flags in LLaMA's own file, from pieces of text (`sample` of their
    characters at most). The same texts give the same bytes."""
    lines = (line for text in even_sample(texts, sample) for line in text.split("\n"))
    # Lines over 4,192 bytes would be dropped. A newline is in none, so it stays byte <0x0A>.
    parts = (line[i:i + 1000] for line in lines for i in range(0, len(line), 1000))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=parts, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.99995, max_sentence_length=4192, max_sentencepiece_length=16,
            split_digits=True, byte_fallback=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", add_dummy_prefix=True,
            remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            unk_surface=" \u2047 ", minloglevel=2)
    except (RuntimeError, ValueError) as error:
        reason = str(error).rpartition("] ")[2].partition(" Increase")[0] or "there is no text"
        raise ValueError(f"{reason}; try another --vocab-size, or more text") from None
    return SentencePiece(model.getvalue())


@functools.cache
def pretoken_pattern(top: int, pattern: str = LLAMA3) -> re.Pattern:
    r"""A split of a text of characters below `top` into pretokens; merges stay inside one.

    `re` has no \p{L} and \p{N}, so they become ranges (few and fast where top is 128), and its \s
    takes \x1c to \x1f too, which are not White_Space."""
    kinds = "".join([unicodedata.category(chr(code))[0] for code in range(top)])
    sets = {r"\s": r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"}
    for kind in "LN":
        runs = (run.span() for run in re.finditer(f"{kind}+", kinds))
        sets[rf"\p{{{kind}}}"] = "".join(f"\\U{a:08x}-\\U{z - 1:08x}" for a, z in runs)

    def spelled(part):
        text = part[0] if part[0][0] == "[" else f"[{part[0]}]"
        for name, ranges in sets.items():
            text = text.replace(name, ranges)
        return text

    pattern = pattern.replace(r"\S", r"[^\s]")
    return re.compile(re.sub(r"\[.*?\]|\\s|\\p\{.\}", spelled, pattern))


def read_ranks(data: bytes) -> dict[bytes, int]:
    """{bytes: rank} of a tiktoken file: lines "base64 rank", the ranks in order from 0."""
    ranks = {}
    for rank, line in enumerate(data.splitlines()):
        text, _, number = line.partition(b" ")
        try:
            token = base64.b64decode(text, validate=True)
        except ValueError:
            token = b""
        if not token or token in ranks or number != b"%d" % rank:
            raise ValueError(f"line {rank + 1} is no new token with rank {rank}; try another copy")
        ranks[token] = rank
    if missing := {bytes([byte]) for byte in range(256)} - ranks.keys():
        raise ValueError(f"byte {min(missing)[0]} has no rank; try another copy")
    return ranks


class BytePair(Tokenizer):
    """BPE over bytes, from a tiktoken file's bytes: its ranks, then 256 special tokens (`special`:
    name -> id). Equal to tiktoken on all characters that this Python's Unicode tables know."""

    pattern, merges, whole = LLAMA3, None, True

    def __init__(self, data, names="3.1"):
        self.data, self.names, self.cache, self.ranks = data, names, {}, read_ranks(data)
        if names not in SPECIAL:
            raise ValueError(f"Llama {names} has no known special tokens; try 3.0 or 3.1")
        reserved = (f"reserved_special_token_{i}" for i in itertools.count())
        words = (SPECIAL[names] + " -" * 256).split()[:256]
        words = [next(reserved) if word == "-" else word for word in words]
        self.special = {f"<|{word}|>": len(self.ranks) + i for i, word in enumerate(words)}
        self.tokens = list(self.ranks) + [name.encode() for name in self.special]
        self.vocab_size, self.hidden = len(self.tokens), frozenset(self.special.values())
        self.configure({})

    def ordinary(self, text, begins):
        ids = []
        for piece in self.pretokens(text, begins):
            found = self.cache.get(piece)
            if found is None:
                found = self.merge(self.symbols(piece))
                if len(self.cache) < CACHED_PIECES and len(piece) <= CACHED_LENGTH:
                    self.cache[piece] = found
            ids += found
        return ids

    def pretokens(self, text, begins):
        return pretoken_pattern(128 if text.isascii() else 0x110000, self.pattern).findall(text)

    def symbols(self, piece):
        return piece.encode()

    def merge(self, piece: bytes | str) -> list[int]:
        """Ids of a pretoken: itself if it is a token; else its bytes, of which again and again the
        adjacent pair of lowest rank, the leftmost of equals, becomes one part. A pair's rank is
        that of the joined bytes, or of the pair itself where there is a list of merges.

        Part i is piece[i:end[i]]. The heap holds (rank, i) for pairs that begin at i, so that n
        bytes take O(n log n); entries that a merge made untrue are recognised by their rank."""
        ranks, merges, n = self.ranks, self.merges, len(piece)
        if self.whole and piece in ranks:
            return [ranks[piece]]

        def rank(i, j, k):  # of parts piece[i:j] and piece[j:k]
            return ranks.get(piece[i:k]) if merges is None else merges.get((piece[i:j], piece[j:k]))

        end, before = [*range(1, n + 1), n], [*range(-1, n)]
        heap = [(r, i) for i in range(n - 1) if (r := rank(i, i + 1, i + 2)) is not None]
        heapq.heapify(heap)
        while heap:
            r, i = heapq.heappop(heap)
            j = end[i]
            if j == n or rank(i, j, end[j]) != r:
                continue
            end[i], end[j] = end[j], n  # part j is gone; entries of it look like the last part's
            before[end[i]] = i
            for k in (i, before[i]):
                if k >= 0 and (r := rank(k, end[k], end[end[k]])) is not None:
                    heapq.heappush(heap, (r, k))
        ids, i = [], 0
        while i < n:
            ids.append(ranks[piece[i:end[i]]])
            i = end[i]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens become their names, as in tiktoken; broken UTF-8 becomes U+FFFD."""
        tokens = [self.tokens[i] for i in self.check(ids=ids)]
        return b"".join(tokens).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """b"" for special tokens, which are not text."""
        self.check(ids=[token])
        return b"" if token in self.hidden else self.tokens[token]


def known(what, value, *allowed):
    """The value if it is an allowed one, else a ValueError that names it."""
    if value not in allowed:
        raise ValueError(f"{what} {json.dumps(value)[:200]} is not implemented; try a tokenizer of "
                         "Llama's, SmolLM2's or GPT-2's kind")
    return value


def steps(file, part, inside):
    """The steps of a part of a tokenizer.json: those inside a Sequence, or the part, or none."""
    found = file.get(part) or {"type": "Sequence", inside: []}
    found = found[inside] if found["type"] == "Sequence" else [found]
    # Offsets are not kept, and older files leave out what is usual.
    found = [{"use_regex": True} | step if step["type"] == "ByteLevel" else step for step in found]
    return [{key: step[key] for key in step if key != "trim_offsets"} for step in found]


class HuggingFace(BytePair):
    """BPE by a list of merges, from a tokenizer.json's bytes: over bytes (Llama 3, SmolLM2, GPT-2)
    or characters that fall back to bytes, where "▁" is a space (LLaMA 1, 2). Added tokens are
    special. What is not implemented, and an id without a token, is a ValueError; a byte without a
    token (SmolLM2 has some) is left out of texts, as in Hugging Face's library."""

    def __init__(self, data, config={}):
        self.source, self.cache, file = data, {}, json.loads(data)
        self.recognise(file, file["model"])
        self.read(file["model"], file.get("added_tokens") or [])
        self.configure(file["model"].get("tokenizer_config", {}) | config)

    def recognise(self, file, model):
        """What the file says of the way from a text to merges and back, if it is known."""
        for step in steps(file, "post_processor", "processors"):
            known("post_processor", step["type"], "ByteLevel", "TemplateProcessing")
            if step["type"] == "TemplateProcessing":  # what it puts behind a text, eos= puts there
                front = itertools.takewhile(lambda item: "SpecialToken" in item, step["single"])
                names = [item["SpecialToken"]["id"] for item in front]
                known("post_processor's start", names, [], names[:1])
                self.config = {"bos_token": names[0]} if names else {}
        self.config = self.config | {"add_bos_token": "bos_token" in self.config}
        found = [steps(file, "normalizer", "normalizers"),
                 steps(file, "pre_tokenizer", "pretokenizers")]
        known("normalizer, pre_tokenizer", found, *(kind for _, *kind in KINDS))
        self.pattern = next(name for name, *kind in KINDS if kind == found)
        self.spaced, self.every_part = "p{L}" not in self.pattern, self.pattern != "first"
        back = [step["type"] for step in steps(file, "decoder", "decoders")]
        fused = [step["type"] for step in FUSED]
        known("decoder", back, *([fused, fused[:3]] if self.spaced else [["ByteLevel"]]))
        self.strips, self.whole = back == fused, bool(model.get("ignore_merges"))
        for key, *allowed in (
                ("type", "BPE", None), ("dropout", None), ("continuing_subword_prefix", None),
                ("end_of_word_suffix", None), ("byte_fallback", self.spaced or None),
                ("ignore_merges", None, not self.spaced)):
            known(key, model.get(key) or None, *allowed)

    def read(self, model, added):
        """The vocabulary. What merges join are characters: GPT-2's for bytes, or the text's, among
        which byte b, where there is no other, is the surrogate U+DC00 + b, which is in no text."""
        vocab = dict(model["vocab"])
        for token in added:
            for key in ("single_word", "lstrip", "rstrip"):
                known(key, token.get(key, False), False)
            if vocab.setdefault(token["content"], token["id"]) != token["id"]:
                raise ValueError(f"{token['content']} has two ids; try another copy")
        self.special = {token["content"]: token["id"] for token in added}
        self.hidden = frozenset(token["id"] for token in added if token["special"])
        self.check("".join(vocab))
        names, self.vocab_size = sorted(vocab, key=vocab.get), len(vocab)
        if ({*map(type, vocab.values())} != {int} or "" in vocab
                or [vocab[name] for name in names] != [*range(len(vocab))]):
            raise ValueError("the ids are not 0, 1, 2 ... of one token each; try another copy")
        self.tokens = [self.spelled(name) for name in names]
        self.ranks = ranks = {name: vocab[name] for name in names if name not in self.special}
        self.merges = {}
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            if left not in ranks or right not in ranks or left + right not in ranks:
                raise ValueError(f"merge {rank} is not of tokens; try another copy")
            self.merges[left, right] = rank
        if self.spaced:
            self.ranks |= {chr(0xDC00 + b): self.ranks[f"<0x{b:02X}>"] for b in range(256)}
        elif not self.ranks.keys() >= {chr(b).translate(CHARACTERS) for b in range(256)}:
            known("unk_token", model.get("unk_token"), None)
        # Where no token has a space behind a letter, no merge goes over the start of a word.
        crossed = self.spaced and any(re.search("[^▁]▁", name) for name in self.ranks)
        self.words = re.compile("(?s:.+)" if crossed else "▁*[^▁]+|▁+")

    def spelled(self, name):
        """The bytes of a token."""
        if name in self.special:
            return name.encode()
        if not self.spaced:
            return name.translate(BYTE_OF).encode("latin-1")
        byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
        return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()

    @property
    def data(self):
        """The file, and in it what was beside it (where Hugging Face's reader passes over it)."""
        file = json.loads(self.source)
        file["model"]["tokenizer_config"] = self.config
        return json.dumps(file).encode()

    def pretokens(self, text, begins):
        if not self.spaced:
            return super().pretokens(text, begins)
        text = text.replace(" ", "▁")
        # Prepend ("in front") puts a space even in front of a space, Metaspace does not.
        if begins and text and self.pattern != "never":
            text = "▁" * (self.pattern == "in front" or text[0] != "▁") + text
        return self.words.findall(text)

    def symbols(self, piece):
        if not self.spaced:
            piece = piece.encode().decode("latin-1").translate(CHARACTERS)
            return "".join([c for c in piece if c in self.ranks])
        return "".join([c if c in self.ranks else "".join([chr(0xDC00 + b) for b in c.encode()])
                        for c in piece])

    def decode(self, ids: Iterable[int]) -> str:
        """Over bytes special tokens become their names, else they have no text, and the space in
        front is gone again; broken UTF-8 becomes U+FFFD."""
        if not self.spaced:
            return super().decode(ids)
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")
        return text[self.strips and text[:1] == " ":]


def tokenizer_from_gguf(fields: dict) -> HuggingFace:
    """The tokenizer in a GGUF file's metadata: "llama" (pieces with scores) or "gpt2" (merges; an
    unnamed or "default" split is GPT-2's), as a tokenizer.json. ValueError where they lie."""
    with one_line_errors("the vocabulary"):
        field = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
        tokens, spaced = field["tokens"], known("model", field["model"], "llama", "gpt2") == "llama"
        types = field.get("token_type", [1] * len(tokens))  # 1 normal, 2 unknown, 3 control, 4 user
        if not len(types) == len(tokens) == len(set(tokens)):
            raise ValueError("two tokens are equal, or types are missing; try another copy")
        ids = {key: field[f"{key}_id"] for key in ("bos_token", "eos_token", "eot_token")
               if field.get(f"{key}_id") is not None}
        for wrong in (i for i in ids.values() if type(i) is not int or not 0 <= i < len(tokens)):
            raise ValueError(f"no token has id {wrong}; try another copy")
        if spaced:
            front = known("add_space_prefix", field.get("add_space_prefix", True), True, False)
            kind, merges = "in front" if front else "never", scored(tokens, field["scores"], types)
        else:
            kind = GGUF[known("tokenizer.ggml.pre", field.get("pre", "default"), *GGUF)]
            merges = field["merges"]
        normalizers, pretokenizers = next(found for name, *found in KINDS if name == kind)
        config = {key: tokens[number] for key, number in ids.items()} | {
            "add_bos_token": field.get("add_bos_token", spaced or kind == LLAMA3),
            "chat_template": field.get("tokenizer.chat_template")}
        bos = config.get("bos_token") if config["add_bos_token"] else None
        whole = [{"SpecialToken": {"id": bos, "type_id": 0}}] * (bos is not None)
        whole.append({"Sequence": {"id": "A", "type_id": 0}})
        marks = {token: {"id": token, "ids": [i], "tokens": [token]}
                 for i, token in enumerate(tokens) if token == bos}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        return HuggingFace(json.dumps({
            "version": "1.0",
            "added_tokens": [{"id": i, "content": token, "special": sort != 4} | plain
                             for i, (token, sort) in enumerate(zip(tokens, types))
                             if sort in (2, 3, 4) or i in ids.values()],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
            "post_processor": {"type": "TemplateProcessing", "single": whole, "pair": whole,
                               "special_tokens": marks},
            "decoder": {"type": "Sequence",
                        "decoders": FUSED[:3 + (kind != "never")] if spaced else [WORDS]},
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": merges, "byte_fallback": spaced, "ignore_merges": kind == LLAMA3,
                      "tokenizer_config": config}}).encode())


def scored(pieces, scores, types):
    """The merges that do what SentencePiece does: of all pairs that make a piece, first those of
    the highest score."""
    score = {piece: value for piece, value, kind in zip(pieces, scores, types) if kind == 1}
    if len(scores) != len(pieces) or any(value != value for value in scores):
        raise ValueError("scores are too few, or no numbers; try another copy")
    if max(map(len, score), default=0) > 1000:  # each has as many pairs
        raise ValueError("a piece is too long to be one; try another copy")
    pairs = [(-value, piece[:i], piece[i:]) for piece, value in score.items()
             for i in range(1, len(piece)) if piece[:i] in score and piece[i:] in score]
    return [pair for _, *pair in sorted(pairs, key=lambda pair: pair[0])]


def read_llama2c(data: bytes) -> HuggingFace:
    """llama2.c's tokenizer.bin: uint32 longest; per id a float32 score, a uint32 length and the
    text with plain spaces. Ids: unk, bos, eos, 256 bytes, then pieces."""
    names, scores, at, longest = [], [], 4, int.from_bytes(data[:4], "little")
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    try:
        while at < len(data):
            score, size = struct.unpack_from("<fI", data, at)
            at += 8 + size
            names.append(data[at - size:at].decode().replace(" ", "▁"))
            scores.append(score)
            if size > longest or at > len(data):
                raise ValueError
        if names[3:259] != marks[3:]:
            raise ValueError
    except (ValueError, struct.error):
        raise ValueError(f"tokenizer.bin is damaged near id {len(names)}; try another") from None
    return tokenizer_from_gguf({"model": "llama", "tokens": marks + names[259:], "scores": scores,
                      "token_type": [2, 3, 3] + [6] * 256 + [1] * len(names[259:]),
                      "bos_token_id": 1, "eos_token_id": 2})


def read_bounded(path):
    with open(path, "rb") as file:
        return file.read(LARGEST)


def beside(path):
    """What tokenizer_config.json and chat_template.jinja in the folder of a file say."""
    found, readers = {}, {"tokenizer_config.json": json.loads,
                          "chat_template.jinja": lambda data: {"chat_template": data.decode()}}
    for name, reader in readers.items():
        file = Path(path).with_name(name)
        with one_line_errors(file):
            found |= reader(read_bounded(file)) if file.is_file() else {}
    return found


def load_tokenizer(path: str | Path, names: str = "3.1") -> Tokenizer:
    """The tokenizer in a file: SentencePiece's .model, tiktoken's lines, Hugging Face's
    tokenizer.json or llama2.c's .bin, told apart by content, never by name; a tokenizer_config.json
    and a chat_template.jinja beside it count. `names` are the special tokens of a tiktoken file."""
    data, config = read_bounded(path), beside(path)
    with one_line_errors(path):
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            tokenizer = BytePair(data, names)
        elif re.match(rb'\s*\{\s*"', data):
            tokenizer = HuggingFace(data, config)
        elif data[12:17] == b"<unk>":
            tokenizer = read_llama2c(data)
        elif data[:1] == b"\n":  # protobuf's field 1, a piece
            tokenizer = SentencePiece(data)
        else:
            raise ValueError("holds no tokenizer; try a SentencePiece .model, a tokenizer.json, "
                             "Llama 3's tokenizer.model (ranks) or llama2.c's tokenizer.bin")
        tokenizer.configure(config)
    return tokenizer


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files beside exported weights that transformers' AutoTokenizer reads."""
    inner = tokenizer.as_json() if isinstance(tokenizer, SentencePiece) else tokenizer
    config = {key: value for key, value in inner.config.items() if value is not None}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    return {"tokenizer.json": inner.data, "tokenizer_config.json": json.dumps(config).encode()}


class StreamDecoder:
    """Text from ids that come one at a time. With `start` they begin a text, and the space that
    SentencePiece put in front is dropped. Special tokens give no text."""

    def __init__(self, tokenizer: Tokenizer, start: bool):
        self.tokenizer, self.start = tokenizer, start
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became whole with this id: "" inside a character of several bytes."""
        data = self.tokenizer.token_bytes(token)
        # The tokenizer itself drops the space from a text of this one token.
        drop = self.start and data == b" " + self.tokenizer.decode([token]).encode()
        self.start = self.start and not data
        return self.decoder.decode(data[drop:])

    def flush(self) -> str:
        """The rest: U+FFFD for a character that never became whole."""
        return self.decoder.decode(b"", final=True)


def cut(chunks: Iterable[bytes]) -> Iterator[str]:
    """The pieces (str) of a document, joined the document, from small chunks of its UTF-8 bytes. Up
    to 64 KiB it is one. A longer one is cut at the first blank line after 16 KiB, or at the first
    line end where no blank line follows within 64 KiB, or hard at 64 KiB."""
    held, long = b"", False
    for chunk in itertools.chain(chunks, [None]):
        held += chunk or b""
        while len(held) > WHOLE or (held and chunk is None):
            long = long or len(held) > WHOLE
            found = [pattern.search(held, PIECE, WHOLE) for pattern in LINES if long]
            end = next((match.end() for match in found if match), min(len(held), WHOLE))
            while end < len(held) and held[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            yield held[:end].decode()
            held = held[end:]


def read_chunks(file):
    """The UTF-8 bytes of a text file in small chunks, without a byte order mark."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        for text in iter(lambda: stream.read(WHOLE), ""):
            if "\0" in text:
                raise ValueError("holds NUL bytes")
            yield text.encode()


def file_documents(file, skipped):
    """The documents (iterators of pieces) of a .jsonl file, by "text" (half a surrogate pair turns
    into "?"), or a text file as one. What is not text is left to `skipped` as "path: reason"."""
    wrong = 0
    try:
        if not file.stat().st_size:
            raise ValueError("empty or not a regular file")
        if file.suffix != ".jsonl":
            all(read_chunks(file))  # to its end, before it is believed
            yield cut(read_chunks(file))
            return
        with open(file, "rb") as stream:
            # A line that is too long comes in parts, none of which is a JSON object.
            for line in iter(lambda: stream.readline(LARGEST), b""):
                try:
                    text = json.loads(line)["text"].encode("utf-8", "replace")
                except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                    wrong += bool(line.strip())
                    continue
                yield cut(text[i:i + WHOLE] for i in range(0, len(text), WHOLE))
        if wrong:
            raise ValueError(f'{wrong} lines are not JSON objects with a string "text"')
    except UnicodeDecodeError:
        skipped.append(f"{file}: not UTF-8 text")
    except (ValueError, OSError) as error:
        skipped.append(f"{file}: {getattr(error, 'strerror', None) or error}")


def files_below(path, left_out):
    """The files of a folder, recursively and in order, without names that match left_out and
    without the folders of runs, which hold a run.json."""
    for folder, folders, names in os.walk(path):
        if "run.json" in names:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not left_out.fullmatch(name))
        yield from (Path(folder, n) for n in sorted(names) if not left_out.fullmatch(n))


def documents(paths: Iterable[str | Path], skipped: list[str]) -> Iterator[Iterable[str]]:
    """The documents of files and folders (hidden files left out); ValueError for a missing path."""
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist; try a file or folder of text")
        for file in files_below(path, re.compile(r"\..*")) if path.is_dir() else [path]:
            yield from file_documents(file, skipped)


def standard_library(skipped: list[str]) -> Iterator[Iterable[str]]:
    """The default text: the running Python's library as code, pydoc's topics as prose. Left out are
    tests, packages that are not everywhere, and files that hold the machine's paths."""
    files = [f for f in files_below(Path(os.__file__).parent, LEFT_OUT) if f.suffix == ".py"]
    files = [file for file in files if file.stat().st_size]
    if sum(file.stat().st_size for file in files) < 2_000_000:
        raise ValueError("this Python has no library to read; try --data FILE_OR_FOLDER")
    yield from itertools.chain.from_iterable(file_documents(file, skipped) for file in files)
    from pydoc_data.topics import topics  # large, and seldom needed
    yield from (cut([topics[name].encode()]) for name in sorted(topics))


def digest(piece):
    return int.from_bytes(hashlib.sha1(piece.encode(), usedforsecurity=False).digest(), "big")


def held_out(piece: str, chosen: int | None = None) -> bool:
    """Whether a piece is for evaluation: its SHA-1 is 0 mod 20, or the chosen one of a Survey."""
    return digest(piece) % 20 == 0 or digest(piece) == chosen


class Survey(NamedTuple):
    size: int            # bytes of text
    documents: int
    chosen: int | None   # the smallest SHA-1 if no piece is held out by its own, else None
    skipped: list[str]   # "path: reason" of what is not text


def survey(reader: Reader) -> Survey:
    """What a source holds, read once. ValueError where either split would be empty."""
    skipped, size, count, pieces, held, high = [], 0, 0, 0, 0, 0
    low = 1 << 160  # above any SHA-1
    for document in reader(skipped):
        count += 1
        for piece in document:
            size, pieces, number = size + len(piece.encode()), pieces + 1, digest(piece)
            held, low, high = held + (number % 20 == 0), min(low, number), max(high, number)
    if not pieces:
        first = f", the first as {skipped[0]}" if skipped else ""
        raise ValueError(f"no text; {len(skipped)} files were skipped{first}; try other --data")
    if low == high or pieces == held:
        raise ValueError(f"too little text ({size:,} bytes in {pieces} pieces) to hold out a part; "
                         "try over 64 KiB or several files")
    return Survey(size, count, None if held else low, skipped)


def training_text(reader: Reader, chosen: int | None) -> Iterator[str]:
    """The pieces that are not held out, for train_sentencepiece."""
    return (p for document in reader([]) for p in document if not held_out(p, chosen))


def records(reader, chosen):
    """(split, starts, piece) of all pieces; piece None ends a document of that split."""
    for document in reader([]):
        begun = set()
        for piece in document:
            split = int(held_out(piece, chosen))
            yield split, split not in begun, piece
            begun.add(split)
        yield from ((split, False, None) for split in sorted(begun))


def encode_record(record):
    """The tokens of a record: uint16, or uint32 where the vocabulary is larger; little endian."""
    tokenizer, (_, starts, piece) = encode_record.tokenizer, record
    ids = [tokenizer.eos_id]
    if piece is not None:
        ids = tokenizer.encode(piece, bos=starts, continues=not starts)
    return np.array(ids, "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def start_worker(tokenizer):
    """A process keeps the tokenizer, so that its tasks are text alone, and leaves Ctrl-C to us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encode_record.tokenizer = tokenizer


def encoded(items, tokenizer, workers):
    """(record, its tokens) in order; the reader never runs far ahead of the processes."""
    if workers == 1:
        encode_record.tokenizer = tokenizer
        yield from ((record, encode_record(record)) for record in items)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer,)) as pool:
        while group := list(itertools.islice(items, 256 * workers)):
            yield from zip(group, pool.map(encode_record, group, chunksize=64))


def prepare(name: str, reader: Reader, known: Survey, tokenizer: Tokenizer, folder: str | Path,
            workers: int | None = None) -> dict:
    """Write folder/name.train.bin and .val.bin: of each document and split BOS, its pieces, EOS, in
    the integers of encode_record; the bytes do not depend on workers. reader(skipped) gives the
    documents, each time anew. Returns what was counted."""
    folder, tokens, texts = Path(folder), [0, 0], [0, 0]
    workers = workers or min(cores(), 61, 1 + known.size // PER_WORKER)  # Windows: 61
    folder.mkdir(parents=True, exist_ok=True)
    aside = [folder / f"{name}.{split}.bin.tmp" for split in ("train", "val")]
    try:
        with open(aside[0], "wb") as train, open(aside[1], "wb") as val:
            tasks = records(reader, known.chosen)
            for (split, _, piece), ids in encoded(tasks, tokenizer, workers):
                (train, val)[split].write(ids.tobytes())
                tokens[split] += len(ids)
                texts[split] += len((piece or "").encode())
        for path in aside:
            os.replace(path, path.with_suffix(""))
    finally:
        for path in aside:
            path.unlink(missing_ok=True)
    return {"name": name, "train_tokens": tokens[0], "val_tokens": tokens[1],
            "train_bytes": texts[0], "val_bytes": texts[1], "documents": known.documents,
            "dtype": ids.dtype.name}


def info(tokenizer):
    """What a teacher would show of a tokenizer first."""
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode("In 2023, 🦙")]
    longest = max(map(tokenizer.token_bytes, range(tokenizer.vocab_size)), key=len)
    print(f"{type(tokenizer).__name__}: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_id}, eos "
          f"{tokenizer.eos_id}, ends at {sorted(tokenizer.stop_ids)}, longest {longest}")
    print("In 2023, 🦙:", *pieces)


def main(arguments):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train, encode, decode, show = (
        commands.add_parser(name, description=advice).add_argument for name, advice in (
            ("train", "Learn a BPE; more text makes better pieces."),
            ("encode", "Text to ids; - reads a long text from stdin."),
            ("decode", "Ids to text; - reads the ids from stdin."),
            ("info", "What a file holds; look here before you train.")))
    train("--data", nargs="+", metavar="PATH", help="default: Python's own library")
    train("--vocab-size", type=int, default=4096, metavar="N", help="default: 4096")
    train("--out", required=True, metavar="FILE", help="the .model to write")
    train("--force", action="store_true", help="overwrite FILE")
    for add in (encode, decode):
        add("--tokenizer", required=True, metavar="FILE")
    encode("--bos", action="store_true", help="as at the start of a document")
    encode("--eos", action="store_true", help="as at its end")
    encode("text", metavar="TEXT")
    decode("text", metavar="ID", nargs="+")
    show("tokenizer", metavar="FILE")
    args = parser.parse_args(arguments)
    if args.command == "train":
        if os.path.exists(args.out) and not args.force:
            raise ValueError(f"{args.out} exists; try --force or another --out")
        reader = functools.partial(documents, args.data) if args.data else standard_library
        texts = training_text(reader, survey(reader).chosen)
        train_sentencepiece(texts, args.vocab_size).save(args.out)
        args.tokenizer = args.out
    tokenizer = load_tokenizer(args.tokenizer)
    if args.command in ("train", "info"):
        return info(tokenizer)
    text = args.text if args.command == "encode" else " ".join(args.text)
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    if args.command == "encode":
        return print(*tokenizer.encode(text, bos=args.bos, eos=args.eos))
    if wrong := re.search(r"[^0-9\s]\S*", text):
        raise ValueError(f"{wrong[0]} is no id; try numbers separated by spaces")
    print(tokenizer.decode(map(int, text.split())))


if __name__ == "__main__":
    command(main)
