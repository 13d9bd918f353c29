"""The embedded corpus and tiny model, so that everything runs offline on two cores."""
