"""assayer evaluates every checkpoint of a training run while training goes on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assayer.merge.state_dict import load_state_dict

__version__ = "0.1.0"
__all__ = ["__version__", "load_state_dict"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: `import assayer` alone stays light.
    if name == "load_state_dict":
        from assayer.merge.state_dict import load_state_dict

        return load_state_dict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
