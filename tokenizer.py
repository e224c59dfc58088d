"""Raw text -> token ids: SentencePiece (LLaMA 1, 2), byte-level BPE (Llama 3), token shards.

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
from typing import NamedTuple, TextIO

import numpy as np

MAX_FILE = 1 << 26  # bytes read of a tokenizer or of a .jsonl line; Llama 3's file has 9 MB
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens in a .model
Reader = Callable[[list[str]], Iterator[Iterable[str]]]  # documents in pieces; notes skipped files


# ---------------------------------------------------------------------------------------------
# Helpers for files and command lines, which all four modules use


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


def command(main: Callable[[list[str]], int | None]):
    """Run main(arguments) and exit with its status; a user's mistake is one line and status 2."""
    if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
        # The locale, say C, has no UTF-8: start again, so that arguments and names of files do.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
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
        if isinstance(error, OSError) and error.filename:
            text, advice = f"{error.strerror}: {error.filename}", "; try another path or disk"
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


def read_json(data: bytes) -> dict:
    """The object in JSON; ValueError for another value, and for a key that stands twice."""
    def unique_keys(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice in one JSON object")
        return dict(pairs)

    values = json.loads(data, object_pairs_hook=unique_keys)
    if not isinstance(values, dict):
        raise ValueError("holds no JSON object")
    return values


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Tokenizer:
    """A vocabulary and how texts become its ids. A wrong id or half a surrogate pair is a
    ValueError. Both kinds below have

        vocab_size, names         names[id] is a token's text as its file has it
        special                   name -> id of the tokens that stand for no text, like <s>
        found_always              those that are found in every text, asked for or not
        bos_id, eos_id, stop_ids  any of stop_ids ends a text; eos_id is one of them
        adds_bos                  whether a prompt begins with BOS
        chat_template             Jinja's source or None; never run here
        spelled                   patterns of names that are not found as they are
        ordinary(text, begins)    ids without special tokens; a text that begins may get a space
        decode(ids)               the text
        token_bytes(id)           what it adds to a text; b"" for special tokens
        file                      the bytes that it was read from, if a file has them
    """

    every_part = True  # a part behind a special token begins, as the whole text does
    found_always = ()

    def configure(self, own: dict, config: dict | None) -> None:
        """Take the settings: those in the tokenizer's `own` file, and over them those of a
        tokenizer_config.json. Where neither names BOS or EOS, the usual names count."""
        self.config = {}
        for key in ("bos_token", "eos_token", "eot_token", "add_bos_token", "chat_template"):
            value = (config or {}).get(key)
            if isinstance(value, dict):  # a token with its properties
                value = value["content"]
            elif isinstance(value, list):  # chat templates by name
                value = {each["name"]: each["template"] for each in value}.get("default")
            if value is not None:
                self.config[key] = value
        settings = own | self.config
        ends = "<|end_of_text|>", "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>"
        self.bos_id = self.special_id("bos_token", settings, (
            "<|begin_of_text|>", "<s>", "<|endoftext|>", "<|im_start|>"))
        self.eos_id = self.special_id("eos_token", settings, ends)
        stops = map(self.special.get, (*ends, settings.get("eot_token")))
        self.stop_ids = frozenset({self.eos_id, *stops} - {None})
        self.spelled = settings.get("spelled", {})
        self.adds_bos = settings.get("add_bos_token", True)
        self.chat_template = settings.get("chat_template")
        if not isinstance(self.chat_template, str | None) or not isinstance(self.adds_bos, bool):
            raise ValueError("add_bos_token or chat_template is of a wrong type; try another copy")

    def special_id(self, key: str, settings: dict, usual: tuple[str, ...]) -> int:
        for name in usual if settings.get(key) is None else [settings[key]]:
            if name in self.special:
                return self.special[name]
        raise ValueError(f"{key} {name} is no special token; try a tokenizer_config.json")

    def encode(self, text: str, bos=False, eos=False, continues=False, allowed_special=()
               ) -> list[int]:
        """What looks like a special token is ordinary text, unless allowed_special has its name. A
        text that `continues` an earlier piece gets no space in front, where the kind has one."""
        if re.search("[\ud800-\udfff]", text):
            raise ValueError("text holds half a surrogate pair; try valid Unicode")
        if unknown := set(allowed_special) - self.special.keys():
            raise ValueError(f"no special token is {min(unknown)}; try {min(self.special)}")
        names = sorted({*allowed_special, *self.found_always}, key=len, reverse=True)
        patterns = [self.spelled.get(name, re.escape(name)) for name in names]
        pattern = "|".join(patterns) or "(?!)"  # at one place the longest counts
        ids = [self.bos_id] * bos
        for i, part in enumerate(re.split(f"({pattern})", text)):
            if i % 2:  # re.split puts the names at odd places
                ids.append(self.special[part if part in self.special else part.strip()])
            else:
                ids += self.ordinary(part, self.every_part if i else not continues)
        return ids + [self.eos_id] * eos

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        ids = list(ids)
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"no token has id {i}; try ids from 0 to {self.vocab_size - 1}")
        return ids

    @property
    def data(self) -> bytes:
        """The bytes of a file that gives this tokenizer again, with the settings of files()."""
        return self.file or tokenizer_json(self)

    def files(self, name: str) -> dict[str, bytes]:
        """What is saved, by file name: `data`, and a tokenizer_config.json if there are settings
        (of the one beside the file that was read, or of a GGUF file) that `data` does not hold."""
        files = {name: self.data}
        if self.config:
            files["tokenizer_config.json"] = json.dumps(self.config, indent=1).encode()
        return files

    def save(self, path: str | Path) -> None:
        for name, data in self.files(Path(path).name).items():
            write_aside(Path(path).with_name(name), lambda file, data=data: file.write(data))


# ---------------------------------------------------------------------------------------------
# SentencePiece (Kudo and Richardson, 2018). Its library merges, by the score of what is joined.


