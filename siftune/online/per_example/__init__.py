"""Every row's own gradient from one backward pass, as factors: what MaxGrad and GREATS are computed from."""
