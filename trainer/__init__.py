"""Pretraining under DeepSpeed ZeRO, checkpoints, export, fine-tuning and evaluation."""
