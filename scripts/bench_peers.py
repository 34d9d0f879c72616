#!/usr/bin/env python3
"""Foveate beside llama.cpp and mistral.rs: the same file, the same threads, by turns, on an otherwise idle machine.

    scripts/bench_peers.py smollm2-135m-instruct --prompts 512,4096,7600
    scripts/bench_peers.py qwen2.5-coder-0.5b-instruct --prompts 512,16384 --peers llama.cpp --write README.md

The peers come as Python packages into target/peers, once. A round runs every engine once at every length, each in a process
of its own; printed are medians over the rounds and Foveate's ratio to each peer, as a table in Markdown.
--write FILE puts the rows of this model between `<!-- peers:begin -->` and `<!-- peers:end -->` there, in the place of
its old ones. Foveate and llama.cpp get the same pseudo-random ids; mistral.rs takes text alone, so it gets words of about as many
tokens, and its own count of them. Needs Python 3.10 or newer and nothing beside it."""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / "target" / "peers"
PACKAGES = {"llama.cpp": "xllamacpp==2026.10.11549", "mistral.rs": "mistralrs==0.9.5"}
FOVEATE = ROOT / "target" / "release" / "foveate"
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"


def ids(count: int) -> list[int]:
    """Token ids without a pattern that a cache could use, all inside the vocabularies that are measured."""
    return [1000 + (j * 7919) % 20000 for j in range(count)]


def foveate(model: str, prompt: int, args: argparse.Namespace, attention: str) -> dict:
    command = [str(FOVEATE), "generate", "-m", model, "--prompt-ids", ",".join(map(str, ids(prompt))), "--greedy", "-n", str(args.n + 1)]
    command += ["--ignore-eos", "--json", "-t", str(args.threads), "--attn", attention, "-c", str(prompt + args.n + 64)]
    command += ["--min-ctx", str(args.min_ctx)] if attention == "routed" else []
    document = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    timings, memory = document["timings"], document["memory"]
    return {
        "prefill": timings["prompt_tps"],
        "decode": timings["decode_tps"],
        "ttft": timings["ttft_ms"] / 1e3,
        "resident": memory["kv_bytes"],
        "read": document["kv_read_bytes_per_token"],
        "peak": memory["peak_bytes"],
    }


def llama_cpp(path: str, prompt: int, args: argparse.Namespace) -> dict:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = path, prompt + args.n + 64, 1, 0
    params.warmup = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    request = {"prompt": ids(prompt), "n_predict": args.n, "ignore_eos": True, "cache_prompt": False, "temperature": 0}
    timings = server.handle_completions(request)["timings"]
    return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"], "ttft": timings["prompt_ms"] / 1e3}


def mistral_rs(path: str, prompt: int, args: argparse.Namespace) -> dict:
    import mistralrs

    which = mistralrs.Which.GGUF(quantized_model_id=str(Path(path).parent), quantized_filename=Path(path).name)
    runner = mistralrs.Runner(which, prefix_cache_n=0)
    words = "the quick brown fox jumps over the lazy dog and runs along the river until night falls".split()
    text = " ".join(words[(j * 7) % len(words)] for j in range(prompt))
    request = mistralrs.CompletionRequest(prompt=text, model="default", max_tokens=args.n, temperature=0.0, ignore_eos=True)
    usage = runner.send_completion_request(request).usage
    return {"prefill": usage.avg_prompt_tok_per_sec, "decode": usage.avg_compl_tok_per_sec, "ttft": usage.total_prompt_time_sec}


PEERS = {"llama.cpp": llama_cpp, "mistral.rs": mistral_rs}


def install(peers: list[str]) -> Path:
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *(PACKAGES[peer] for peer in peers)], check=True)
    return python


