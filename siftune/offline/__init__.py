"""Offline methods: a method is fitted on a pool and computes one score per row."""
