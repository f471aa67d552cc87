"""Training data: clips found, checked, decoded and put in an order that only depends on a seed."""