def in_process(python: Path, peer: str, path: str, prompt: int, args: argparse.Namespace) -> dict | None:
    """Runs `peer` in a process of its own; None, with a line on standard error, if it failed."""
    job = json.dumps({"peer": peer, "path": path, "prompt": prompt, "n": args.n, "threads": args.threads})
    # mistral.rs takes its threads from the environment.
    env = {**os.environ, "RAYON_NUM_THREADS": str(args.threads), "CANDLE_NUM_THREADS": str(args.threads)}
    done = subprocess.run([str(python), __file__, "--job", job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode != 0:
        print(f"{peer} failed at {prompt} tokens: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(rounds: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rounds)


def spread(rounds: list[dict], key: str) -> str:
    values = [row[key] for row in rounds]
    return f"{min(values):.0f}-{max(values):.0f}"


def mib(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"


def row(model: str, prompt: int, attention: str, own: list[dict], peers: dict[str, list[dict]]) -> str:
    cells = [model, str(prompt), attention]
    for key in ("prefill", "decode"):
        ours = median(own, key)
        cell = [f"{ours:.0f} ({spread(own, key)})"]
        for peer, rounds in peers.items():
            cell.append(f"{peer} {median(rounds, key):.0f}, **{ours / median(rounds, key):.2f}**" if rounds else f"{peer} failed")
        cells.append("; ".join(cell))
    cells += [mib(median(own, "resident")), mib(median(own, "read")), mib(median(own, "peak"))]
    return "| " + " | ".join(cells) + " |"


HEADER = """| model | prompt | attention | prefill, tokens/s (spread); peer, ratio | decode after it | KV resident | KV read per token | peak memory |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def write(file: Path, model: str, rows: list[str]) -> None:
    text = file.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"{file}: no {BEGIN} ... {END} to write between")
    before, rest = text.split(BEGIN, 1)
    table, after = rest.split(END, 1)
    kept = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith((f"| {model} ", "| model ", "| --- "))]
    file.write_text(before + "\n".join([BEGIN, HEADER, *kept, *rows, END]) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name of `foveate ls`, or a .gguf file")
    parser.add_argument("--prompts", default="512,4096", help="prompt lengths, in tokens")
    parser.add_argument("--n", type=int, default=32, help="tokens generated after each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default="llama.cpp", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--attn", default="dense,routed", help="of ours")
    parser.add_argument("--min-ctx", type=int, default=2048, help="routed from this length on")
    parser.add_argument("--write", type=Path, help="file whose table is brought up to date")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        settings = argparse.Namespace(n=job["n"], threads=job["threads"])
        print(json.dumps(PEERS[job["peer"]](job["path"], job["prompt"], settings)))
        return
    if not args.model:
        parser.error("which model?")
    names = [peer for peer in args.peers.split(",") if peer]
    if unknown := [peer for peer in names if peer not in PEERS]:
        parser.error(f"--peers: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    subprocess.run(["cargo", "build", "--release", "-q"], cwd=ROOT, check=True)
    python = install(names)
    path = args.model
    if not path.endswith(".gguf"):
        subprocess.run([str(FOVEATE), "pull", "-q", path], check=True)
        path = subprocess.run([str(FOVEATE), "models", "path", path], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    prompts = [int(length) for length in args.prompts.split(",")]
    # Below the length from which it routes, routed is dense.
    modes = [(prompt, mode) for prompt in prompts for mode in args.attn.split(",") if mode == "dense" or prompt > args.min_ctx]
    own: dict[tuple[int, str], list[dict]] = {key: [] for key in modes}
    peers: dict[int, dict[str, list[dict]]] = {prompt: {peer: [] for peer in names} for prompt in prompts}
    for turn in range(args.rounds):
        for prompt in prompts:
            for mode in (mode for length, mode in modes if length == prompt):
                own[prompt, mode].append(foveate(args.model, prompt, args, mode))
            for peer in names:
                if (result := in_process(python, peer, path, prompt, args)) is not None:
                    peers[prompt][peer].append(result)
        print(f"round {turn + 1} of {args.rounds} done", file=sys.stderr)
    name = Path(args.model).stem if args.model.endswith(".gguf") else args.model
    rows = [row(name, prompt, mode, own[prompt, mode], peers[prompt]) for prompt, mode in modes]
    print(HEADER, *rows, sep="\n")
    print(f"\n{platform.machine()}, {args.threads} threads, medians of {args.rounds} rounds by turns", file=sys.stderr)
    if args.write:
        write(args.write, name, rows)


if __name__ == "__main__":
    main()
