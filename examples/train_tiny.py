# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama from text, on a CPU or a GPU, with the tokenizer of the example model.

The second model that results were checked on has another shape than ``tiny-llama`` and comes from

    OMP_NUM_THREADS=1 python examples/train_tiny.py --text books-train.txt.gz --val-text books-validation.txt \
        --output second-model --minutes 75 --batch 8 --lr 3e-3 --dtype bfloat16 --eval-every 500

With ``--steps`` a run is repeatable, interrupted or not. With ``--minutes`` the learning rate follows the clock:
every run sees the same windows of text in the same order, but how many depends on the machine.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import math
import shutil
import signal
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim import AdamW
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLE = Path(__file__).parent / "tiny-llama"
INTEGERS = {"hidden": 160, "layers": 8, "heads": 5, "kv-heads": 5, "ffn": 448, "seqlen": 256, "batch": 32}
INTEGERS |= {"eval-every": 250, "seed": 0}
# What a resumed run must share with its checkpoint; the time limit and the device may change.
FIXED = ("hidden", "layers", "heads", "kv_heads", "ffn", "seqlen", "batch", "steps", "lr", "seed", "dtype")
WARMUP = 0.02  # of the run
CHECKPOINT_SECONDS = 180
QUICK_WINDOWS = 64  # of the validation text while training; at the end all


def load_tokens(text: Path, cache: Path, seqlen: int) -> np.ndarray:
    """uint16, memory-mapped; tokenised the first time, into a file whose name holds a digest of text and tokenizer."""
    digest = hashlib.sha256(text.read_bytes() + (EXAMPLE / "tokenizer.json").read_bytes()).hexdigest()
    path = cache / f"{text.name}.{digest[:12]}.npy"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(EXAMPLE).backend_tokenizer
        parts = [np.empty(0, np.uint16)]
        with (gzip.open if text.suffix == ".gz" else open)(text, "rt", encoding="utf-8") as lines:
            while chunk := list(itertools.islice(lines, 4096)):  # a line is a paragraph; no token spans two
                encodings = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
                parts += [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]
        cache.mkdir(parents=True, exist_ok=True)
        np.save(part := path.with_suffix(".part.npy"), np.concatenate(parts))
        part.replace(path)
    tokens = np.load(path, mmap_mode="r")
    if len(tokens) <= seqlen:
        raise ValueError(f"{text} has {len(tokens)} tokens, a window needs {seqlen + 1}: lower --seqlen")
    return tokens


def loss_of(model: LlamaForCausalLM, tokens: np.ndarray, starts: Iterable[int], arguments: Namespace) -> torch.Tensor:
    """Nats per token, over the windows of text that begin at ``starts``."""
    windows = np.stack([tokens[start : start + arguments.seqlen + 1] for start in starts]).astype(np.int64)
    batch = torch.from_numpy(windows).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: np.ndarray, most: int, arguments: Namespace) -> float:
    """Nats per token, over at most ``most`` windows spread evenly over the text."""
    starts = np.arange(0, len(tokens) - arguments.seqlen, arguments.seqlen)
    chosen = starts[:: math.ceil(len(starts) / most)]
    return float(np.mean([loss_of(model, tokens, [start], arguments).item() for start in chosen]))


