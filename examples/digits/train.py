"""Trains a small CNN on scikit-learn's handwritten digits (1,797 images of 8 x 8) and saves a checkpoint every epoch."""

import argparse
import time
from pathlib import Path

import torch
from model import DigitsCNN, digits
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint_dir", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds to wait after each epoch, as if epochs took longer")
    options = parser.parse_args()
    options.checkpoint_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    images, labels = digits("train")
    model = DigitsCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    for epoch in range(1, options.epochs + 1):
        model.train()
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        path = options.checkpoint_dir / f"model_epoch{epoch}.pt"
        torch.save(model.state_dict(), path)
        print(f"epoch {epoch}: train loss {loss.item():.3f}, saved {path.name}", flush=True)
        time.sleep(options.pause)


if __name__ == "__main__":
    main()
