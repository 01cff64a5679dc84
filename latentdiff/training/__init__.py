"""The loop, the policies of a run, and what each stage minimises."""
