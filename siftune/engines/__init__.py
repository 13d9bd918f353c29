"""WHERE IT RUNS: the same shard function in one process or many."""