def protobuf_field(number: int, value: int | bytes) -> bytes:
    """A field of an integer (7 bits a byte, the lowest first: 300 is AC 02) or of bytes."""
    def varint(n):
        low = b""
        while n > 127:
            low += bytes([n & 127 | 128])
            n >>= 7
        return low + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_model(pieces: Iterable[tuple[str, float, int]], prefix: bool) -> bytes:
    """A .model file from (text, score, type) of each id, so that SentencePiece's library encodes
    what other files hold. prefix: a space in front. The numbers are sentencepiece_model.proto's.

    Of adjacent parts, those join first whose joined text has the highest score: abc becomes a|bc
    where ab has -1 and bc has 0.
    """
    model = []
    for text, score, kind in pieces:
        if kind not in range(NORMAL, BYTE + 1) or score != score:
            raise ValueError(f"the score or type of {text} is none; try another copy")
        piece = protobuf_field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        model.append(protobuf_field(1, piece + protobuf_field(3, int(kind))))
    trainer = {3: 2, 35: 1, 44: b""}  # BPE, byte_fallback, and an unknown token has no text
    normalizer = {1: b"identity", 3: int(prefix), 4: 0, 5: 1}  # keep spaces, as U+2581
    for number, fields in ((2, trainer), (3, normalizer)):
        content = b"".join(itertools.starmap(protobuf_field, fields.items()))
        model.append(protobuf_field(number, content))
    return b"".join(model)


class SentencePiece(Tokenizer):
    """BPE over characters that falls back to bytes, by SentencePiece's library. `model` is what a
    .model file holds; one that is cut off or loses text (LLaMA's loses none) is a ValueError.

    front: where a space is put in front, so that a text's first word is the word found elsewhere.
    With the special token <s>, the parts of "a<s>b<s> c" are encoded as

        "prepend"   " a"   " b"   "  c"     what a .model with add_dummy_prefix means
        "always"    " a"   " b"   " c"      where there is none
        "first"     " a"   "b"    " c"      the same, at the beginning of the text alone
        "never"     "a"    "b"    " c"

    found: names of the tokens for found_always. A .model alone has none: its library finds its
    user-defined pieces as ordinary text, without a space behind them.
    """

    def __init__(self, model: bytes, config: dict | None = None, front: str | None = None,
                 found: Iterable[str] = (), own: dict | None = None, file: bytes | None = None):
        import sentencepiece  # here, so that other files of the project can be read without it
        load, no_prefix = sentencepiece.SentencePieceProcessor, protobuf_field(3, 0)
        try:
            self.processor = load(model_proto=model)
            # Of a field that stands twice, the last one counts.
            self.bare = load(model_proto=model + protobuf_field(3, no_prefix))
        except RuntimeError as error:
            raise ValueError(f"damaged SentencePiece model ({error}); try another copy") from None
        # A file cut off between two pieces is still valid protobuf, but has lost its settings.
        probe = "  a \0 1\n\U0010fffd "
        if self.processor.decode(self.processor.encode(probe)) != probe:
            raise ValueError("this SentencePiece model is cut off, or loses text; try LLaMA's kind")
        if front is None:
            prefix = self.processor.encode("a") != self.bare.encode("a")
            front = "prepend" if prefix else "never"
        self.file = model if file is None else file
        self.front, self.every_part, self.found_always = front, front != "first", list(found)
        self.vocab_size, self.special = self.processor.vocab_size(), {}
        self.names = list(map(self.processor.id_to_piece, range(self.vocab_size)))
        for i, name in enumerate(self.names):
            if self.processor.is_control(i) or self.processor.is_unknown(i):
                self.special[name] = i
        for name in self.found_always:
            self.special[name] = self.names.index(name)
        marks = {"bos_token": self.processor.bos_id(), "eos_token": self.processor.eos_id()}
        for key, i in marks.items():
            marks[key] = self.names[i] if i >= 0 else None
        self.configure(marks | (own or {}), config)

    def ordinary(self, text, begins):
        if self.front in ("always", "first") and text.startswith((" ", "▁")):
            begins = False
        if begins and self.front != "never":
            return self.processor.encode(text)
        return self.bare.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens have no text, and the space in front is gone again."""
        return self.processor.decode(self.check_ids(ids))

    def token_bytes(self, token: int) -> bytes:
        self.check_ids([token])
        if self.processor.is_byte(token):
            return bytes([int(self.names[token][3:5], 16)])
        # Behind another token, where no space in front is dropped.
        return self.bare.decode([*self.bare.encode("a"), token])[1:].encode()


def train_sentencepiece(texts: Iterable[str], vocab_size: int, size: int = 0) -> SentencePiece:
    """LLaMA's tokenizer, with the flags in LLaMA's own file, from pieces of text. If they have over
    16 MiB (`size` in all), every n-th is read. The same texts give the same bytes."""
    import sentencepiece
    sample = itertools.islice(texts, 0, None, 1 + (size >> 24))
    # Lines over 4,192 bytes would be dropped. A newline is in none, so it stays byte <0x0A>.
    lines = "\n".join(sample).split("\n")
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


def extend(base: Tokenizer, other: str | Path) -> SentencePiece:
    """Chinese-LLaMA's vocabulary: behind the base's pieces those of another .model, of any kind,
    that the base has not, in their order. Their score, 0, is above the base's, so that they join
    first."""
    import sentencepiece
    if not isinstance(base, SentencePiece):
        raise ValueError("only a SentencePiece model can be extended; try LLaMA's or Llama 2's")
    with one_line_errors(other):
        theirs = sentencepiece.SentencePieceProcessor(model_proto=Path(other).read_bytes())
    known, model = set(base.names), [base.file]
    for i in range(theirs.vocab_size()):
        name = theirs.id_to_piece(i)
        marks = theirs.is_control(i) or theirs.is_unknown(i) or theirs.is_byte(i)
        if name not in known and not marks:
            piece = protobuf_field(1, name.encode()) + b"\x15" + struct.pack("<f", 0.0)
            model.append(protobuf_field(1, piece + protobuf_field(3, NORMAL)))
    return SentencePiece(b"".join(model))


# ---------------------------------------------------------------------------------------------
# Byte-level BPE (Sennrich et al., 2016; over bytes as in GPT-2)


def merge_naively(text: str, rank: Callable) -> list[str]:
    """Byte-pair encoding as it is defined: again and again join the adjacent pair of lowest rank,
    the leftmost of equals. rank(left, right) is None for a pair that is never joined.

    With the ranks aa 0, ab 1, aaab 2, "aaabdaaabac" becomes aa|ab|d|aa|ab|a|c, then
    aaab|d|aaab|a|c. n characters take O(n^2).
    """
    parts = list(text)
    while True:
        pairs = enumerate(map(rank, parts, parts[1:]))
        best = min(((r, i) for i, r in pairs if r is not None), default=None)
        if best is None:
            return parts
        i = best[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def merge(text: str, rank: Callable) -> list[str]:
    """The parts of merge_naively in O(n log n). Part i is text[i:end[i]]; a heap holds (rank, i) of
    the pairs that begin at i. An entry that a merge made untrue is recognised by its rank."""
    n = len(text)
    end, before, heap = [*range(1, n + 1), n], [*range(-1, n)], []

    def rank_at(i):
        j = end[i]
        return rank(text[i:j], text[j:end[j]]) if 0 <= i and j < n else None

    def push(i):
        if (r := rank_at(i)) is not None:
            heapq.heappush(heap, (r, i))

    for i in range(n):
        push(i)
    while heap:
        r, i = heapq.heappop(heap)
        if rank_at(i) == r:
            j = end[i]
            end[i], end[j] = end[j], n  # part j is gone: like the last part, it has no pair
            before[end[i]] = i
            push(i)
            push(before[i])
    parts, i = [], 0
    while i < n:
        parts.append(text[i:end[i]])
        i = end[i]
    return parts


# How a text is split into pretokens, as the files of Llama 3, GPT-2, SmolLM2 and llama.cpp say it.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
UNNAMED = r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"
GGUF_SPLITS = {"llama-bpe": (LLAMA3,), "llama3": (LLAMA3,), "llama-v3": (LLAMA3,),
               "smollm": (DIGIT, GPT2), "gpt-2": (GPT2,), "default": UNNAMED}


@functools.cache
def split_pattern(pattern: str, top: int) -> re.Pattern:
    r"""A pattern above for Python's `re`, for a text of characters below `top`. `re` has no \p{L},
    \p{N} and \p{P}, so they become ranges (few and fast where top is 128), and its \s takes \x1c to
    \x1f too, which are not White_Space."""
    kinds = "".join(map(unicodedata.category, map(chr, range(top))))[::2]  # the first letters
    sets = {r"\s": r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"}
    for kind in "LNP":
        runs = (run.span() for run in re.finditer(f"{kind}+", kinds))
        sets[rf"\p{{{kind}}}"] = "".join(f"\\U{a:08x}-\\U{z - 1:08x}" for a, z in runs)

    def spelled(part):
        text = part[0] if part[0][0] == "[" else f"[{part[0]}]"
        for name, ranges in sets.items():
            text = text.replace(name, ranges)
        return text

    pattern = re.sub(r"\[.*?\]|\\s|\\p\{.\}", spelled, pattern.replace(r"\S", r"[^\s]"))
    return re.compile(f"({pattern})")


# GPT-2 writes a printable byte as its own character, the others as U+0100 and on, in order.
OTHERS = [*range(33), *range(127, 161), 173]
GPT2_CHARACTERS = dict(zip(OTHERS, itertools.count(256)))
GPT2_BYTES = dict.fromkeys(OTHERS, 256) | dict(zip(itertools.count(256), OTHERS))


def gpt2_name(data: bytes) -> str:
    """Bytes in GPT-2's characters: b" a" is "Ġa"."""
    return data.decode("latin-1").translate(GPT2_CHARACTERS)


