# SPDX-License-Identifier: Apache-2.0
"""The printed table of an explanation, and the dictionary with the same content."""

from __future__ import annotations

import json

from mosaic_kernels.explanation import BlockWay, Explanation, LayerWay


def layer_of(name: str, why_not: str | None = None, density: float = 0.5, kind: str = "packed") -> LayerWay:
    kernel = "torch" if kind == "torch" else "avx512"
    return LayerWay(name, kind, kernel, "bf16", density, why_not)


def test_equal_lines_of_a_big_model_are_one() -> None:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    blocks = tuple(BlockWay(f"model.layers.{i}", i != 17, "hooks on mlp" if i == 17 else None, 0) for i in range(22))
    layers = [layer_of(f"{block.name}.{part}", density=i / 100) for i, block in enumerate(blocks) for part in parts]
    layers[4 * 3 + 2] = layer_of("model.layers.4.mlp.up_proj", "it is a test", kind="torch")
    found = Explanation(blocks, (*layers, layer_of("lm_head", kind="dense", density=1.0)), ("a note",), "lm_head")
    assert str(found).splitlines() == [
        "runs: 21 of 22 blocks natively (hooks on mlp), 65 packed layers on avx512, 1 layer by torch (it is a test), "
        "head dense on avx512",
        "",
        "blocks       one token of one sequence",
        "0-16, 18-21  native token",
        "17           transformers' modules: hooks on mlp",
        "",
        "blocks     layers                            runs                       density",
        "0-3, 5-21  self_attn.{q,k}_proj mlp.up_proj  bf16, packed, avx512       0.00 to 0.21",
        "4          self_attn.{q,k}_proj              bf16, packed, avx512       0.04",
        "4          mlp.up_proj                       bf16, torch: it is a test  0.50",
        "-          lm_head                           bf16, dense, avx512        1.00",
        "",
        "- a note",
    ]  # fmt: skip


def test_the_dictionary_is_json_and_says_the_same() -> None:
    found = Explanation(
        (BlockWay("model.layers.0", True, None, 3),), (layer_of("lm_head", "for a test"),), ("a note",), "lm_head"
    )
    read = json.loads(json.dumps(found.as_dict()))
    assert set(read) == {"summary", "blocks", "layers", "notes"}
    assert [BlockWay(**block) for block in read["blocks"]] == list(found.blocks)
    assert [LayerWay(**layer) for layer in read["layers"]] == list(found.layers)
    assert read["summary"] == found.summary
