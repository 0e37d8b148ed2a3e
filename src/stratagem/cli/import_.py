"""`stratagem import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from stratagem.cli.console import say
from stratagem.programs.import_run import Source, Told, import_run

__all__ = ["import_"]


def import_(
    file: Positional[Path],
    /,
    from_: Annotated[Source, tyro.conf.arg(name="from")],
    out: Path,
    told: Annotated[Told, tyro.conf.arg(name="")] = Told(),  # noqa: B008
    bank: Path | None = None,
) -> None:
    """Makes a run of an official checkpoint, to be sampled like any other.

    Example: stratagem import sit-xl.pt --from sit --latent-multiplier 0.18215 --out runs/sit-xl
    Example: stratagem import lightningdit-xl.pt --from lightningdit
        --latent-stats latents_stats.pt --out runs/lightningdit-xl

    EDM's pickles hold code, and multistage NCSN++ and LDM keep their averaged weights apart. Make
    a plain state dict of them where they were trained, in three lines of Python:

    EDM:      import pickle, torch
              net = pickle.load(open("network-snapshot.pkl", "rb"))["ema"]
              torch.save(net.state_dict(), "edm.pt")

    NCSN++:   state = restore_checkpoint("checkpoint.pth", state, device)
              state["ema"].copy_to(state["model"].parameters())
              torch.save(state["model"].state_dict(), "ncsnpp.pt")

    LDM:      model = instantiate_from_config(config.model); model.load_state_dict(checkpoint)
              with model.ema_scope():
                  torch.save(model.model.diffusion_model.state_dict(), "ldm.pt")

    Args:
        file: The .pt, .pth or .safetensors file.
        from_: Whose checkpoint it is; GMem's versions are told apart by their weights.
        out: The run's folder.
        told: What the weights do not tell.
        bank: The memory bank of a network with memory.
    """
    made = import_run(file, from_, out, told=told, bank=bank)
    say(f"{out}: {made.title}, {made.parameters:,} parameters, {made.about}")
    if made.left_out:
        say(f"  left out of the run: {', '.join(made.left_out)}")
    if made.bank is not None and bank is None:
        say(f"  to sample, put its memory bank at {made.bank} or give --bank")