class BytePair(Tokenizer):
    """BPE over bytes inside pretokens (Llama 3, SmolLM2, GPT-2).

    names: of each id, in GPT-2's characters for bytes, but special tokens as they are; types: of
    each id; merges: pairs of names, None where a pair's rank is the id of what it makes; splits:
    patterns, one after another, for pretokens; whole: a pretoken that is a token is not merged.
    Bytes without a token (SmolLM2 has some) are left out of texts, as in Hugging Face's library.
    Equal to tiktoken on all characters that this Python's Unicode tables know.
    """

    CACHED, CACHED_LENGTH = 1 << 16, 64  # pretokens whose ids are kept, and their longest: 10 MB

    def __init__(self, names, types, merges, splits, whole, own, config, file=None):
        self.names, self.splits, self.whole, self.file = names, splits, whole, file
        self.merges = merges
        if merges is not None:
            self.merges = dict(zip(merges, itertools.count()))
        self.vocab_size, self.tokens, self.cache = len(names), [], {}
        self.ranks, self.special, self.found_always = {}, {}, []
        for i, (name, kind) in enumerate(zip(names, types, strict=True)):
            if kind not in (UNKNOWN, CONTROL, USER_DEFINED):
                self.ranks[name] = i
                self.tokens.append(name.translate(GPT2_BYTES).encode("latin-1"))
                continue
            self.special[name] = i
            self.tokens.append(name.encode())
            if kind == USER_DEFINED:
                self.found_always.append(name)
        self.missing = set(gpt2_name(bytes(range(256)))) - self.ranks.keys()
        self.configure(own, config)

    def rank(self, left: str, right: str) -> int | None:
        if self.merges is None:
            return self.ranks.get(left + right)
        return self.merges.get((left, right))

    def pretokens(self, text: str) -> Iterable[str]:
        parts, highest = [text], ord(max(text, default=" "))
        top = next(top for top in (0x80, 0x3000, 0x110000) if highest < top)
        for split in self.splits:  # into what matches, at odd places, and what is between
            pattern = split_pattern(split, top)
            parts = filter(None, itertools.chain.from_iterable(map(pattern.split, parts)))
        return parts

    def ordinary(self, text, begins):
        ids = []
        for pretoken in self.pretokens(text):
            found = self.cache.get(pretoken)
            if found is None:
                parts = ["".join(filter(self.ranks.__contains__, gpt2_name(pretoken.encode())))]
                if not self.whole or parts[0] not in self.ranks:
                    parts = merge(parts[0], self.rank)
                found = list(map(self.ranks.get, parts))
                if len(self.cache) < self.CACHED and len(pretoken) <= self.CACHED_LENGTH:
                    self.cache[pretoken] = found
            ids += found
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens become their names, as in tiktoken; broken UTF-8 becomes U+FFFD."""
        tokens = map(self.tokens.__getitem__, self.check_ids(ids))
        return b"".join(tokens).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        name = self.names[self.check_ids([token])[0]]
        return b"" if name in self.special and name not in self.found_always else self.tokens[token]


# ---------------------------------------------------------------------------------------------
# Files that hold a tokenizer


def expect_one_of(what: str, value, *allowed):
    """The value if it is an allowed one, else a ValueError that names it."""
    if value not in allowed:
        raise ValueError(f"{what} {json.dumps(value)[:200]} is not implemented; try a tokenizer of "
                         "Llama's, SmolLM2's or GPT-2's kind")
    return value


# What follows the ranks; each - is a reserved one. Llama 3.0 has some of these names only.
LLAMA3_SPECIAL = ("begin_of_text end_of_text - - finetune_right_pad_id step_id start_header_id "
                  "end_header_id eom_id eot_id python_tag image" + " -" * 244)


def read_ranks(data: bytes, config: dict | None = None) -> BytePair:
    """Llama 3's tokenizer.model, a tiktoken file: lines "base64 rank", the ranks in order from 0.
    256 special tokens follow."""
    names, reserved = {}, itertools.count()
    for rank, line in enumerate(data.splitlines()):
        text, _, number = line.partition(b" ")
        with contextlib.suppress(ValueError):
            token = base64.b64decode(text, validate=True)
            if token and number == b"%d" % rank:
                names.setdefault(gpt2_name(token))
        if len(names) == rank:
            raise ValueError(f"line {rank + 1} is no new token with rank {rank}; try another copy")
    types = [NORMAL] * len(names) + [CONTROL] * 256
    for word in LLAMA3_SPECIAL.split():
        if word == "-":
            word = f"reserved_special_token_{next(reserved)}"
        names[f"<|{word}|>"] = None
    tokenizer = BytePair(list(names), types, None, (LLAMA3,), True, {}, config, data)
    if tokenizer.missing:
        raise ValueError("some byte has no rank; try another copy")
    return tokenizer


def read_llama2c(data: bytes, config: dict | None = None) -> SentencePiece:
    """llama2.c's tokenizer.bin: uint32 longest; per id a float32 score, a uint32 length and the
    text with plain spaces. Ids: unk, bos, eos, 256 bytes, then pieces."""
    pieces, at = [], 4
    while at < len(data):
        score, size = struct.unpack_from("<fI", data, at)
        at += 8 + size
        if size > int.from_bytes(data[:4], "little") or at > len(data):
            raise ValueError(f"tokenizer.bin is damaged near id {len(pieces)}; try another copy")
        text = data[at - size:at].decode().replace(" ", "▁")
        pieces.append((text, score, BYTE if len(pieces) < 259 else NORMAL))
    pieces[:3] = ("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)
    return SentencePiece(write_model(pieces, prefix=True), config)


def character_level(pieces: list[tuple[str, float, int]], front: str, own: dict,
                    config: dict | None, file: bytes = b"") -> SentencePiece:
    """A SentencePiece from (text, score, type) of each id, and the file that says so, if any. Its
    user-defined tokens are found by `found_always`, and so are unused as pieces."""
    found = [text for text, _, kind in pieces if kind == USER_DEFINED]
    used = [(text, score, UNUSED if kind == USER_DEFINED else kind) for text, score, kind in pieces]
    model = write_model(used, prefix=front != "never")
    if not file and not found:
        file = model  # else it is written as a tokenizer.json
    return SentencePiece(model, config, front, found, own, file)


def read_merges(merges: list, names: list[str], types: list[int]) -> dict[tuple[str, str], int]:
    """The rank of each pair in ["a b", ...] or [["a", "b"], ...], all of normal tokens."""
    type_of, ranks = dict(zip(names, types)), {}
    for rank, pair in enumerate(merges):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        for token in (left, right, left + right):
            if type_of.get(token) != NORMAL:
                raise ValueError(f"merge {rank} is not of tokens; try another copy")
        ranks[left, right] = rank
    return ranks


def all_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges that do what scores do: all pairs of tokens that join to a token, the best token
    first. With {"a": 0, "b": 0, "ab": -1, "aba": -2} they are (a, b) and (ab, a)."""
    pairs = []
    for token in scores:
        if len(token) > 1000:  # its pairs take too long to list
            raise ValueError(f"a token of {len(token)} characters is too long; try another copy")
        for i in range(1, len(token)):
            if token[:i] in scores and token[i:] in scores:
                pairs.append((token[:i], token[i:]))
    # Of equal scores the longest left part first: runs of spaces then join from the left.
    return sorted(pairs, key=lambda pair: (scores[pair[0] + pair[1]], len(pair[0])), reverse=True)


