# SPDX-License-Identifier: Apache-2.0
"""The main job on a real model, offline: prune, reload, compare, generate.

Removes 60 % of the projection weights of the Llama beside this file (composite: FFN channels and heads
first, then single weights), reloads the model with ``from_pretrained`` and compares its perplexity, size and
speed with the dense model's. It uses less text than README's tables, to be done in a minute or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# torch and transformers take seconds to import: main does it, after its first line of output

HERE = Path(__file__).parent
DEFAULT_OUTPUT = Path("out/tiny-llama-60")
SEQLEN = 256  # half the model's context
PROMPT = "The old man looked at the sea and"


def generate(model: Any, tokenizer: Any) -> str:
    """Forty tokens by greedy decoding."""
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    tokens = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True)).replace("\n", " ")


def checkpoint_bytes(directory: Path) -> int:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--samples", type=int, default=8, help="calibration sequences of 256 tokens")
    parser.add_argument("--eval-tokens", type=int, default=16384, help="tokens to measure perplexity on")
    arguments = parser.parse_args()
    print(
        f"pruning {HERE / 'tiny-llama'} by {arguments.sparsity:.0%}: {arguments.samples} calibration sequences of "
        f"{SEQLEN} tokens, perplexity on {arguments.eval_tokens:,} tokens",
        flush=True,
    )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    import mosaic_kernels as mk
    from mosaic_kernels.cli import log_to_stderr
    from mosaic_kernels.device import has_fast_products, name_of
    from mosaic_kernels.evaluate.latency import latencies

    disable_progress_bar()

    with log_to_stderr():  # what is under way, and how long it will take
        report = mk.prune(
            HERE / "tiny-llama",
            sparsity=arguments.sparsity,
            category="composite",
            calibration=HERE / "text" / "calibration.txt",
            samples=arguments.samples,
            eval_text=HERE / "text" / "validation.txt",
            eval_tokens=arguments.eval_tokens,
            seqlen=SEQLEN,
            output_dir=arguments.output_dir,
            overwrite=arguments.output_dir == DEFAULT_OUTPUT,
        )

    tokenizer = AutoTokenizer.from_pretrained(HERE / "tiny-llama")
    # Compared with torch at its best: on a processor without bf16 instructions that is fp32.
    dtype = torch.bfloat16 if has_fast_products(torch.bfloat16) else torch.float32
    dense = AutoModelForCausalLM.from_pretrained(HERE / "tiny-llama", dtype=dtype)
    pruned = AutoModelForCausalLM.from_pretrained(arguments.output_dir)
    # Interleaved, because the speed of a shared machine drifts.
    with log_to_stderr():
        dense_speed, pruned_speed = latencies([dense, pruned], prompt_tokens=64, new_tokens=32, repeats=5)

    size = sum(p.numel() for p in dense.parameters())
    rows = [
        ("parameters", f"{size:,}", f"{size - report['removed_parameters']:,}"),
        (
            "checkpoint bytes",
            f"{checkpoint_bytes(HERE / 'tiny-llama'):,}",
            f"{checkpoint_bytes(arguments.output_dir):,}",
        ),
        ("perplexity", f"{report['perplexity']['dense']:.2f}", f"{report['perplexity']['pruned']:.2f}"),
        ("decode tokens/s", f"{dense_speed.decode_tokens_per_s:.1f}", f"{pruned_speed.decode_tokens_per_s:.1f}"),
        ("prefill tokens/s", f"{dense_speed.prefill_tokens_per_s:.0f}", f"{pruned_speed.prefill_tokens_per_s:.0f}"),
    ]
    print(f"{'':<18}{'dense':>14}{'pruned':>14}")
    for name, before, after in rows:
        print(f"{name:<18}{before:>14}{after:>14}")
    print(
        f"\nremoved {report['removed_parameters']:,} of {report['prunable_parameters']:,} projection weights: "
        f"{report['structured_removed']:,} in whole units, {report['unstructured_zeros']:,} as zeros"
    )
    print(f"perplexity on {report['perplexity']['tokens']:,} tokens of {report['perplexity']['text']}")
    print(f"the dense model decodes and prefills in {name_of(dtype)}, the faster of bfloat16 and float32 here")
    print(f"\ndense : {generate(dense, tokenizer)}\npruned: {generate(pruned, tokenizer)}")
    seconds, threads = report["seconds"]["total"], torch.get_num_threads()
    print(f"\nwritten to {arguments.output_dir} in {seconds:.0f} s with {threads} threads")


if __name__ == "__main__":
    main()
