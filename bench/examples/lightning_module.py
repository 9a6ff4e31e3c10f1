"""A LightningModule with an optimizer of adamprox, on handwritten digits."""

import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import adamprox

EPOCHS = 4


class Classifier(lightning.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
        self.losses = []

    def training_step(self, batch, _):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        groups = adamprox.param_groups(self, weight_decay=0.1)
        optimizer = self.optimizer(groups, lr=3e-3)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def train(optimizer=adamprox.AdamProx, folder="digits", resume_from=None, **arguments):
    """The loss of each batch, and the model; ``resume_from`` is a checkpoint in ``folder``."""
    lightning.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    model = Classifier(optimizer)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        callbacks=[ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        logger=False,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(model, DataLoader(digits, batch_size=64), ckpt_path=resume_from)
    return model.losses, model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, _ = train(folder=folder)
    print(f"loss before: {losses[0]:.4f}, after: {losses[-1]:.4f}")