def tokenizer_from_gguf(fields: dict) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata: "llama" (pieces with scores) or "gpt2" (merges; an
    unnamed split is llama.cpp's). ValueError where the fields are wrong."""
    with one_line_errors("the vocabulary"):
        field = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
        model = expect_one_of("tokenizer.ggml.model", field["model"], "llama", "gpt2")
        names, config = field["tokens"], {"chat_template": field.get("tokenizer.chat_template")}
        types = list(field.get("token_type", [NORMAL] * len(names)))
        if not len(types) == len(names) == len(set(names)):
            raise ValueError("two tokens are equal, or types are missing; try another copy")
        for key in ("bos_token", "eos_token", "eot_token"):
            i = field.get(f"{key}_id")
            if i is None:
                continue
            if type(i) is not int or not 0 <= i < len(names):
                raise ValueError(f"no token has id {i}; try another copy")
            config[key], types[i] = names[i], max(types[i], CONTROL)
        pre = expect_one_of("tokenizer.ggml.pre", field.get("pre", "default"), *GGUF_SPLITS)
        whole = GGUF_SPLITS[pre] == (LLAMA3,)
        config["add_bos_token"] = field.get("add_bos_token", model == "llama" or whole)
        if model == "gpt2":
            merges = read_merges(field["merges"], names, types)
            return BytePair(names, types, merges, GGUF_SPLITS[pre], whole, {}, config)
        spaced = expect_one_of("add_space_prefix", field.get("add_space_prefix", True), True, False)
        pieces = list(zip(names, field["scores"], types, strict=True))
        return character_level(pieces, "prepend" if spaced else "never", {}, config)


# The parts of a tokenizer.json around its model, and where a part of several steps lists them.
JSON_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers",
              "post_processor": "processors", "decoder": "decoders"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True,
              "trim_offsets": False}