def build(arguments: Namespace) -> tuple[LlamaForCausalLM, AdamW]:
    torch.manual_seed(arguments.seed)
    config = LlamaConfig.from_pretrained(EXAMPLE, max_position_embeddings=max(512, arguments.seqlen))
    config.hidden_size, config.intermediate_size = arguments.hidden, arguments.ffn
    config.num_hidden_layers, config.head_dim = arguments.layers, arguments.hidden // arguments.heads
    config.num_attention_heads, config.num_key_value_heads = arguments.heads, arguments.kv_heads
    device = ("cuda" if torch.cuda.is_available() else "cpu") if arguments.device == "auto" else arguments.device
    model = LlamaForCausalLM(config).to(device)
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}]
    groups += [{"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    return model, AdamW(groups, lr=arguments.lr, betas=(0.9, 0.95), fused=True)


def save(path: Path, model: LlamaForCausalLM, optimizer: AdamW, state: dict[str, Any]) -> None:
    """Everything in one file, which one rename replaces: no pickle, and never half a checkpoint."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    tensors["rng"] = torch.get_rng_state()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, part := path.with_suffix(".part"), metadata={"state": json.dumps(state)})
    part.replace(path)


def load(path: Path, model: LlamaForCausalLM, optimizer: AdamW, fixed: dict[str, Any]) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    if changed := [f"{name} {old}, not {fixed[name]}" for name, old in state["fixed"].items() if fixed[name] != old]:
        raise ValueError(f"{path} was made with {'; '.join(changed)}: use the same, or another --output")
    tensors, whole = load_file(path), optimizer.state_dict()
    for key in [key for key in tensors if key.startswith("optimizer.")]:
        _, index, name = key.split(".")
        whole["state"].setdefault(int(index), {})[name] = tensors[key]
    optimizer.load_state_dict(whole)
    model.load_state_dict({name: tensors[f"model.{name}"] for name, _ in model.named_parameters()}, strict=False)
    torch.set_rng_state(tensors["rng"])
    return state


def train(arguments: Namespace) -> int:
    """The exit status: 0 with a finished model, 128 + signal with a checkpoint to resume."""
    output, cache, seqlen = arguments.output, arguments.output.absolute().parent, arguments.seqlen
    checkpoint = output / "checkpoint" / "state.safetensors"
    if (output / "training.json").exists():
        raise ValueError(f"{output} holds a finished model: choose another --output")
    if checkpoint.exists() != arguments.resume:
        raise ValueError(f"{checkpoint} is {'missing: leave out' if arguments.resume else 'there: add'} --resume")
    tokens = load_tokens(arguments.text, cache, seqlen)
    val = load_tokens(arguments.val_text, cache, seqlen) if arguments.val_text else None
    model, optimizer = build(arguments)
    fixed = {name: getattr(arguments, name) for name in FIXED} | {"tokens": len(tokens)}
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "train_loss": None, "fixed": fixed}
    if arguments.resume:
        state = load(checkpoint, model, optimizer, fixed)
    print(f"{model.num_parameters():,} parameters, {len(tokens):,} tokens of text, {model.device}", flush=True)

    stopped: list[int] = []  # by these signals; the running step ends first
    handlers = {n: signal.signal(n, lambda n, _: stopped.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    saved = time.monotonic()
    began, step = saved - state["seconds"], state["step"]
    while not stopped:
        seconds = time.monotonic() - began
        progress = max(step / (arguments.steps or math.inf), seconds / (60 * (arguments.minutes or math.inf)))
        if progress >= 1:
            break
        # Up from a thousandth, because the first step would be wasted at 0; then down in a line to 0.
        rate = arguments.lr * min(max(progress / WARMUP, 1e-3), (1 - progress) / (1 - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Seed and step alone decide what is read, so a resumed run reads what it would have read.
        starts = np.random.default_rng([arguments.seed, step]).integers(len(tokens) - seqlen, size=arguments.batch)
        loss = loss_of(model, tokens, starts, arguments)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        recent = state["train_loss"] or loss.item()  # a moving average, over about 50 steps
        state |= {"step": step, "seconds": seconds, "train_loss": recent + 0.02 * (loss.item() - recent)}
        if step % arguments.eval_every == 0:
            line = f"step {step}  {seconds:.0f} s  rate {rate:.2e}  train loss {state['train_loss']:.3f}"
            if val is not None:
                line += f"  validation loss {validation_loss(model, val, QUICK_WINDOWS, arguments):.3f}"
            print(line, flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(checkpoint, model, optimizer, state)
            saved = time.monotonic()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stopped:
        save(checkpoint, model, optimizer, state)
        print(f"stopped after step {step}; continue with --resume", file=sys.stderr)
        return 128 + stopped[0]

    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(output)
    model.float()  # the validation loss is that of the rounded weights
    report = {name: state[name] for name in ("step", "seconds", "train_loss")} | {
        "validation_loss": None if val is None else validation_loss(model, val, len(val), arguments),
        "tokens_seen": step * arguments.batch * seqlen,
        "arguments": vars(arguments),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    summary = json.dumps(report, indent=2, default=str)  # str for the paths
    (output / "training.json").write_text(summary + "\n")
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    print(summary)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help=".txt or .txt.gz, UTF-8")
    parser.add_argument("--val-text", type=Path, help="only reported, never trained on")
    parser.add_argument("--output", type=Path, required=True, help="directory; the token cache goes beside it")
    for name, default in INTEGERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--steps", type=int, help="stop after this many")
    parser.add_argument("--minutes", type=float, help="stop after this long")
    parser.add_argument("--lr", type=float, default=3e-3, help="the peak; default 3e-3")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is autocast")
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT/checkpoint")
    arguments = parser.parse_args(argv)
    if not arguments.steps and not arguments.minutes:
        parser.error("say how long to train: --steps, --minutes or both")
    if arguments.hidden % (2 * arguments.heads) or arguments.heads % arguments.kv_heads:
        parser.error("--hidden must be an even multiple of --heads, and --heads a multiple of --kv-heads")
    try:
        return train(arguments)
    except (OSError, EOFError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
