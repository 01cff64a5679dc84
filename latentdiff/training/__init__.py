"""Training: the loop, the policies of a run, and the loss of each stage."""
