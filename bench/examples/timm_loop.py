"""timm's training loop with an optimizer of adamprox: a tiny vision transformer reads digits."""

import tempfile

import timm
import torch
from sklearn.datasets import load_digits
from timm.models import resume_checkpoint
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, NativeScaler
from torch.nn.functional import cross_entropy

import adamprox

EPOCHS = 4


def train(optimizer=adamprox.AdamProx, folder=".", resume_from=None, dtype=torch.float32):
    """The loss of each batch, and the model; ``resume_from`` is a checkpoint in ``folder``."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[:320].split(32)
    batches = list(zip(images, torch.tensor(labels)[:320].split(32), strict=True))
    shape = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    model = timm.create_model("test_vit", **shape).to(device)

    # The first layers learn most slowly; norms and biases do not decay.
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.75)
    optimizer = optimizer(groups, lr=6e-3)
    schedule = CosineLRScheduler(optimizer, EPOCHS, warmup_t=1, warmup_lr_init=6e-4)
    scaler = NativeScaler(device)
    saver = CheckpointSaver(model, optimizer, amp_scaler=scaler, checkpoint_dir=folder)

    start = 0
    if resume_from is not None:
        start = resume_checkpoint(model, resume_from, optimizer, scaler)
    losses = []
    for epoch in range(start, EPOCHS):
        schedule.step(epoch)
        for image, label in batches:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = cross_entropy(model(image.to(device)), label.to(device))
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            losses.append(loss.item())
        saver.save_checkpoint(epoch)
    return losses, model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, _ = train(folder=folder)
    print(f"loss before: {losses[0]:.4f}, after: {losses[-1]:.4f}")
