"""The whole of Llama 2-Chat on a laptop: SFT, reward model, best of K, PPO, and Llama 3's DPO.

    python docs/chat.py stories260K.bin tok512.bin OUT     # about five minutes on two cores

A model of 260,032 parameters (karpathy/tinyllamas, stories260K) tells stories. It learns to answer
questions, and then to be cheerful: the reward is how many different cheerful words an answer has,
which a command can count. Prints each command, and at the end what came of it on questions that
nothing was trained on; draws reward against KL divergence into OUT/chat.svg.
"""
import json
import math
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import generate
import train
from tokenizer import load_tokenizer

WORDS = "happy|smile|laugh|fun|play|love|friend|hug"
REWARD = f"""sh -c "tr A-Z a-z | grep -o -E '{WORDS}' | sort -u | wc -l" """
ADJECTIVES = "little big old young brave shy clever funny kind lost sleepy hungry".split()
NOUNS = "dog cat bird girl boy fish bear frog mouse rabbit duck horse tree boat ball car".split()


def reward(answer: str) -> int:
    """What the command REWARD counts."""
    return len(set(re.findall(WORDS, answer.lower())))


def interval(values: list[float]) -> float:
    """Half of the 95 % interval of the mean."""
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def kl_of_best(k: int) -> float:
    """KL divergence of the best of k answers from their distribution, at most."""
    return math.log(k) - (k - 1) / k


def run(command: str) -> str:
    """Runs a command of the README's kind; returns what it prints."""
    print(f"$ python {command}", flush=True)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=HERE, text=True,
                          stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def stories(model, words, asked: list[tuple[str, str]]) -> list[dict]:
    """Rows for SFT: questions, and the stories with which the model itself goes on."""
    prompts = [f"Once upon a time, there was a {adjective} {noun}" for adjective, noun in asked]
    sampling = generate.Sampling(0.8, 0, 1.0, 0, words.vocab_size)
    rows = []
    for sample in generate.sample_texts(model, words, prompts, 90, sampling):
        text = sample.prompt + sample.text
        rows.append({"instruction": question(*asked[len(rows)]),
                     "output": text[:text.rfind(".") + 1]})
    return rows


def question(adjective: str, noun: str) -> str:
    return f"Tell a story about a {adjective} {noun}."


def answers(policy: Path, questions: list[str], each: int) -> list[generate.Sample]:
    """`each` answers to every question."""
    model, words = generate.load(policy), load_tokenizer(policy / "tokenizer.model")
    chat = generate.chat_format(words, "belle")
    samples = [generate.Sample(words, text, generate.turn(words, chat, text), f"{text}{number}")
               for text in questions for number in range(each)]
    generate.grow(samples, model, 120, generate.Sampling(1.0, 0, 1.0, 1, words.vocab_size))
    return samples


def divergence(sample: generate.Sample, policy: generate.Llama, sft: generate.Llama) -> float:
    """log pi - log pi_sft of an answer, whose mean is their KL divergence."""
    ids = sample.prompt_ids + sample.ids
    if sample.stop_id is not None:
        ids = ids + [sample.stop_id]
    first = len(sample.prompt_ids) - 1
    nll = generate.token_nll(sft, ids) - generate.token_nll(policy, ids)
    return nll[first:].sum().item()


def measure(folder: Path, sft: Path, questions: list[str]) -> tuple[list, list]:
    """The rewards and divergences of a policy's answers."""
    samples, policy, reference = answers(folder, questions, 4), *map(generate.load, (folder, sft))
    print(f"> {samples[0].prompt}\n{samples[0].text.strip()}\n")
    return ([reward(sample.text) for sample in samples],
            [divergence(sample, policy, reference) for sample in samples])


def best_of(sft: Path, rm: Path, questions: list[str]) -> dict[str, tuple[list, list]]:
    """The rewards of those answers that the reward model likes best of 2, 4 and 8."""
    samples, judge, points = answers(sft, questions * 2, 8), generate.reward_model(str(rm)), {}
    scores = [judge(sample.prompt, sample.text) for sample in samples]
    for k in (2, 4, 8):
        rewards = []
        for first in range(0, len(samples), k):
            best = max(range(first, first + k), key=scores.__getitem__)
            rewards.append(reward(samples[best].text))
        points[f"best of K, K {k}"] = rewards, [kl_of_best(k)]
    return points


def main(checkpoint: str, tokenizer: str, out: str) -> None:
    began, out = time.perf_counter(), Path(out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    asked = [(adjective, noun) for adjective in ADJECTIVES for noun in NOUNS]
    random.Random(0).shuffle(asked)
    unseen = [question(*pair) for pair in asked[128:]]
    model, words = generate.load(checkpoint), load_tokenizer(tokenizer)
    write_rows(out / "rows.jsonl", stories(model, words, asked[:128]))
    write_rows(out / "unseen.jsonl", [{"instruction": text} for text in unseen])
    sampled = "--template belle --temperature 1 --top-p 1 --max-new-tokens 120"
    rows = f"--template belle --seq-len 160 --fresh --data {out}/rows.jsonl"
    pairs = f"--template belle --seq-len 160 --fresh --data {out}/pairs.jsonl"
    run(f"train.py --from {checkpoint} --tokenizer {tokenizer} --objective sft {rows} "
        f"--batch-tokens 2080 --epochs 5 --lr 0.001 --out {out}/sft")
    found = run(f"generate.py {out}/sft --prompts {out}/rows.jsonl --best-of 8 {sampled} "
                f"--reward {shlex.quote(REWARD)}")
    (out / "pairs.jsonl").write_text(found, encoding="utf-8")
    run(f"train.py --from {out}/sft --objective reward {pairs} --batch-tokens 2080 --epochs 10 "
        f"--lr 0.0005 --out {out}/rm")
    policies = {"SFT": out / "sft"}
    for beta in (0.3, 0.1, 0.03):
        policies[f"PPO, beta {beta}"] = out / f"ppo-{beta}"
        run(f"train.py --from {out}/sft --objective ppo {rows} --batch-tokens 10240 --steps 30 "
            f"--lr 0.0003 --beta {beta} --reward {out}/rm --out {out}/ppo-{beta}")
    for beta in (1.0, 0.5, 0.2):
        policies[f"DPO, beta {beta}"] = out / f"dpo-{beta}"
        run(f"train.py --from {out}/sft --objective dpo {pairs} --batch-tokens 2080 --epochs 4 "
            f"--lr 0.0002 --beta {beta} --out {out}/dpo-{beta}")
    points = {name: measure(folder, out / "sft", unseen) for name, folder in policies.items()}
    points |= best_of(out / "sft", out / "rm", unseen)
    show(points, out / "chat.svg")
    print(f"{time.perf_counter() - began:.0f} seconds")


def show(points: dict[str, tuple[list, list]], path: Path) -> None:
    """Prints and draws the rewards and KL divergences."""
    lines = {}
    for name, (rewards, divergences) in points.items():
        mean, kl = statistics.fmean(rewards), statistics.fmean(divergences)
        print(f"{name:15} reward {mean:.2f} +- {interval(rewards):.2f}   KL {kl:5.1f} nats")
        lines.setdefault(name.split(",")[0], []).append((kl, mean))
    start = lines.pop("SFT")
    lines = {name: start + line for name, line in lines.items()}
    train.draw(lines, start, path, "cheerful words in an answer", "reward",
               "KL divergence from the SFT model (nats an answer)")


if __name__ == "__main__":
    main(*sys.argv[1:])
