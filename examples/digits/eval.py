"""Evaluates one checkpoint of the digits CNN on the test images."""

import torch
from model import DigitsCNN, digits
from torch import nn


def eval_from_checkpoint(checkpoint_path: str) -> dict[str, float]:
    """Mean cross-entropy and accuracy on the 360 test images."""
    model = DigitsCNN()
    model.load_state_dict(torch.load(checkpoint_path, map_location="cpu", weights_only=True))
    model.eval()
    images, labels = digits("test")
    with torch.no_grad():
        logits = model(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    return {"test_loss": loss, "test_acc": accuracy}
