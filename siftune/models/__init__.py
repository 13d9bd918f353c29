"""Models: the first layers as a feature extractor, the LM head as a linear map, a content-addressed store."""
