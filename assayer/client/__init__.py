"""What lives inside a training: submits its checkpoints to an evaluation server and brings the metrics back. Standard library only.

::

    from assayer.client import AsyncEvaluation

    evaluation = AsyncEvaluation(eval_config, output_dir="runs/a")
    ...
    evaluation.submit("runs/a/checkpoint-500", step=500)      # returns at once
    for point in evaluation.poll():                           # returns at once
        log(point.fields())
    ...
    for point in evaluation.finish(timeout=3600):
        log(point.fields())

``EvalClient`` is the plain client, ``assayer.client.callback`` has the callbacks of trainers.
"""

from assayer.client.asynchronous import AsyncEvaluation
from assayer.client.config import EvalConfig
from assayer.client.connection import EvalClient
from assayer.client.mailbox import Point
from assayer.errors import ServerError

__all__ = ["AsyncEvaluation", "EvalClient", "EvalConfig", "Point", "ServerError"]
