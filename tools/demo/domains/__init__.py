"""The four hidden domains of the embedded corpus; each module lists its kinds of row as functions of a generator."""
