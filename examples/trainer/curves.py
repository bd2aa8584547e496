"""Reads the curves of a training back from its TensorBoard run, as a table: ``python curves.py [OUTPUT]``."""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def curves(output: Path) -> dict[str, dict[int, float]]:
    """Every curve of the newest run below this directory: its points by step.

    Raises:
        FileNotFoundError: there is no run.
    """
    runs = sorted((output / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    # The last points of the evaluations are older, by step, than the last ones of the loss: nothing was restarted.
    events = EventAccumulator(str(runs[-1]), purge_orphaned_data=False).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def table(found: dict[str, dict[int, float]]) -> str:
    """The curves of the evaluations, and the training's loss of the same steps, in Markdown."""
    names = ["train/loss", *sorted(name for name in found if name.startswith("eval/") and not name.endswith("/loss"))]
    steps = sorted({step for name in names[1:] for step in found[name]})
    lines = [["step", *names], ["---"] * (len(names) + 1)]
    lines += [[str(step), *(f"{found[name][step]:.3f}" if step in found[name] else "" for name in names)] for step in steps]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(curves(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "checkpoints")))
