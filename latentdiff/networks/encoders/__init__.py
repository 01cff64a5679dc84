"""Networks that turn a prompt into conditions."""
