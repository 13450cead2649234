"""Part and semantic segmentation: the fine-tuning loop, the scripts, pictures."""
