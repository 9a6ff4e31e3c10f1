"""A training loop of accelerate with an optimizer of adamprox, on handwritten digits."""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adamprox

EPOCHS = 4


def train(optimizer=adamprox.AdamProx, folder="digits", resume_from=None, **arguments):
    """The loss of each batch, and the model; checkpoints are ``folder``/0, 1, ..."""
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, **arguments)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    batches = DataLoader(digits, batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = optimizer(adamprox.param_groups(model, weight_decay=0.1), lr=3e-3)
    steps = EPOCHS * -(-len(batches) // 2)  # the last batch of an epoch is a step of its own
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model, optimizer, batches, schedule = accelerator.prepare(model, optimizer, batches, schedule)

    start = 0
    if resume_from is not None:
        accelerator.load_state(f"{folder}/{resume_from}")
        start = resume_from + 1
    losses = []
    for epoch in range(start, EPOCHS):
        for image, label in batches:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(image), label)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.save_state(f"{folder}/{epoch}")
    return losses, accelerator.unwrap_model(model)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, _ = train(folder=folder)
    print(f"loss before: {losses[0]:.4f}, after: {losses[-1]:.4f}")
