"""LoRA files: names and tensors to patches, patches onto weights, exactly and reversibly. Knows no requests."""
