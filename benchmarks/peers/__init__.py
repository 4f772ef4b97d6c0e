"""Compare classifiers of the same images, from linear to continuous, in accuracy and CPU seconds."""
