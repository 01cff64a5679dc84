"""Small changes of a network: low-rank factors and learnt words."""
