"""Train image diffusion and flow models in a fraction of the usual epochs."""

__version__ = "0.1.0"
