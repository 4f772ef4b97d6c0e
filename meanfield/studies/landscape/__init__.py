"""Draw the loss around trained networks, with its error, and measure its sharpness."""

COMMAND = "landscape"
