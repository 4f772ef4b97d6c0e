"""Train a continuous CNN on real images, certify it, and write a report."""
