"""Files of weights: read, matched to a network, written."""
