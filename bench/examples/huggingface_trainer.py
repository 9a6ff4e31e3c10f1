"""Hugging Face's Trainer with an optimizer of adamprox: a tiny random GPT-2 learns to count."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import adamprox

NUMBERS = 23
# Rows of numbers, each the one before it plus 1, modulo NUMBERS.
TOKENS = (torch.arange(256)[:, None] + torch.arange(16)) % NUMBERS
SHAPE = {"vocab_size": NUMBERS, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}


def train(optimizer=adamprox.AdamProx, folder="counting", resume_from=None, **arguments):
    """The loss of each step, and the model; ``resume_from`` is a checkpoint in ``folder``."""
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=None, eos_token_id=None))
    settings = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        save_steps=24,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    groups = adamprox.param_groups(model, weight_decay=0.1)
    trainer = Trainer(
        model,
        settings,
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        # None: the schedule is that of the settings. With Trainer's own param groups it is
        # optimizer_cls_and_kwargs=(optimizer, {"lr": 3e-3, "weight_decay": 0.1}) instead.
        optimizers=(optimizer(groups, lr=3e-3), None),
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        losses, _ = train(folder=folder)
    print(f"loss before: {losses[0]:.4f}, after: {losses[-1]:.4f}")
