"""What a run or a fine-tuning is made of, validated: pydantic models read from TOML."""
