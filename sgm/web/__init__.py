"""The page in the browser: samples, compares, and watches training."""