def json_steps(kind: str | tuple[str, ...]) -> dict[str, list[dict]]:
    """A tokenizer.json's steps around its model: for a SentencePiece's `front`, whose "never" older
    files write as "replace", or for a BytePair's `splits`."""
    if isinstance(kind, tuple):
        steps, last = [], kind[-1] == GPT2  # ByteLevel splits by GPT-2's pattern if use_regex
        for pattern in kind[:-1] if last else kind:
            if pattern == DIGIT:
                steps.append({"type": "Digits", "individual_digits": True})
            else:
                steps.append({"type": "Split", "pattern": {"Regex": pattern},
                              "behavior": "Isolated", "invert": False})
        steps.append(BYTE_LEVEL | {"use_regex": last})
        return {"normalizer": [], "pre_tokenizer": steps, "decoder": [BYTE_LEVEL]}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": kind, "split": False}
    steps = {"normalizer": [], "pre_tokenizer": [metaspace], "decoder": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}]}
    if kind == "replace":
        steps |= {"normalizer": [replace], "pre_tokenizer": []}
    if kind == "prepend":
        prepend = {"type": "Prepend", "prepend": "▁"}
        steps |= {"normalizer": [prepend, replace], "pre_tokenizer": []}
    if kind in ("prepend", "always", "first"):
        steps["decoder"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return steps


def read_steps(file: dict) -> dict[str, list[dict]]:
    """What json_steps gives, from a tokenizer.json, and the steps of its post-processor."""
    steps = {}
    for part, inside in JSON_PARTS.items():
        step = file.get(part) or {"type": "Sequence", inside: []}
        steps[part] = step[inside] if step["type"] == "Sequence" else [step]
        for step in steps[part]:
            if step["type"] == "ByteLevel":  # settings that change no ids are made equal
                step.setdefault("use_regex", True)
                step |= BYTE_LEVEL if part == "decoder" else {"trim_offsets": False}
    return steps


def read_vocabulary(vocab: dict, added: list[dict]) -> tuple[list[str], list[int]]:
    """The names and types of a tokenizer.json's ids."""
    vocab, kinds = dict(vocab), {}
    for token in added:
        name, i = token["content"], token["id"]
        kinds[name] = CONTROL if token["special"] else USER_DEFINED
        if vocab.setdefault(name, i) != i:
            raise ValueError(f"{name} has two ids; try another copy")
    names = sorted(vocab, key=vocab.get)
    ids = list(map(vocab.get, names))
    if ids != list(range(len(ids))) or {*map(type, ids)} != {int} or "" in vocab:
        raise ValueError("the ids are not 0, 1, 2 ... of one token each; try another copy")
    return names, [kinds.get(name, NORMAL) for name in names]


def spelling(token: dict) -> str:
    """The pattern by which an added token is found: single_word is not a part of a longer word,
    lstrip and rstrip take in the spaces before and behind."""
    pattern = re.escape(token["content"])
    if token.get("single_word"):
        pattern = rf"(?<!\w){pattern}(?!\w)"
    if token.get("lstrip"):
        pattern = rf"\s*{pattern}"
    return rf"{pattern}\s*" if token.get("rstrip") else pattern


def merge_scores(ranks: dict[tuple[str, str], int], normal: Iterable[str]) -> dict[str, float]:
    """Scores of the normal tokens that do what merges do: the earlier a token's first merge, the
    higher. Runs of spaces may share one score, as Llama 2's do. ValueError where none do the same.
    """
    scores, pairs = dict.fromkeys(normal, -len(ranks)), sorted(ranks, key=ranks.get)
    for left, right in reversed(pairs):
        scores[left + right] = -ranks[left, right]
    runs = [name for name in scores if len(name) > 1 and not name.strip("▁")]
    shared = dict.fromkeys(runs, max(map(scores.get, runs), default=0))
    for scores in (scores, scores | shared):
        # Those of one token may stand in any order.
        order = [scores[left + right] for left, right in pairs]
        if order == sorted(order, reverse=True) and set(pairs) == set(all_merges(scores)):
            return scores
    raise ValueError("no scores do what its merges do; try its tokenizer.model")


def tokenizer_from_json(data: bytes, config: dict | None = None) -> Tokenizer:
    """A tokenizer.json's BPE by a list of merges: over bytes (Llama 3, SmolLM2, GPT-2) or over
    characters that fall back to bytes (LLaMA 1, 2). ValueError for what is not implemented."""
    file = read_json(data)
    model, added, own = file["model"], file.get("added_tokens") or [], {"add_bos_token": False}
    over_bytes = not model.get("byte_fallback")
    for key, *allowed in (("type", "BPE", None), ("dropout", None), ("end_of_word_suffix", None),
                          ("continuing_subword_prefix", None), ("ignore_merges", None, over_bytes)):
        expect_one_of(key, model.get(key) or None, *allowed)
    steps = read_steps(file)
    for step in steps.pop("post_processor"):
        expect_one_of("post_processor", step["type"], "ByteLevel", "TemplateProcessing")
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            own = {"add_bos_token": True, "bos_token": step["single"][0]["SpecialToken"]["id"]}
    own["spelled"] = {token["content"]: spelling(token) for token in added}
    fronts = "prepend", "always", "first", "never", "replace"
    kinds = GGUF_SPLITS.values() if over_bytes else fronts
    kind = next((kind for kind in kinds if steps == json_steps(kind)), None)
    if kind is None:
        expect_one_of("normalizer, pre_tokenizer, decoder", steps)
    names, types = read_vocabulary(model["vocab"], added)
    if over_bytes:
        merges, whole = read_merges(model["merges"], names, types), bool(model.get("ignore_merges"))
        tokenizer = BytePair(names, types, merges, kind, whole, own, config, data)
        if tokenizer.missing:
            expect_one_of("unk_token", model.get("unk_token"), None)
        return tokenizer
    for token in added:
        if kind == "prepend" and not token["special"]:  # it would be found behind a space alone
            expect_one_of("an added token's normalized", token["normalized"], False)
    for i, name in enumerate(names):
        if name == model.get("unk_token"):
            types[i] = UNKNOWN
        elif re.fullmatch("<0x[0-9A-F]{2}>", name):
            types[i] = BYTE
    normal = itertools.compress(names, map(NORMAL.__eq__, types))
    scores = merge_scores(read_merges(model["merges"], names, types), normal)
    pieces = [(name, scores.get(name, 0), kind) for name, kind in zip(names, types)]
    return character_level(pieces, "never" if kind == "replace" else kind, own, config, data)


def json_model(tokenizer: Tokenizer) -> dict:
    """What a tokenizer.json's model says besides the vocabulary. ValueError where pieces of a
    SentencePiece have equal scores: of two such pairs the left one joins, which no merges say."""
    if isinstance(tokenizer, BytePair):
        merges = tokenizer.merges
        if merges is None:
            merges = all_merges({name: -rank for name, rank in tokenizer.ranks.items()})
        return {"merges": list(merges), "ignore_merges": tokenizer.whole}
    ask, scores, made = tokenizer.processor, {}, {}
    for i, name in enumerate(tokenizer.names):
        if not (ask.is_byte(i) or ask.is_unused(i) or name in tokenizer.special):
            scores[name] = ask.get_score(i)
    merges = all_merges(scores)
    for name in map("".join, merges):
        other = made.setdefault(scores[name], name)
        if name != other and (name + other).strip("▁"):
            raise ValueError(f"the scores of {name} and {other} are equal, which no tokenizer.json "
                             "can say; try --export meta")
    return {"merges": merges, "byte_fallback": True, "fuse_unk": True,
            "unk_token": tokenizer.names[max(ask.unk_id(), 0)]}


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """A tokenizer.json that gives the same ids: the tokenizer's own, if it came from one."""
    names, added, bos = tokenizer.names, [], tokenizer.names[tokenizer.bos_id]
    if tokenizer.file and tokenizer.file.lstrip()[:1] == b"{":
        file = read_json(tokenizer.file)
    else:
        for name, i in tokenizer.special.items():
            added.append({"id": i, "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False,
                          "special": name not in tokenizer.found_always})
        model = {"type": "BPE", "vocab": dict(zip(names, itertools.count()))}
        file = {"version": "1.0", "added_tokens": added, "model": model | json_model(tokenizer)}
        kind = tokenizer.splits if isinstance(tokenizer, BytePair) else tokenizer.front
        for part, steps in json_steps(kind).items():
            file[part] = {"type": "Sequence", JSON_PARTS[part]: steps}
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    if tokenizer.adds_bos:
        single.insert(0, {"SpecialToken": {"id": bos, "type_id": 0}})
    file["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": single,
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}}}
    return json.dumps(file).encode()


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files, by name, from which transformers' AutoTokenizer makes the same ids. ValueError
    where no tokenizer.json does (pieces of equal scores, user-defined pieces of a .model)."""
    data, names = tokenizer_json(tokenizer), tokenizer.names
    if isinstance(tokenizer, SentencePiece):  # a .model may have user-defined pieces
        if tokenizer_from_json(data).bare.encode(names) != tokenizer.bare.encode(names):
            raise ValueError("no tokenizer.json has these pieces' types; try --export meta")
    config = {"bos_token": names[tokenizer.bos_id], "eos_token": names[tokenizer.eos_id],
              "add_bos_token": tokenizer.adds_bos, "chat_template": tokenizer.chat_template,
              "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return {"tokenizer.json": data, "tokenizer_config.json": json.dumps(config).encode()}


def with_added_tokens(model: bytes, added: dict[str, int], config: dict) -> SentencePiece:
    """A .model with the tokens of an added_tokens.json, {name: id}, behind its own. As pieces they
    are unused, so that they are found by `found_always` alone."""
    names, found = SentencePiece(model).names, []
    for name, i in sorted(added.items(), key=lambda item: item[1]):
        if i < len(names) and names[i] == name:
            continue
        if i != len(names) + len(found):
            raise ValueError(f"added_tokens.json gives {name} the id {i}, which is not free or not "
                             "the next one; try without that file")
        piece = protobuf_field(1, name.encode()) + protobuf_field(3, UNUSED)
        model += protobuf_field(1, piece)
        found.append(name)
    return SentencePiece(model, config, found=found)


def find_tokenizer(folder: Path, *more: str) -> Path | None:
    """The tokenizer's file in a folder, by its usual names."""
    for name in (*more, "tokenizer.json", "tokenizer.model", "tokenizer.bin"):
        if (folder / name).is_file():
            return folder / name
    return None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file or folder: a SentencePiece .model, Llama 3's ranks, Hugging Face's
    tokenizer.json or llama2.c's .bin, told apart by content, never by name. What
    tokenizer_config.json, added_tokens.json and chat_template.jinja beside it say counts."""
    if Path(path).is_dir():
        path = find_tokenizer(Path(path)) or path
    with open(path, "rb") as file:
        data = file.read(MAX_FILE)
    config = {}
    for beside in map(Path(path).with_name, ("tokenizer_config.json", "chat_template.jinja")):
        with one_line_errors(beside):
            if beside.is_file() and beside.suffix == ".json":
                config |= read_json(beside.read_bytes())
            elif beside.is_file():
                config["chat_template"] = beside.read_bytes().decode()
    added = Path(path).with_name("added_tokens.json")
    with one_line_errors(path):
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
            return read_ranks(data, config)
        if re.match(rb'\s*\{\s*"', data):
            return tokenizer_from_json(data, config)
        if data[12:17] == b"<unk>":
            return read_llama2c(data, config)
        if data[:1] == b"\n":  # protobuf's field 1, a piece
            if added.is_file():
                return with_added_tokens(data, read_json(added.read_bytes()), config)
            return SentencePiece(data, config)
        if data.startswith(b"version https://git-lfs"):
            raise ValueError("is a pointer of git-lfs, not the file itself; try git lfs pull")
        raise ValueError("holds no tokenizer; try a SentencePiece .model, a tokenizer.json, "
                         "Llama 3's tokenizer.model (ranks) or llama2.c's tokenizer.bin")


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


# ---------------------------------------------------------------------------------------------
# Documents, the held-out part, token shards


MAX_DOCUMENT, MIN_PIECE = 1 << 16, 1 << 14  # characters
LINES = re.compile(r"\n"), re.compile(r"\n(?:\r?\n)+")  # ends of lines, blank lines


def cut(stream: TextIO) -> Iterator[str]:
    """The pieces of a document, so that a part of a long one can be held out. Up to 65,536
    characters it is one piece. A longer one is cut behind the first blank line after 16,384, or
    behind the first line if no blank line follows within 65,536, or else there."""
    rest = stream.read(MAX_DOCUMENT + 1)
    patterns = LINES if len(rest) > MAX_DOCUMENT else ()
    while rest:
        end = MAX_DOCUMENT
        for pattern in patterns:  # where both are found, blank lines count
            if match := pattern.search(rest, MIN_PIECE, MAX_DOCUMENT):
                end = match.end()
        yield rest[:end]
        rest = rest[end:] + stream.read(end)


def json_rows(file: Path, is_array: bool) -> Iterator:
    """The values in the lines of a file, or in the one JSON array that it is; None for no JSON."""
    with open(file, "rb") as stream:
        if is_array:
            yield from json.loads(stream.read(MAX_FILE))
        while line := stream.readline(MAX_FILE):  # a longer one comes in parts, which are no JSON
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                if line.strip():
                    yield None


def data_rows(path: str | Path) -> Iterator:
    """The rows of a file of data: a JSON array in a .json file, elsewhere a line each."""
    return json_rows(Path(path), Path(path).suffix.lower() == ".json")


def read_json_texts(file: Path, is_array: bool) -> Iterator[Iterable[str]]:
    """A document per row, by its "text"; half a surrogate pair turns into "?"."""
    wrong = 0
    for row in json_rows(file, is_array):
        try:
            text = row["text"].encode("utf-8", "replace").decode()
        except (TypeError, LookupError, AttributeError):
            wrong += 1
            continue
        yield cut(io.StringIO(text))
    if wrong:
        raise ValueError(f'{wrong} lines are not JSON objects with a string "text"')


def read_text(file: Path) -> Iterator[Iterable[str]]:
    """The one document of a UTF-8 file, without a byte order mark. Nothing of it is given before
    all of it is known to be text."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        while text := stream.read(MAX_DOCUMENT):
            if "\0" in text:
                raise ValueError("holds NUL bytes")
        stream.seek(0)
        yield cut(stream)


