"""The golden networks of the official projects, for the tests of import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from stratagem.interop.dit import Official
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.transformer import TransformerDecoder, TransformerEncoder
from stratagem.objective import AlignmentHead

GOLDEN = Path(__file__).parent / "golden"
PROJECTS = {
    "gmem_lightningdit_a": "gmem",
    "gmem_lightningdit_b": "gmem",
    "lightningdit_class": "lightningdit",
    "sit_class": "sit",
    "sit_repa": "repa",
}
# Heads are in no shape of a network without rotations and without normalised queries.
HEADS = {"sit_class": ["--heads", "4"], "sit_repa": ["--heads", "4"]}
FROM_NOISE = {"gmem", "lightningdit", "sit"}  # their time counts from noise to data
TABLES = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
State = dict[str, Tensor]


def golden(name: str) -> tuple[dict[str, Any], State, State]:
    """Constructor arguments, weights by official name, and all tensors of a golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return config, weights, tensors


def build(official: Official, shared: int) -> MultiDecoder:
    encoder = TransformerEncoder(official.cfg, shared)
    return MultiDecoder(encoder, [TransformerDecoder(official.cfg, official.depth - shared)])


def condition_of(tensors: State) -> State:
    """What a golden network is conditioned on, under the names that ours takes."""
    names = {"label": "inputs/y", "memory": "inputs/c"}
    return {ours: tensors[name] for ours, name in names.items() if name in tensors}


def projector(weights: State, official: Official) -> AlignmentHead:
    """The head that the original was trained with, of which an import has no need."""
    prefix = f"{official.family.projector}."
    own = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    hidden, width = own["0.weight"].shape
    head = AlignmentHead(width, len(own["4.weight"]), hidden)
    head.layers.load_state_dict(own)
    return head
