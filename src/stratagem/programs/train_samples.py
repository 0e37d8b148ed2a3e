"""Pictures of how a run gets on: RUN/samples/step-00001200.png.

    two rows    from snippets of training images, or random classes
    two rows    under a line: from snippets of held-out images, where the bank has some

Noise, snippets and classes are functions of the run's seed, so picture after picture shows the same
samples grow. They are made by the averaged weights, in a copy of the network that only process 0
has: nothing of the training is touched, and none of its random draws. Where the weights are in
shards all processes give theirs, one tensor at a time, and wait for the picture.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from stratagem.artifact import write_bytes
from stratagem.assemble import Model, Parts
from stratagem.autoencoders import finish_of
from stratagem.config import RunConfig
from stratagem.distributed import World, full
from stratagem.errors import InputError
from stratagem.nets.multi_decoder import MultiDecoder
from stratagem.nets.warm_start import part_decoders
from stratagem.programs.sample import SampleConfig, sample_run
from stratagem.train import TrainState

__all__ = ["SamplePictures", "picture_of"]

_NUM, _COLUMNS, _STEPS = 16, 8, 10


class SamplePictures:
    """Draws the picture of a step; to be made before the network is spread over processes.

    Args:
        out: The run's folder.
        config: The run's configuration.
        parts: Its objects.
        world: The processes.

    Raises:
        InputError: If the run learns latents, and no autoencoder makes images of them.
    """

    def __init__(self, out: Path, config: RunConfig, parts: Parts, world: World) -> None:
        self._model = None if world.rank else _model(out, config, parts, world.device)
        self._warm = 0 if config.stages is None else config.stages.warm_steps
        self._seed = config.seed

    @torch.no_grad()
    def __call__(self, state: TrainState) -> None:
        """Draws the picture of the averaged weights; all processes must call it."""
        with state.world.together():
            copied = {} if self._model is None else dict(self._backbone.named_parameters())
            for name, average in state.ema.weights.items():
                whole = full(average)
                if copied:
                    copied[name].copy_(whole)
            if self._model is not None:
                self._draw(self._model, state.step)

    @property
    def _backbone(self) -> torch.nn.Module:
        assert self._model is not None
        return self._model.denoiser.backbone

    def _draw(self, model: Model, step: int) -> None:
        if step < self._warm:  # one decoder still serves all stages
            assert isinstance(self._backbone, MultiDecoder)
            part_decoders(self._backbone)
        blocks = []
        for policy in ("train", "held-out"):
            if policy == "train" or (model.bank is not None and model.bank.held_out.any()):
                cfg = SampleConfig(
                    _NUM, self._seed, "dpm++2m", _STEPS, snippets=policy, batch_size=_NUM
                )
                blocks.append(sample_run(model, cfg).images)
        file = io.BytesIO()
        picture_of(blocks).save(file, "PNG")
        write_bytes(model.path / "samples" / f"step-{step:08d}.png", file.getvalue())


def _model(out: Path, config: RunConfig, parts: Parts, device: torch.device) -> Model:
    made, snippets = parts.description, parts.batches.conditions.snippets
    bank = None if snippets is None else snippets.bank
    try:
        finish = finish_of(made, config.train.samples_autoencoder)
    except InputError as error:
        raise InputError(f"train.samples_autoencoder: {error}") from None
    if finish.shape[0] not in {1, 3} or (finish.statistics and finish.autoencoder is None):
        raise InputError(
            "train.samples_every: this run learns latents; give train.samples_autoencoder, which "
            "makes images of them, or set it to 0"
        )
    denoiser = copy.deepcopy(parts.objective.denoiser).eval().requires_grad_(False).to(device)
    return Model(denoiser, config, made, bank, 0, out, finish)


def picture_of(blocks: list[Tensor]) -> Image.Image:
    """Lays blocks of images, uint8 (N, C, H, W), in rows of 8, a white line between the blocks.

    Images narrower than 64 pixels are shown larger by a whole factor, with 4 between two of them.
    """
    parts: list[Tensor] = []
    for images in blocks:
        factor = max(1, 64 // images.shape[-1])
        large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        tiles = pad(large, (2, 2, 2, 2)).unflatten(0, (-1, _COLUMNS)).permute(2, 0, 3, 1, 4)
        parts.append(pad(tiles.flatten(3).flatten(1, 2), (0, 0, 4 * bool(parts), 0), value=255))
    pixels = torch.cat(parts, 1).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
