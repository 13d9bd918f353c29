"""SCORE THE POOL ONCE: a method is fitted on a pool and gives one number per row."""
