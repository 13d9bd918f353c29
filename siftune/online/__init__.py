"""SCORE EVERY BATCH: a method scores the candidates of a batch from the forward pass alone and keeps the best."""
