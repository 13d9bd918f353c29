"""PLUGINS FOR OTHER TRAINING FRAMEWORKS: a few lines each around `siftune.attach`."""