def file_documents(file: Path, skipped: list[str]) -> Iterator[Iterable[str]]:
    """The documents of a file, each in pieces; what is no text is told to `skipped`."""
    kind = file.suffix.lower()
    try:
        if not file.stat().st_size:
            raise ValueError("empty or not a regular file")
        with open(file, "rb") as stream:
            is_array = kind == ".json" and stream.read(99).lstrip()[:1] == b"["
        if is_array or kind == ".jsonl":
            yield from read_json_texts(file, is_array)
        else:
            yield from read_text(file)
    except UnicodeDecodeError:
        skipped.append(f"{file}: not UTF-8 text")
    except (ValueError, OSError) as error:
        skipped.append(f"{file}: {getattr(error, 'strerror', None) or error}")


def files_below(folder: Path, left_out: re.Pattern, skipped: list[str]) -> Iterator[Path]:
    """The files of a folder and its subfolders in order. Passed over, and told to `skipped`, are
    names that match left_out, runs, what cannot be read, and a folder inside itself (by a link)."""
    def unreadable(error: OSError) -> None:
        skipped.append(f"{error.filename}: {error.strerror}")

    for path, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(path)
        if "run.json" in names:
            skipped.append(f"{path}: a run, with its weights and its log")
            folders.clear()
            continue
        kept = []
        for name in sorted(folders):
            inside = os.path.join(path, name)
            if left_out.fullmatch(name):
                skipped.append(f"{inside}: left out by its name")
            elif os.path.islink(inside) and f"{real}/".startswith(f"{os.path.realpath(inside)}/"):
                skipped.append(f"{inside}: a link to a folder that holds it")
            else:
                kept.append(name)
        folders[:] = kept
        for name in sorted(names):
            if left_out.fullmatch(name):
                skipped.append(f"{os.path.join(path, name)}: left out by its name")
            else:
                yield Path(path, name)


