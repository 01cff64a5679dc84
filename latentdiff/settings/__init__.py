"""The settings of a run or a fine-tuning: pydantic models, read from TOML and validated."""
