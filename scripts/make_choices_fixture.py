#!/usr/bin/env python3
"""Questions with choices and a text, and what transformers makes of them on the tiny checkpoints: the fixtures of `foveate compare`.

    pip install torch transformers
    python3 scripts/make_choices_fixture.py

Writes crates/cli/tests/fixtures/compare/: choices.jsonl (100 questions in the three forms that are read), text.txt, and expected.json: for each
checkpoint the verdicts by the likeliest choice and by its likelihood over its characters, and ln p of the text in windows. Scored as
lm-evaluation-harness does (`loglikelihood`, `loglikelihood_rolling`), f32 on the CPU."""
import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "crates/cli/tests/fixtures/compare"
CHECKPOINTS = ("llama", "qwen2", "gemma3_text")
WINDOW = 64
WORDS = "the sea a boat old man went out far fish and for days without took one boy his with sail home light wind green".split()


def phrase(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def questions(rng: random.Random) -> list[dict]:
    """(line of JSON, prompt, choices, answer) of each."""
    made = []
    for index in range(100):
        question, choices = phrase(rng, 3, 9), [phrase(rng, 1, 8) for _ in range(4)]
        answer = rng.randrange(4)
        prompt = f"Question: {question}\nAnswer:"
        if index % 3 == 0:
            line = {"question": question, "choices": choices, "answer": answer}
        elif index % 3 == 1:
            line = {"id": str(index), "question": {"stem": question, "choices": [{"text": t, "label": "ABCD"[i]} for i, t in enumerate(choices)]},
                    "answerKey": "ABCD"[answer]}
        else:
            ending = phrase(rng, 2, 5)
            line = {"activity_label": "Sailing", "ctx_a": question, "ctx_b": ending, "ctx": "", "endings": choices, "label": str(answer)}
            prompt = f"Sailing: {question} {ending.capitalize()}"
        made.append({"line": line, "prompt": prompt, "choices": choices, "answer": answer})
    return made


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """ln p of every token after the first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def verdicts(model, tokenizer, made: list[dict]) -> list[list[bool]]:
    out = []
    for question in made:
        context = tokenizer(question["prompt"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            whole = tokenizer(f"{question['prompt']} {choice}")["input_ids"]
            scores.append(log_probabilities(model, whole)[len(context) - 1:].sum().item())
        by_length = [score / len(choice) for score, choice in zip(scores, question["choices"])]
        out.append([max(range(4), key=values.__getitem__) == question["answer"] for values in (scores, by_length)])
    return out


def rolling(model, tokenizer, text: str) -> tuple[float, int]:
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = tokenizer("")["input_ids"]
    ends = model.generation_config.eos_token_id
    prefix = special[0] if special else (ends[0] if isinstance(ends, list) else ends)
    everything = [prefix, *tokens]
    total, done = 0.0, 0
    while done < len(tokens):
        scored = min(WINDOW, len(tokens) - done)
        done += scored
        total += log_probabilities(model, everything[max(0, done - WINDOW):done + 1])[-scored:].sum().item()
    return total, len(tokens)


def main():
    rng = random.Random(7)
    made, text = questions(rng), " ".join(phrase(rng, 5, 12).capitalize() + "." for _ in range(60))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "choices.jsonl").write_text("".join(json.dumps(question["line"]) + "\n" for question in made))
    (OUT / "text.txt").write_text(text)
    expected = {}
    for name in CHECKPOINTS:
        directory = ROOT / "crates/model/tests/fixtures/tiny" / name
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        log_likelihood, tokens = rolling(model, tokenizer, text)
        expected[name] = {"verdicts": verdicts(model, tokenizer, made), "window": WINDOW, "log_likelihood": log_likelihood, "tokens": tokens,
                          "bytes": len(text.encode()), "words": len(text.split())}
    (OUT / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