def files_of(path: str | Path, skipped: list[str]) -> Iterator[Path]:
    """The file at a path, or the files of the folder, but no hidden ones."""
    if Path(path).is_dir():
        yield from files_below(Path(path), re.compile(r"\..*"), skipped)
    else:
        yield Path(path)


def documents(paths: Iterable[str | Path], skipped: list[str]) -> Iterator[Iterable[str]]:
    """The documents of files and folders; ValueError for a missing path."""
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"{path} does not exist; try a file or folder of text")
        for file in files_of(path, skipped):
            yield from file_documents(file, skipped)


LEFT_OUT = re.compile(r"(site|dist)-packages|tests?|idlelib|lib2to3|tkinter|turtledemo|ensurepip|"
                      r"topics\.py|config-.*|_sysconfigdata.*|\..*")


def standard_library(skipped: list[str]) -> Iterator[Iterable[str]]:
    """The default text: the running Python's library as code, pydoc's topics as prose. Left out are
    tests, packages that not every system has, and files that hold the machine's paths."""
    sizes = {}
    for file in files_below(Path(os.__file__).parent, LEFT_OUT, []):
        if file.suffix == ".py" and file.stat().st_size:
            sizes[file] = file.stat().st_size
    if sum(sizes.values()) < 2_000_000:
        raise ValueError("this Python has no library to read; try --data FILE_OR_FOLDER")
    for file in sizes:
        yield from file_documents(file, skipped)
    from pydoc_data.topics import topics  # large, and seldom needed
    for name in sorted(topics):
        yield cut(io.StringIO(topics[name]))


def sha1(piece: str) -> int:
    return int.from_bytes(hashlib.sha1(piece.encode(), usedforsecurity=False).digest(), "big")


class Survey(NamedTuple):
    size: int            # bytes of text
    documents: int
    chosen: int | None   # the smallest SHA-1 if no piece is held out by its own, else None
    skipped: list[str]   # "path: reason" of what is not text


def survey(reader: Reader) -> Survey:
    """What a source holds, read once. ValueError where either split would be empty."""
    skipped, size, count, pieces, held = [], 0, 0, 0, 0
    low, high = 1 << 160, 0  # of the SHA-1 of all pieces
    for document in reader(skipped):
        count += 1
        for piece in document:
            number = sha1(piece)
            low, high = min(low, number), max(high, number)
            size += len(piece.encode())
            pieces += 1
            held += number % 20 == 0
    if low >= high or pieces == held:
        first = f", the first as {skipped[0]}" if skipped else ""
        raise ValueError(f"too little text to hold out a part ({size:,} bytes in {pieces} pieces; "
                         f"{len(skipped)} files skipped{first}); try over 64 KiB or more files")
    return Survey(size, count, None if held else low, skipped)


