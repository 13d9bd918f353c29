"""The HTML page of a run (`siftune report`) and the figures of papers and studies."""
