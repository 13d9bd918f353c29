"""Gradients of single rows from one backward pass, as factors, for MaxGrad and GREATS."""