def records(reader: Reader, chosen: int | None) -> Iterator[tuple[int, bool, str | None]]:
    """(split, starts, piece) of all pieces. Split 1 is held out for evaluation: pieces whose SHA-1
    is 0 mod 20, or is `chosen` (a Survey's). starts: the first piece of its document in its split;
    piece None ends a document there."""
    for document in reader([]):
        begun = set()
        for piece in document:
            number = sha1(piece)
            split = int(number % 20 == 0 or number == chosen)
            yield split, split not in begun, piece
            begun.add(split)
        for split in sorted(begun):
            yield split, False, None


def training_text(reader: Reader, chosen: int | None) -> Iterator[str]:
    """The pieces that are not held out, for train_sentencepiece."""
    for split, _, piece in records(reader, chosen):
        if split == 0 and piece is not None:
            yield piece


def encode_record(record: tuple) -> np.ndarray:
    """The tokens of a record: uint16, or uint32 where the vocabulary is larger; little endian."""
    tokenizer, (_, starts, piece) = encode_record.tokenizer, record
    ids = [tokenizer.eos_id]
    if piece is not None:
        ids = tokenizer.encode(piece, bos=starts, continues=not starts)
    return np.array(ids, "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def start_worker(tokenizer: Tokenizer) -> None:
    """A process keeps the tokenizer, so that its tasks are text alone, and leaves Ctrl-C to us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encode_record.tokenizer = tokenizer


def encoded(items: Iterator[tuple], tokenizer: Tokenizer, workers: int) -> Iterator[tuple]:
    """(record, its tokens) in order; the reader never runs far ahead of the processes."""
    if workers == 1:
        encode_record.tokenizer = tokenizer
        for record in items:
            yield record, encode_record(record)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, start_worker, (tokenizer,)) as pool:
        while group := list(itertools.islice(items, 256 * workers)):
            yield from zip(group, pool.map(encode_record, group, chunksize=64))


def prepare(name: str, reader: Reader, found: Survey, tokenizer: Tokenizer, folder: str | Path,
            workers: int | None = None) -> dict:
    """Write folder/name.train.bin and .val.bin: of each document and split BOS, its pieces, EOS, in
    the integers of encode_record; the bytes do not depend on workers. reader(skipped) gives the
    documents, each time anew. Returns what was counted."""
    folder, tokens, texts = Path(folder), [0, 0], [0, 0]
    if workers is None:  # one for each 16 MiB: the start of a process takes longer than less work
        workers = min(cores(), 61, 1 + (found.size >> 24))  # Windows: 61
    folder.mkdir(parents=True, exist_ok=True)

    def write_train(train):
        def write_val(val):
            tasks = records(reader, found.chosen)
            for (split, _, piece), ids in encoded(tasks, tokenizer, workers):
                (train, val)[split].write(ids.tobytes())
                tokens[split] += len(ids)
                texts[split] += len((piece or "").encode())
        write_aside(folder / f"{name}.val.bin", write_val)

    write_aside(folder / f"{name}.train.bin", write_train)
    return {"name": name, "train_tokens": tokens[0], "val_tokens": tokens[1],
            "train_bytes": texts[0], "val_bytes": texts[1], "documents": found.documents,
            "dtype": "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"}


def info(tokenizer: Tokenizer) -> None:
    """What a teacher would show of a tokenizer first."""
    pieces = map(tokenizer.token_bytes, tokenizer.encode("In 2023, 🦙"))
    longest = max(map(tokenizer.token_bytes, range(tokenizer.vocab_size)), key=len)
    print(f"{type(tokenizer).__name__}: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_id}, eos "
          f"{tokenizer.eos_id}, ends at {sorted(tokenizer.stop_ids)}, longest {longest}")
    print("In 2023, 🦙:", *pieces)


def parser() -> Parser:
    p = Parser(description=__doc__)
    commands, add = p.add_subparsers(dest="command", required=True), {}
    for name, what in (("train", "Learn a BPE; more text makes better pieces."),
                       ("encode", "Text to ids; - reads a long text from stdin."),
                       ("decode", "Ids to text; - reads the ids from stdin."),
                       ("extend", "Add the pieces of a SentencePiece model to LLaMA's."),
                       ("info", "What a file holds; look here before you train.")):
        add[name] = commands.add_parser(name, description=what).add_argument
    add["train"]("--data", nargs="+", metavar="PATH", help="default: Python's own library")
    add["train"]("--vocab-size", type=int, default=4096, metavar="N", help="default: 4096")
    add["train"]("--out", required=True, metavar="FILE", help="the .model to write")
    add["train"]("--force", action="store_true", help="overwrite FILE")
    add["encode"]("--tokenizer", required=True, metavar="FILE")
    add["encode"]("--bos", action="store_true", help="as at the start of a document")
    add["encode"]("--eos", action="store_true", help="as at its end")
    add["encode"]("--special", action="store_true", help="<s> and the like are special tokens; "
                  "without it they are ordinary text")
    add["encode"]("text", metavar="TEXT")
    add["decode"]("--tokenizer", required=True, metavar="FILE")
    add["decode"]("text", metavar="ID", nargs="+")
    add["info"]("tokenizer", metavar="FILE")
    add["extend"]("base", metavar="BASE")
    add["extend"]("other", metavar="OTHER", help="a .model")
    add["extend"]("out", metavar="OUT", help="the .model to write")
    add["extend"]("--force", action="store_true", help="overwrite OUT")
    return p


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    if args.command in ("train", "extend"):
        if os.path.exists(args.out) and not args.force:
            raise ValueError(f"{args.out} exists; try --force or another --out")
        args.tokenizer = args.out
    if args.command == "extend":
        extend(load_tokenizer(args.base), args.other).save(args.out)
    elif args.command == "train":
        reader = functools.partial(documents, args.data) if args.data else standard_library
        found = survey(reader)
        texts = training_text(reader, found.chosen)
        train_sentencepiece(texts, args.vocab_size, found.size).save(args.out)
    tokenizer = load_tokenizer(args.tokenizer)
    if args.command in ("train", "extend", "info"):
        return info(tokenizer)
    text = args.text if args.command == "encode" else " ".join(args.text)
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    if args.command == "encode":
        special = tokenizer.special if args.special else ()
        return print(*tokenizer.encode(text, args.bos, args.eos, allowed_special=special))
    if wrong := re.search(r"[^0-9\s]\S*", text):
        raise ValueError(f"{wrong[0]} is no id; try numbers separated by spaces")
    print(tokenizer.decode(map(int, text.split())))


if __name__ == "__main__":
    command(main)
