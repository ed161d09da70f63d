"""The kinds beside plain LoRA, one file a family: each a frozen dataclass with its closed formula and its source."""
