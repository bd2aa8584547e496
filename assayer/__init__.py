"""assayer evaluates every checkpoint of a training run while training goes on."""

__version__ = "0.1.0"
__all__ = ["__version__"]
