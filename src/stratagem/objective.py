"""What training minimises: per-example losses of a denoiser.

    x_t = alpha_t x + sigma_t eps,    denoise = mean over pixels of (target - prediction)^2

The target is the quantity that the network was asked for (v, eps or x); with EDM preconditioning it
is x under the weight (sigma^2 + sigma_d^2) / (sigma sigma_d)^2, which makes the loss of the raw
network uniform over noise levels (arXiv 2206.00364, Table 1). GMem adds the angle between the
velocities over the channels (arXiv 2412.08781):

    cosine = mean over pixels of 1 - <v, v_hat> / (|v| |v_hat|)

REPA (arXiv 2410.06940) aligns the tokens h of an early block with the tokens y that a frozen
encoder makes of x, through a head that exists in training only:

    align = mean over tokens of -<head(h), y> / (|head(h)| |y|)

Losses come one number per example; the caller weighs and averages them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from stratagem.denoiser import Denoiser
from stratagem.errors import InputError
from stratagem.schedule import expand

__all__ = ["AlignmentHead", "Losses", "Objective"]

_SIGMA_FLOOR = 1e-12


class Losses(NamedTuple):
    """Per-example losses, each of shape (B,)."""

    denoise: Tensor
    cosine: Tensor | None
    align: Tensor | None


class AlignmentHead(nn.Module):
    """Maps the network's tokens to those of a frozen encoder, (B, L, width) -> (B, L, dim).

    Three linear maps with SiLU between, as REPA's and GMem's projector.

    Args:
        width: Width of the network's tokens.
        dim: Width of the encoder's tokens.
        hidden: Width between the maps.
    """

    def __init__(self, width: int, dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (B, L, width)."""
        return self.layers(tokens)


class Objective(nn.Module):
    """Compares a denoiser with the truth.

    Args:
        denoiser: Network and schedule.
        cosine: Whether the angle of the velocities is measured too.
        head: Maps tapped tokens to an encoder's, such as an `AlignmentHead`; None for no alignment.
        tap: Name of the part of the backbone whose output (B, L, W) the head receives, such as
            "encoder.stack.blocks.3" for the tokens after the fourth block. A part of the encoder:
            where there are several decoders, each sees its own rows only.

    Raises:
        InputError: If the backbone has no part of that name.
        ValueError: If one of head and tap is given without the other.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        cosine: bool = False,
        head: nn.Module | None = None,
        tap: str | None = None,
    ) -> None:
        super().__init__()
        if (head is None) != (tap is None):
            raise ValueError("alignment needs both head and tap")
        self.denoiser = denoiser
        self.cosine = cosine
        self.head = head
        self.tap = tap
        if tap is not None:
            self._tapped()

    def forward(
        self,
        x: Tensor,
        eps: Tensor,
        t: Tensor,
        *,
        align: Tensor | None = None,
        stage: int | tuple[int, ...] | None = None,
        **condition: Tensor | None,
    ) -> Losses:
        """Returns the losses of a batch.

        Args:
            x: Clean samples, (B, C, H, W).
            eps: Their noise, like x.
            t: Their times, (B,).
            align: An encoder's tokens of x, (B, L, D); given if and only if there is a head.
            stage: What a multi-decoder backbone is told of the stages; None to find them from t.
            condition: What the backbone takes besides: memory (B, D), label (B,).

        Raises:
            ValueError: If tokens are given without a head, or the other way round.
        """
        if (self.head is None) != (align is None):
            raise ValueError("align= goes with a head, and a head with align=")
        schedule = self.denoiser.schedule
        told = {} if stage is None else {"stage": stage}
        with self._tokens() as tokens:
            prediction = self.denoiser(schedule.perturb(x, eps, t), t, **condition, **told)
        kind = self.denoiser.parameterization
        if kind == "v" or self.cosine:
            v = schedule.velocity(x, eps, t)
            v_hat = schedule.velocity(prediction.x, prediction.eps, t)
        match kind:
            case "v":
                error = v_hat - v
            case "eps":
                error = prediction.eps - eps
            case "x":
                error = prediction.x - x
            case "edm":
                error = (prediction.x - x) * self._edm_weight(t, x).sqrt()
        return Losses(
            error.square().flatten(1).mean(1),
            (1 - cosine_similarity(v_hat, v, dim=1)).flatten(1).mean(1) if self.cosine else None,
            None if align is None else self._alignment(tokens, align),
        )

    def _tapped(self) -> nn.Module:
        assert self.tap is not None
        try:
            return self.denoiser.backbone.get_submodule(self.tap)
        except AttributeError as error:
            raise InputError(f"alignment taps {self.tap!r}, but {error}") from error

    @contextmanager
    def _tokens(self) -> Iterator[list[Tensor]]:
        """Yields a list that receives the tapped tokens of the calls inside."""
        tokens: list[Tensor] = []
        if self.head is None:
            yield tokens
            return

        def note(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
            tokens.append(output)

        handle = self._tapped().register_forward_hook(note)
        try:
            yield tokens
        finally:
            handle.remove()

    def _alignment(self, tokens: list[Tensor], align: Tensor) -> Tensor:
        """Returns -mean cosine of the head's tokens and the encoder's, (B,)."""
        assert self.head is not None
        assert len(tokens) == 1, f"the tapped part ran {len(tokens)} times"
        z = self.head(tokens[0])
        if z.shape != align.shape:
            raise ValueError(f"align is {tuple(align.shape)}, but the head gives {tuple(z.shape)}")
        return -cosine_similarity(z, align, dim=-1).mean(1)

    def _edm_weight(self, t: Tensor, like: Tensor) -> Tensor:
        """lambda(sigma) = (sigma^2 + sigma_d^2) / (sigma sigma_d)^2 of sigma / alpha, EDM Table 1.

        Multiplied by alpha^2 above and below, for alpha may be 0; where sigma is, x is known and
        the error is 0 whatever the network says, which a finite weight keeps.
        """
        schedule, data = self.denoiser.schedule, self.denoiser.sigma_data
        alpha, sigma = expand(schedule.alpha(t), like), expand(schedule.sigma(t), like)
        sigma = sigma.clamp(min=_SIGMA_FLOOR)
        return (sigma**2 + (alpha * data) ** 2) / (sigma * data) ** 2
